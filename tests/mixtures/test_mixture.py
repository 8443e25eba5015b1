"""The mixture layer and model against naive sums, and what they leave alone."""

import copy
import threading

import pytest
import torch
from mixture_cases import CONFIGS, TASKS, llama, mixture, three_experts

from mole.adapters import Adapter, LoraWeights
from mole.mixtures import MultiExpertModel
from mole.routers import UniformConfig, XLoraConfig
from mole.routing import Routing


def logits(model, batch, **options):
    with torch.no_grad():
        return model(**batch, **options).logits


def add_to_weights(model, experts, weights):
    """The same static mixture, written into the backbone's own weight matrices."""
    for name, adapter in experts.items():
        for path, lora in adapter.modules.items():
            delta = lora.B.double() @ lora.A.double() * lora.scale * weights[name]
            parameter = model.get_submodule(path).weight
            parameter.data = (parameter.data.double() + delta).to(parameter.dtype)
    return model


@pytest.mark.parametrize("kernel", ["loop", "stacked"])
def test_static_routing_equals_the_deltas_added_to_the_weights(batch, kernel):
    weights = {"sums": 0.2, "words": -0.5, "dates": 1.1}
    want = logits(add_to_weights(llama(), three_experts(llama()), weights), {k: batch[k] for k in list(batch)[:2]})
    model = mixture("uniform", kernel=kernel)
    with model.fixed_routing(weights):
        torch.testing.assert_close(logits(model, batch), want, rtol=0, atol=2e-4)


def test_kernels_agree_in_logits_and_gradients(batch):
    for name in ("top_k", "xlora_layerwise"):
        outcomes = []
        for kernel in ("loop", "stacked"):
            model = mixture(name, kernel=kernel, train="both")
            out = model(**batch).logits
            out.square().mean().backward()
            outcomes.append((out, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
        (first, grads), (second, others) = outcomes
        torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
        for parameter, grad in grads.items():
            largest = grad.abs().max()
            assert (grad - others[parameter]).abs().max() <= 2e-5 * largest.clamp_min(1e-3), parameter


def test_without_experts_it_is_the_backbone_bit_for_bit(any_mixture, batch):
    want = logits(llama(), {k: batch[k] for k in list(batch)[:2]})
    with any_mixture.experts_off():
        assert torch.equal(logits(any_mixture, batch), want)
        with any_mixture.experts_off():
            assert torch.equal(logits(any_mixture, batch), want)
    with any_mixture.fixed_routing({}):
        assert torch.equal(logits(any_mixture, batch), want)
    assert not torch.allclose(logits(any_mixture, batch), want)


def test_unload_gives_back_the_same_objects(batch):
    backbone = llama()
    before = dict(backbone.named_modules())
    model = MultiExpertModel(backbone, three_experts(backbone), UniformConfig())
    assert dict(backbone.named_modules()).keys() != before.keys()
    restored = model.unload()
    assert all(module is before[path] for path, module in restored.named_modules())


def test_a_refused_router_leaves_the_backbone_as_it_was():
    backbone = llama()
    before = [path for path, _ in backbone.named_modules()]
    with pytest.raises(ValueError, match="every expert"):
        MultiExpertModel(backbone, three_experts(backbone), UniformConfig(exclude=("sums", "words", "dates")))
    assert [path for path, _ in backbone.named_modules()] == before


def test_task_routing_treats_each_example_as_if_it_were_alone(batch):
    model = mixture("task")
    together = logits(model, batch)
    for row in range(2):
        alone = {k: v[row : row + 1] for k, v in batch.items()}
        torch.testing.assert_close(together[row : row + 1], logits(model, alone), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_row_does_not_see_the_other_rows_or_its_padding(name, batch):
    model = mixture(name, torch.float64)
    full = logits(model, batch)
    short = {
        "input_ids": batch["input_ids"][1:, :6],
        "attention_mask": batch["attention_mask"][1:, :6],
        "task_names": ["date"],
    }
    torch.testing.assert_close(full[1:, :6], logits(model, short), rtol=0, atol=1e-10)


def test_experts_of_unlike_rank_and_targets_keep_their_own_scale():
    model = mixture("uniform")
    assert {name: sorted({w.rank for w in a.modules.values()}) for name, a in model.adapters().items()} == {
        "sums": [2],
        "words": [4],
        "dates": [3],
    }
    for name, adapter in three_experts(llama()).items():
        for path, weights in adapter.modules.items():
            kept = model.adapters()[name].modules[path]
            assert torch.equal(kept.A, weights.A)
            assert torch.equal(kept.B, weights.B)
            assert kept.scale == weights.scale


@pytest.mark.parametrize("train", ["router", "experts", "both", "none"])
def test_exactly_what_is_named_gets_gradients(train, batch):
    model = mixture("xlora", train=train)
    model.train()
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    is_router = {n for n in wanted if n.startswith("router.")}
    is_expert = {n for n in wanted if ".bank." in n}
    assert wanted == is_router | is_expert
    assert (bool(is_router), bool(is_expert)) == (train in ("router", "both"), train in ("experts", "both"))
    if wanted:
        model(**batch).logits.square().mean().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == wanted


def test_forward_and_generate_change_no_flag(any_mixture, batch):
    any_mixture.train()
    state = lambda: (  # noqa: E731
        [m.training for m in any_mixture.modules()],
        [p.requires_grad for p in any_mixture.parameters()],
    )
    before = state()
    any_mixture(**batch)
    any_mixture.generate(**batch, max_new_tokens=2, do_sample=False)
    assert state() == before
    with pytest.raises(ValueError, match="not used by the model"):
        any_mixture.generate(**batch, max_new_tokens=2, no_such_input=torch.ones(1))
    assert state() == before


def test_experts_are_parameters_and_no_buffers():
    model = mixture("xlora")
    experts = sum(w.A.numel() + w.B.numel() for a in model.adapters().values() for w in a.modules.values())
    assert sum(p.numel() for n, p in model.named_parameters() if ".bank." in n) == experts
    assert all(b.numel() < 16 for n, b in model.named_buffers() if ".bank." in n)


def test_gradient_checkpointing_changes_no_gradient(batch):
    for name in ("top_k", "xlora_layerwise"):
        grads = []
        for checkpointing in (False, True):
            model = mixture(name, train="both").train()
            model.router = model.router.eval() if model.router is not None else None
            if checkpointing:
                model.gradient_checkpointing_enable()
            first, second = model(**batch).logits, model(**{**batch, "input_ids": batch["input_ids"].flip(1)}).logits
            (first.square().mean() + second.mean()).backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert grads[0].keys() == grads[1].keys()
        assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


ENABLING = ["activation_checkpointing_enable", "gradient_checkpointing_enable"]  # transformers' newer name, its older


@pytest.mark.parametrize("name", ENABLING)
def test_reentrant_checkpointing_is_refused(name):
    with pytest.raises(ValueError, match="reentrant"):
        getattr(mixture("xlora"), name)({"use_reentrant": True})


def _router_gradients(model, batch):
    model.train().router.eval()
    model(**batch).logits.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.router.named_parameters()}


def test_checkpointing_under_its_newer_name_and_of_a_backbone_that_has_it_on_change_no_gradient(batch):
    want = _router_gradients(mixture("xlora"), batch)
    newer = mixture("xlora")
    newer.activation_checkpointing_enable(every_n_layers=1)
    backbone = llama()
    backbone.activation_checkpointing_enable()
    before = MultiExpertModel(backbone, three_experts(backbone), XLoraConfig())
    before.router.load_state_dict(newer.router.state_dict())
    for model in (newer, before):
        assert model.is_activation_checkpointing
        got = _router_gradients(model, batch)
        assert all(torch.equal(got[name], want[name]) and want[name].any() for name in want)


def test_a_backbone_under_reentrant_checkpointing_is_refused_and_given_back():
    backbone = llama()
    backbone.activation_checkpointing_enable({"use_reentrant": True})
    modules = dict(backbone.named_modules())
    with pytest.raises(ValueError, match="reentrant"):
        MultiExpertModel(backbone, three_experts(backbone), XLoraConfig())
    assert dict(backbone.named_modules()) == modules


def test_two_threads_equal_one_after_the_other(batch):
    model = mixture("task")
    inputs = [{**batch, "task_names": names} for names in (["add", "date"], ["upper", "spell"])]
    want = [logits(model, i) for i in inputs]
    for _ in range(5):
        got = [None, None]

        def run(i):
            got[i] = logits(model, inputs[i])  # noqa: B023

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_a_copy_is_independent(any_mixture, batch):
    want = logits(any_mixture, batch)
    twin = copy.deepcopy(any_mixture)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(any_mixture, batch), want)
    assert twin.context is not any_mixture.context
    assert all(layer.context is twin.context for layer in twin.layers.values())


def test_low_precision_backbones_keep_a_float32_router(batch):
    backbone = llama(torch.bfloat16)
    model = MultiExpertModel(backbone, three_experts(backbone), CONFIGS["xlora"], tasks=TASKS).eval()
    assert {p.dtype for p in model.router.parameters()} == {torch.float32}
    assert logits(model, batch).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routed = mixture("xlora")
        routed.listeners.append(seen := Seen())
        logits(routed, batch)
    assert seen.records[0][0].dtype == torch.float32


class Seen:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.records = []

    def record(self, scalings, *, token_ids, mask, task_names, phase):
        self.records.append((scalings, token_ids, mask, task_names, phase))


def test_listeners_see_each_forward_once(any_mixture, batch):
    any_mixture.listeners.append(seen := Seen())
    logits(any_mixture, batch)
    ((scalings, ids, mask, names, phase),) = seen.records
    assert scalings.shape[:2] == (2, 9)
    assert scalings.shape[2] in (1, len(any_mixture.sites))
    assert scalings.shape[3] == 3
    assert not scalings.requires_grad
    assert torch.equal(ids, batch["input_ids"])
    assert torch.equal(mask, batch["attention_mask"])
    assert (names, phase) == (["add", "date"], "eval")
    with any_mixture.experts_off():
        logits(any_mixture, batch)
    assert len(seen.records) == 1


def test_wrong_experts_are_refused_by_name():
    backbone = llama()
    odd = Adapter(
        method="lora",
        modules={"model.layers.0.self_attn.q_prj": LoraWeights(torch.ones(1, 32), torch.ones(32, 1), 1.0, False)},
        dropout=0.0,
    )
    with pytest.raises(ValueError, match=r"'odd' adapts 'model.layers.0.self_attn.q_prj'.*q_proj"):
        MultiExpertModel(backbone, {"odd": odd}, UniformConfig())
    wide = Adapter(
        method="lora",
        modules={"model.layers.0.self_attn.q_proj": LoraWeights(torch.ones(1, 64), torch.ones(32, 1), 1.0, False)},
        dropout=0.0,
    )
    with pytest.raises(ValueError, match="made for 64 → 32 features, the backbone has 32 → 32"):
        MultiExpertModel(backbone, {"wide": wide}, UniformConfig())
    with pytest.raises(ValueError, match="at least one expert"):
        MultiExpertModel(backbone, {}, UniformConfig())


def test_fixed_routing_names_unknown_experts(batch):
    model = mixture("uniform")
    with pytest.raises(ValueError, match="unknown expert 'sum'; did you mean sums"), model.fixed_routing({"sum": 1.0}):
        pass
    for odd, said in [
        (
            Routing(torch.ones(1, 1, 1), torch.tensor([[[3]]])),
            r"no expert has the id 3: the mixture has 3 \(sums, words",
        ),
        (Routing(torch.ones(1, 1, 1), torch.tensor([[[-2]]])), "no expert has the id -2"),
        (Routing(torch.ones(1, 1, 2)), "weights of 2 experts, and the mixture has 3"),
    ]:
        with pytest.raises(ValueError, match=said), model.fixed_routing(odd):
            pass
        with pytest.raises(ValueError, match=said):
            logits(model, batch, routing=odd)
    with model.fixed_routing(Routing(torch.ones(2, 4, 3))), pytest.raises(ValueError, match="fits no input"):
        logits(model, batch)


@pytest.mark.parametrize(
    "given", [{"sums": 0.3, "dates": -1.0}, Routing(torch.tensor([[[0.3, -1.0]]]), torch.tensor([[[0, 2]]]))]
)
def test_a_routing_handed_to_a_forward_is_spent_whatever_the_router(any_mixture, batch, given):
    with any_mixture.fixed_routing({"sums": 0.3, "dates": -1.0}):
        want = logits(any_mixture, batch)
    torch.testing.assert_close(logits(any_mixture, batch, routing=given), want, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(any_mixture, batch), want)
    with pytest.raises(ValueError, match="unknown expert 'sum'; did you mean sums"):
        logits(any_mixture, batch, routing={"sum": 1.0})


def test_a_routing_is_taken_to_a_mixture_of_other_experts_by_their_names():
    here = Routing(torch.tensor([[[0.5, 0.3]]]), torch.tensor([[[2, 0]]]))
    there = here.for_experts(("new", "c", "a"), ("a", "b", "c"))
    assert there.weights.tolist() == torch.tensor([[[0.0, 0.5, 0.3]]]).tolist()
    with pytest.raises(ValueError, match="a routing of 2 experts"):
        Routing(torch.ones(1, 1, 2)).for_experts(("a",), ("a", "b", "c"))


def test_data_parallel_copies_are_refused_with_the_reason():
    first = next(mixture("top_k").modules())  # torch.nn.parallel.replicate asks every module for a copy
    with pytest.raises(ValueError, match="nn.DataParallel copies a model.*use one process per device"):
        first._replicate_for_data_parallel()


@pytest.mark.parametrize("name", ["uniform", "top_k", "top_k_all"])
def test_the_backbone_called_by_itself_works_under_routers_that_need_no_more(name, batch):
    model = mixture(name)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    want = logits(model, batch)
    model.listeners.append(seen := Seen())
    with torch.no_grad():
        assert torch.equal(model.backbone(**inputs).logits, want)
        assert torch.equal(copy.deepcopy(model).backbone(inputs["input_ids"], inputs["attention_mask"]).logits, want)
        assert seen.records == []
        with pytest.raises((IndexError, RuntimeError)):
            model.backbone(input_ids=torch.tensor([[10**6]]))
        assert model.context.current is None
        with model.experts_off():
            assert torch.equal(model.backbone(**inputs).logits, llama()(**inputs).logits)
        assert torch.equal(model.unload()(**inputs).logits, llama()(**inputs).logits)


@pytest.mark.parametrize(("name", "needs"), [("task", "task_names"), ("xlora", "hidden_states")])
def test_the_backbone_called_by_itself_is_refused_under_routers_that_need_more(name, needs, batch):
    model = mixture(name)
    with pytest.raises(ValueError, match=f"router={name} needs {needs}, which a call of the backbone by itself"):
        model.backbone(input_ids=batch["input_ids"])
    assert model.context.current is None
    assert torch.equal(logits(model, batch), logits(mixture(name), batch))
