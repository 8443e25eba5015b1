"""Every method of XLoraModel: what it does, that it acts at once, and that it leaves everything else as it was."""

import copy
import pickle

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM
from xlora_cases import SITES, build, ids, llama, logits, lora, randomise

from mole import xlora


def state(model):
    """Training flags and requires_grad of everything."""
    flags = {name: module.training for name, module in model.named_modules()}
    return flags, {name: p.requires_grad for name, p in model.named_parameters()}


# ---- what it is
def test_names_layers_router_and_config(model, folders):
    assert model.experts == ("law", "code", "bio")
    assert list(model.layers) == list(model.sites)
    assert len(model.sites) == SITES
    assert model.router.classifier[0].in_features == 32
    assert model.xlora_config.adapters == folders
    assert model.config is model.backbone.config
    assert xlora.XLoraModel is xlora.xLoRAModel
    assert xlora.TwoStreamCache.__name__ == "TwoStreamCache"


def test_twelve_experts_and_more_keep_their_order(tmp_path):
    names = [f"adapter_{index}" for index in range(1, 13)]
    experts = {name: lora(index, targets=("q_proj",)) for index, name in enumerate(names)}
    model = xlora.XLoraModel(llama(), xlora.xLoRAConfig(), experts)
    assert list(model.experts) == names
    model.save_pretrained(tmp_path / "x")
    assert list(xlora.from_pretrained(tmp_path / "x", llama()).experts) == names


def test_a_new_model_is_in_eval_mode_and_deterministic(folders):
    model = xlora.add_xlora_to_model(
        llama(), xlora.xLoRAConfig(xlora_depth=3, xlora_size=64, xlora_dropout_p=0.9), folders
    )
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(model))


def test_what_the_caller_configures_with_stays_his(folders):
    config = xlora.xLoRAConfig(scaling_pass_value=None)
    model = xlora.add_xlora_to_model(llama(), config, folders)
    assert config.scaling_pass_value is None
    assert config.adapters is None
    assert model.xlora_config.scaling_pass_value == pytest.approx(1 / 3)


# ---- settings
def test_the_scaling_pass_value_acts_at_once_and_shows_in_the_config(model):
    before = logits(model)
    model.set_scaling_pass_value(0.4)
    assert model.xlora_config.scaling_pass_value == 0.4
    assert not torch.allclose(logits(model), before)
    model.set_scaling_pass_value(None)
    assert model.xlora_config.scaling_pass_value == pytest.approx(1 / 3)
    model.set_scaling_pass_value(0.0)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("value", [float("nan"), True, "1"])
def test_a_bad_scaling_pass_value_is_refused_and_changes_nothing(model, value):
    before = logits(model)
    with pytest.raises(ValueError, match="scaling_pass_value: got"):
        model.set_scaling_pass_value(value)
    assert model.xlora_config.scaling_pass_value == 0.0
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("names", [("scaling", "scaling"), ("lora", "lora")])
def test_the_global_weight_acts_at_once_in_both_names(model, names):
    setter = getattr(model, f"set_global_{names[0]}_weight")
    getter = getattr(model, f"get_global_{names[1]}_weight")
    setter(0)
    assert getter() == 0.0
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(logits(model), base)
    setter(2.0)
    logits(model)
    torch.testing.assert_close(model.get_latest_gates(), 2 * model.get_latest_scalings())


def test_top_k_acts_at_once_and_is_checked(model):
    assert model.get_topk_lora() is None
    model.set_topk_lora(1)
    logits(model)
    gates, scalings = model.get_latest_gates(), model.get_latest_scalings()
    assert bool(((gates != 0).sum(-1) == 1).all())
    torch.testing.assert_close(gates.sum(-1), scalings.amax(-1))  # no renormalisation
    with pytest.raises(ValueError, match="top_k_lora: got 4"):
        model.set_topk_lora(4)
    assert model.get_topk_lora() == 1
    model.set_topk_lora(None)


def test_top_k_cannot_go_while_its_softmax_is_on(folders):
    model = build(folders, top_k_lora=2, enable_softmax=False, enable_softmax_topk=True)
    with pytest.raises(ValueError, match="enable_softmax_topk: got True, need top_k_lora"):
        model.set_topk_lora(None)
    assert model.get_topk_lora() == 2


def test_trainable_adapters_are_exactly_the_experts(model):
    experts = {f"{n}.{p}" for n, m in model.named_modules() if n.endswith(".bank") for p, _ in m.named_parameters()}
    model.router.requires_grad_(False)
    model.set_use_trainable_adapters(True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == experts
    assert model.get_use_trainable_adapters()
    assert model.xlora_config.use_trainable_adapters
    model.xlora_config.use_trainable_adapters = False
    logits(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_scaling_pass_topk_off_gives_every_expert_its_value(folders):
    fields = {"top_k_lora": 1, "scaling_pass_value": 0.3}
    historic, even = build(folders, **fields), build(folders, **fields, scaling_pass_topk=False)
    assert historic.router.routing_pass_weights().weights.tolist() == [[[pytest.approx(0.3), 0.0, 0.0]]]
    assert even.router.routing_pass_weights().weights.tolist() == [[[pytest.approx(0.3)] * 3]]
    assert not torch.allclose(logits(historic), logits(even))


def test_gates_may_be_reused_while_decoding_and_then_again_not(model):
    passes = []
    model.backbone.model.register_forward_hook(lambda *_: passes.append(1))
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    exact = model.generate(ids(), **options)
    counts = [len(passes)]
    model.xlora_config.gate_refresh = 3
    model.generate(ids(), **options)
    counts.append(len(passes) - sum(counts))
    model.xlora_config.gate_refresh = 1
    assert torch.equal(model.generate(ids(), **options), exact)
    assert counts == [14, 7 + 1 + 2]  # of the six decode steps, pass 1 runs in two


# ---- forward and generate
def test_inputs_by_place_and_by_name_are_the_same(model):
    mask = torch.ones(2, 9, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(model(ids(), mask).logits, model(input_ids=ids(), attention_mask=mask).logits)
        labelled = model(ids(), mask, None, None, None, ids())  # the sixth of a Llama is `labels`
        assert torch.equal(labelled.loss, model(ids(), mask, labels=ids()).loss)
        with pytest.raises(TypeError, match="input_ids was given twice"):
            model(ids(), input_ids=ids())


def test_forward_and_effective_gates_follow_assigned_fields_and_places_as_the_call_does(model):
    types = torch.ones(2, 9, dtype=torch.long)
    bert = build_on_bert()
    with torch.no_grad():
        want = bert(input_ids=ids(), attention_mask=types, token_type_ids=types).logits
        assert torch.equal(bert.forward(ids(), types, types).logits, want)  # a BERT's third is token_type_ids
        assert not torch.equal(bert(ids(), types).logits, want)
        before = logits(model)
        model.xlora_config.top_k_lora = 1
        scalings = model.get_latest_scalings()
        assert (model.effective_gates(scalings, 0) > 0).sum(-1).max() == 1
        model.xlora_config.global_scaling_weight = 0.5
        after = model.forward(input_ids=ids()).logits
        assert torch.equal(after, logits(model))
        assert not torch.equal(after, before)
    with pytest.raises(ValueError, match="adapter_names"):
        model.forward(input_ids=ids(), adapter_names=["law", "code"])


def build_on_bert():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = BertForMaskedLM(BertConfig(vocab_size=101, initializer_range=0.3, **sizes)).eval()
    experts = {str(seed): lora(seed, targets=("query", "value"), model=base) for seed in range(2)}
    return randomise(xlora.XLoraModel(base, xlora.xLoRAConfig(), experts))


def test_mixed_batches_are_refused(model):
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="adapter_names"):
            call(input_ids=ids(), adapter_names=["law", "code"])


def test_nothing_changes_a_flag(model, tmp_path):
    model.train()
    model.backbone.eval()
    before = state(model)
    model(input_ids=ids())
    model.generate(ids(), max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path / "x")
    with model.disable_adapter():
        model(input_ids=ids())
    assert state(model) == before

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.router.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids(), max_new_tokens=3)
    handle.remove()
    assert state(model) == before


def test_hooks_do_not_pile_up(model):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    for _ in range(3):
        model.generate(ids(), max_new_tokens=2, do_sample=False)
    assert hooks() == before


def test_cached_and_recomputed_tokens_are_the_same_and_the_cache_is_a_pair(folders):
    model = build(folders, llama(torch.float64), layerwise_scalings=True, top_k_lora=2, router_dtype="float64")
    cached = model.generate(ids(), max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(ids(), max_new_tokens=6, do_sample=False, use_cache=False))
    assert isinstance(model(ids(), use_cache=True).past_key_values, xlora.TwoStreamCache)


def test_disabled_adapters_are_the_base_bit_for_bit_nested_and_after_errors(model):
    want, tokens = logits(llama()), llama().generate(ids(), max_new_tokens=4, do_sample=False)
    mixed = logits(model)
    passes = []
    handle = model.backbone.model.register_forward_hook(lambda *_: passes.append(1))
    with model.disable_adapter():
        assert torch.equal(logits(model), want)
        assert len(passes) == 1
        with model.disable_adapter(), pytest.raises(KeyboardInterrupt), model.disable_adapter():
            raise KeyboardInterrupt
        assert torch.equal(logits(model), want)
        assert torch.equal(model.generate(ids(), max_new_tokens=4, do_sample=False), tokens)
    handle.remove()
    assert torch.equal(logits(model), mixed)


def test_unload_gives_back_the_very_layers(folders):
    base = llama()
    before = dict(base.named_modules())
    model = xlora.add_xlora_to_model(base, xlora.xLoRAConfig(), folders)
    assert model.unload() is base
    assert dict(base.named_modules()) == before
    assert torch.equal(logits(base), logits(llama()))
    for call in (model, model.generate, model.forward):
        with pytest.raises(ValueError, match=r"unload\(\) gave the backbone back"):
            call(input_ids=ids())
    with pytest.raises(ValueError, match=r"unload\(\) gave the backbone back"):
        model.save_pretrained("nowhere")


def test_every_public_method_says_what_it_does():
    own = {name: value for name, value in vars(xlora.XLoraModel).items() if not name.startswith("_")}
    silent = [name for name, value in own.items() if (callable(value) or isinstance(value, property))]
    assert [name for name in silent if not own[name].__doc__] == []


@pytest.mark.parametrize("name", ["merge_and_unload", "merge_adapter", "load_adapter", "delete_adapter", "set_adapter"])
def test_what_makes_no_sense_is_refused(model, name):
    with pytest.raises(ValueError, match="gates depend on the input|experts and their order are fixed"):
        getattr(model, name)("law")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_disable` is deprecated")
def test_the_backbone_answers_for_the_rest(model):
    assert model.get_input_embeddings() is model.backbone.model.embed_tokens
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model.disable_input_require_grads()


def test_the_router_keeps_its_dtype_on_a_low_precision_base(folders):
    model = build(folders, llama(torch.bfloat16), layerwise_scalings=True)
    assert logits(model).dtype == torch.bfloat16
    for change in (lambda: model, lambda: model.to(torch.bfloat16), model.half, model.bfloat16):
        change()
        assert {p.dtype for p in model.router.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    assert model.get_latest_scalings().dtype == torch.float32
    before = model.get_latest_gates()
    with torch.no_grad():
        model.router.classifier[0].weight[0] += 1e-4
    logits(model)
    assert not torch.equal(model.get_latest_gates(), before)


# ---- what the router said
def test_latest_scalings_and_gates(model):
    assert model.get_latest_scalings() is None
    assert model.get_latest_gates() is None
    model(ids())
    scalings = model.get_latest_scalings()
    assert scalings.shape == (2, 9, SITES, 3)
    assert not scalings.requires_grad
    assert model.internal_xlora_scalings is not None
    with model.disable_adapter():
        model(ids(rows=1))
    assert model.get_latest_scalings().shape == (2, 9, SITES, 3)  # a plain forward predicts nothing


def test_the_surface_for_pefts_programs(model):
    classifier = model.base_model.internal_xlora_classifier
    assert (classifier.n_layers, classifier.n_classes) == (SITES, 3)
    assert classifier.config is model.xlora_config
    model.set_scaling_pass_value(0.25)
    assert classifier.override_scaling_pass_value == 0.25
    assert list(classifier.parameters()) == list(model.router.parameters())


def test_scalings_are_printed_for_the_next_forwards_only(model, capsys):
    model.print_scalings_predictions(2)
    for _ in range(3):
        logits(model)
    assert capsys.readouterr().out.count("scalings [B, S, L, E] = [2, 9, 6, 3]") == 2
    assert model.listeners == []
    with pytest.raises(ValueError, match="n_predictions_lifetime"):
        model.print_scalings_predictions(-1)


# ---- parameters
@pytest.mark.parametrize(("depth", "size", "layerwise"), [(1, 8, False), (2, 16, False), (2, 16, True), (4, 16, True)])
def test_parameters_are_counted_once_before_and_after_a_forward(folders, depth, size, layerwise, capsys):
    outputs = 3 * (SITES if layerwise else 1)
    model = build(folders, xlora_depth=depth, xlora_size=size, layerwise_scalings=layerwise)
    router = 33 * outputs if depth == 1 else 33 * size + (depth - 2) * (size + 1) * size + (size + 1) * outputs
    widths = {"q_proj": 64, "v_proj": 48, "down_proj": 80}
    experts = sum(2 * (2 + index) * sum(widths.values()) for index in range(3))
    base = sum(p.numel() for p in llama().parameters())
    assert model.get_nb_trainable_parameters() == (router, base + experts + router)
    logits(model)
    model.set_use_trainable_adapters(True)
    assert model.get_nb_trainable_parameters() == (router + experts, base + experts + router)
    model.print_trainable_parameters()
    assert f"trainable params: {router + experts:,}" in capsys.readouterr().out


def test_depth_two_of_three_experts_has_579_parameters(folders):
    assert build(folders, xlora_depth=2, xlora_size=16).get_nb_trainable_parameters()[0] == 579


def test_tied_weights_count_once(folders):
    tied = llama(tie_word_embeddings=True)
    model = build(folders, tied)
    base = sum(p.numel() for p in llama(tie_word_embeddings=True).parameters())
    assert model.get_nb_trainable_parameters()[1] - 33 * 3 - 2 * 9 * 192 == base


def test_packed_and_sharded_weights_count_in_full(model):
    counted = model.get_nb_trainable_parameters()[1]
    packed = torch.nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = type("State", (), {"shape": (4, 8)})()
    sharded = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    sharded.ds_numel = 100
    model.packed, model.sharded = packed, sharded
    assert model.get_nb_trainable_parameters()[1] == counted + 32 + 100


# ---- copies
def test_copies_and_pickles_after_a_forward_are_equal_and_independent(model):
    model.enable_scalings_logging()
    want = model(ids()).logits.detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want)
        assert len(other.get_scalings_log()) == 2
        randomise(other, seed=99)
        other.set_topk_lora(1)
        assert not torch.allclose(logits(other), want)
        assert model.get_topk_lora() is None
    assert torch.equal(logits(model), want)
    assert len(model.get_scalings_log()) == 2


# ---- properties of the gates
def test_permuted_experts_with_permuted_router_rows_give_the_same_logits(folders):
    model = build(folders, layerwise_scalings=True)
    order = ["bio", "law", "code"]
    other = build({name: folders[name] for name in order}, layerwise_scalings=True)
    rows = torch.tensor([list(folders).index(name) for name in order])
    for mine, theirs in zip(model.router.parameters(), other.router.parameters(), strict=True):
        theirs.data = mine.data.unflatten(0, (SITES, 3))[:, rows].flatten(0, 1)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-4)


def test_gates_depend_on_no_later_token_and_on_no_other_row(folders):
    model = build(folders, llama(torch.float64), top_k_lora=2, enable_softmax=False, enable_softmax_topk=True)
    whole = logits(model)
    torch.testing.assert_close(logits(model, ids()[:, :4]), whole[:, :4], rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(model, ids()[1:]), whole[1:], rtol=0, atol=1e-10)


# ---- compiled
def test_a_compiled_model_is_one_graph_and_follows_its_setters_without_compiling_again(folders):
    fields = {"layerwise_scalings": True, "top_k_lora": 2, "scaling_pass_value": 0.1}
    model, plain = build(folders, **fields), build(folders, **fields)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    changes = {"set_global_scaling_weight": 0.5, "set_scaling_pass_value": 0.3}

    def check():  # a graph has one kernel for all lengths, which need not be the one that is fastest for this one
        found = compiled(input_ids=ids(), use_cache=False).logits
        torch.testing.assert_close(found, logits(plain, use_cache=False), rtol=0, atol=1e-4)

    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        check()
        for setter, value in changes.items():
            getattr(model, setter)(value)
            getattr(plain, setter)(value)
            check()
        model.xlora_config.softmax_temperature = plain.xlora_config.softmax_temperature = 0.5
        model._sync()  # assigned fields are taken over outside the graph
        check()
