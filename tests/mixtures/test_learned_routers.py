"""Mixtures under learned routers: exact generation, training, files, and the formulas on whole models."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from learned_cases import LEARNED, equal_experts, learned
from mixture_cases import TASKS, expert, llama

from mole.backbones import Backbone
from mole.backbones.load import shapes_digest
from mole.mixtures import MultiExpertModel, load_mixture, own_statistics, save_mixture
from mole.routers import AttentionConfig, PolyConfig, SmearConfig, StaticConfig

ALL = pytest.mark.parametrize("name", LEARNED)


@pytest.fixture
def prompts() -> dict:
    """Two prompts, the first padded on the left."""
    ids = torch.randint(3, 101, (2, 7), generator=torch.Generator().manual_seed(11))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "task_names": ["spell", "date"]}


@pytest.fixture
def full(batch) -> dict:
    """The batch, its prompts the first three tokens."""
    prompt = (torch.arange(9) < 3) & batch["attention_mask"].bool()
    return {**batch, "prompt_mask": prompt}


def loss_of(model, inputs):
    out = model(**inputs)
    loss = out.logits.float().log_softmax(-1)[..., 5].mean()
    return loss + getattr(out, "auxiliary_loss", 0.0)


@ALL
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}],
    ids=["greedy", "beams"],
)
def test_cached_generation_is_exact(name, options, prompts):
    model = learned(name, torch.float64)
    given = {**prompts, "prompt_mask": prompts["attention_mask"].bool()}
    cached, anew = (
        model.generate(
            **given,
            max_new_tokens=6,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
            eos_token_id=None,
            **options,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, anew.sequences)
    for first, second in zip(cached.logits, anew.logits, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


@ALL
def test_training_reaches_every_parameter_of_the_router_and_nothing_else(name, full):
    model = learned(name).train()
    torch.manual_seed(0)
    loss_of(model, full).backward()
    for site, router in model.routers().items():
        for path, parameter in router.named_parameters():
            assert parameter.grad is not None, f"{site} {path}"
            assert parameter.grad.abs().sum() > 0, f"{site} {path}"
    routers = {id(p) for router in model.routers().values() for p in router.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in routers)


@ALL
def test_gradient_checkpointing_changes_no_gradient_and_no_state(name, full):
    plain, checkpointed = learned(name).train(), learned(name).train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        first = loss_of(model, full)
        (first + loss_of(model, full)).backward()  # two forwards before one backward
    for (site, one), two in zip(plain.routers().items(), checkpointed.routers().values(), strict=True):
        for (path, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=f"{site} {path}")
        for (path, a), b in zip(one.named_buffers(), two.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=f"{site} {path}")


@ALL
def test_padding_and_other_rows_change_nothing(name, full):
    model = learned(name, torch.float64)
    want = model(**full).logits
    left = {k: torch.nn.functional.pad(v, (4, 2)) for k, v in full.items() if isinstance(v, torch.Tensor)}
    positions = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
    got = model(**left, task_names=full["task_names"], position_ids=positions).logits[:, 4:-2]
    valid = full["attention_mask"].bool()
    torch.testing.assert_close(got[valid], want[valid], rtol=0, atol=1e-10)
    alone = model(**{k: v[:1] for k, v in full.items()}).logits
    torch.testing.assert_close(alone, want[:1], rtol=0, atol=1e-10)


@ALL
def test_a_copy_routes_alike(name, full):
    model = learned(name)
    want = model(**full).logits
    assert torch.equal(copy.deepcopy(model)(**full).logits, want)


# ---- attention
def test_attention_is_the_naive_sum_over_every_experts_output(full):
    """R12: every u_e [B, T, d] is made here, keys and values are taken of each."""
    model = learned("attention", torch.float64)
    layer = model.layers["model.layers.1.mlp.down_proj"]  # which the second expert lacks
    seen = {}
    layer.base.register_forward_hook(lambda _, args, out: seen.update(x=args[0], f=out))
    layer.register_forward_hook(lambda _, args, out: seen.update(y=out))
    model(**full)
    router, x, f = layer.router, seen["x"], seen["f"]
    u = torch.stack([w.scale * x @ w.A.T @ w.B.T for w in (layer.bank.weights(e) for e in (0, 2))], -2)
    q = f @ router.queries.weight.T + router.queries.bias
    a = torch.softmax(torch.einsum("btd,bted->bte", q, u @ router.keys.T), -1)
    want = f + torch.einsum("bte,bted->btd", a, u @ router.values.T)
    torch.testing.assert_close(seen["y"], want, rtol=0, atol=1e-12)


def test_the_regulariser_of_attention_is_in_the_loss_of_its_own_step(full):
    model = learned("attention").train()
    out = model(**full)
    drift = [r.values - torch.eye(len(r.values)) for r in model.routers().values()]
    want = 0.01 * sum(d.square().sum() for d in drift)
    torch.testing.assert_close(out.auxiliary_loss, want)
    torch.testing.assert_close(out.auxiliary_losses["value_reg"], want)
    out.auxiliary_loss.backward()
    for router, d in zip(model.routers().values(), drift, strict=True):
        torch.testing.assert_close(router.values.grad, 0.02 * d.detach())
    assert not hasattr(model.eval()(**full), "auxiliary_loss")


def test_attention_starts_with_the_identity_as_its_value_map(full):
    model = llama()
    experts = equal_experts(model)
    plain = MultiExpertModel(model, experts, AttentionConfig(value=False), tasks=TASKS).eval()
    want, routers = plain(**full).logits, plain.routers()
    mapped = MultiExpertModel(plain.unload(), experts, AttentionConfig(), tasks=TASKS).eval()
    for site, router in mapped.routers().items():
        router.load_state_dict({**routers[site].state_dict(), "values": router.values})
    torch.testing.assert_close(mapped(**full).logits, want)


# ---- SMEAR
@pytest.mark.parametrize("name", ["smear", "poly"])
def test_mixed_parameters_are_those_of_a_plain_model_per_example(name, full):
    """R4: the weights of each example, averaged by hand into one adapter, added to the backbone's matrices."""
    model = learned(name, torch.float64)
    want, routings = model(**full).logits, {}
    for site, layer in model.layers.items():
        layer.router.register_forward_hook(lambda _, args, out, site=site: routings.update({site: out}))
    for row in range(2):
        one = {k: v[row : row + 1] for k, v in full.items()}
        model(**one)
        plain = llama(torch.float64)
        for site, layer in model.layers.items():
            w = routings[site].dense(3)[0, 0]
            present = [(w[e], layer.bank.weights(e)) for e in layer.bank.present]
            A, B = sum(g * one.A for g, one in present), sum(g * one.scale * one.B for g, one in present)
            plain.get_submodule(site).weight.data += B @ A
        got = plain(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
        valid = one["attention_mask"].bool()
        torch.testing.assert_close(got[valid], want[row : row + 1][valid], rtol=0, atol=1e-9)


def test_the_routing_of_the_prompt_stays_while_generating(prompts):
    model = learned("smear", torch.float64)
    seen = []
    router = next(iter(model.routers().values()))
    router.register_forward_hook(lambda _, args, out: seen.append(out.weights))
    tokens = model.generate(**prompts, max_new_tokens=5, eos_token_id=None)
    assert len(seen) == 1
    mask = torch.nn.functional.pad(prompts["attention_mask"], (0, 5), value=1)
    prompt = torch.nn.functional.pad(prompts["attention_mask"], (0, 5))
    model(input_ids=tokens, attention_mask=mask, prompt_mask=prompt, task_names=["spell", "date"])
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-12)


def test_a_decoder_refuses_routers_that_read_ahead_and_encoders_that_it_does_not_have():
    for config, says in [
        (SmearConfig(pool="full"), "would read later tokens"),
        (SmearConfig(pool="full", source="encoder"), "has no encoder"),
    ]:
        model = llama()
        with pytest.raises(ValueError, match=says):
            MultiExpertModel(model, equal_experts(model), config, tasks=TASKS)


def test_a_forward_without_a_prompt_is_refused(batch):
    with pytest.raises(ValueError, match="router=smear needs prompt_mask"):
        learned("smear")(**batch)


# ---- poly
def test_blocks_that_do_not_divide_a_module_are_refused():
    model = llama()
    with pytest.raises(ValueError, match=r"num_splits=3 .* those of model.layers.0.self_attn.q_proj are \(32, 32\)"):
        MultiExpertModel(model, equal_experts(model), PolyConfig(num_splits=3), tasks=TASKS)


def test_unequal_ranks_are_refused_where_parameters_are_mixed():
    model = llama()
    experts = equal_experts(model) | {"dates": equal_experts(model, rank=2)["dates"]}
    with pytest.raises(ValueError, match="combine=outputs"):
        MultiExpertModel(model, experts, PolyConfig(), tasks=TASKS)


# ---- static
def test_one_hot_static_weights_are_the_expert_alone_and_base_is_the_backbone(full):
    model = llama(torch.float64)
    config = StaticConfig(normalise="softmax", num_groups=None, site="module")
    built = MultiExpertModel(model, equal_experts(model, torch.float64), config, tasks=TASKS).eval()
    built.router.double()
    built.router.theta.data[:, 2] = 1e4
    alone = dict.fromkeys(["dates"], 1.0)
    with built.fixed_routing(alone):
        want = built(**full).logits
    assert torch.equal(built(**full).logits, want)
    built.router.base.data.fill_(1e6)
    with built.experts_off():
        assert torch.equal(built(**full).logits, built(**full).logits)
        backbone = built(**full).logits
    torch.testing.assert_close(built(**full).logits, backbone, rtol=0, atol=1e-12)


def test_static_weights_learn_which_expert_helps(full):
    """Labels are what the third expert alone says most likely: its weight grows, the others' fall."""
    model = llama()
    built = MultiExpertModel(model, equal_experts(model), StaticConfig(), tasks=TASKS)
    with built.fixed_routing({"dates": 1.0}), torch.no_grad():
        labels = built(**full).logits.argmax(-1)
    optimizer = torch.optim.Adam(built.router.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(built(**full).logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
    (weights,) = built.router.weights_by_group().values()
    assert weights["dates"] > 0.7
    assert max(weights["sums"], weights["words"], weights["base"]) < 0.25


# ---- what every mixture does, with routers that keep more than a matrix
@ALL
def test_saved_and_loaded_logits_are_equal_bit_for_bit(name, tmp_path, full):
    model = learned(name)
    for router in model.routers().values():  # what training remembers beside its parameters
        for key, buffer in router.state_dict().items():
            if key in ("center", "norm.mean"):
                buffer.normal_()
    whole = Backbone(model.backbone, None, "tests/llama", None, shapes_digest(llama()))
    save_mixture(model, tmp_path / "mixture", whole)
    fresh = load_mixture(tmp_path / "mixture", Backbone(llama(), None, "tests/llama", None, whole.shapes))
    with torch.no_grad():
        assert torch.equal(model(**full).logits, fresh(**full).logits)
    for site, router in fresh.routers().items():
        old = model.routers()[site].state_dict()
        assert all(torch.equal(tensor, old[key]) for key, tensor in router.state_dict().items())


@ALL
def test_the_order_of_the_experts_changes_nothing(name, full):
    """C6: experts in another order, and the router's rows with them."""
    model = learned(name, torch.float64)
    want = model(**full).logits
    routers = dict(model.routers())
    backbone = model.unload()
    experts = equal_experts(backbone, torch.float64)
    turned = {expert: experts[expert] for expert in ("dates", "sums", "words")}
    other = MultiExpertModel(backbone, turned, LEARNED[name], tasks=TASKS).eval()
    for site, router in other.routers().items():
        router.double().carry(routers[site])
    valid = full["attention_mask"].bool()  # a padding token is a zero vector, and its cosines are ties
    torch.testing.assert_close(other(**full).logits[valid], want[valid], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in LEARNED if n not in ("sigmoid", "cat", "attention")])
def test_weights_of_one_in_all_mix_copies_of_an_expert_to_that_expert(name, full):
    """M3: every routing whose weights sum to 1, spent on copies of one expert, is that expert."""
    backbone = llama(torch.float64)
    one = expert(backbone, ["q_proj", "v_proj"], rank=4, alpha=4.0, seed=1, dtype=torch.float64)
    config = StaticConfig(include_base=False) if name == "static" else LEARNED[name]
    model = MultiExpertModel(backbone, dict.fromkeys(TASKS, one), config, tasks=TASKS).eval()
    for router in model.routers().values():
        router.double()
    with model.fixed_routing({"sums": 1.0}):
        want = model(**full).logits
    torch.testing.assert_close(model(**full).logits, want, rtol=0, atol=1e-9)


@ALL
def test_two_threads_equal_one_after_the_other(name, full):
    model = learned(name)
    rows = [{k: v[i : i + 1] for k, v in full.items()} for i in (0, 1)] * 3
    with torch.no_grad():
        want = [model(**row).logits for row in rows]
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(lambda row: model(**row).logits, rows))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@ALL
def test_forward_and_generate_change_no_flag_and_no_state(name, full, prompts):
    model = learned(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()]
    model(**full)
    model.generate(**prompts, max_new_tokens=2)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()] == flags


# ---- what they say of themselves
def test_routers_of_layers_are_averaged_and_named_one_by_one():
    model = learned("poly")
    said, routers = own_statistics(model), model.routers()
    values = [float(router.skills()["discreteness"].mean()) for router in routers.values()]
    assert said["router/discreteness"] == pytest.approx(sum(values) / len(values))
    first = next(iter(routers))
    assert said[f"router/{first}/discreteness"] == pytest.approx(values[0])
    assert said["router/tasks/effective_skills"].keys() == set(routers[first].tasks)
    assert own_statistics(learned("rkhs")) == {}


def test_static_weights_are_told_by_group():
    said = own_statistics(learned("cat"))
    assert len(said) == len(learned("cat").sites)
    assert all(set(weights) == set(TASKS) for weights in said.values())
    (one,) = own_statistics(learned("static")).values()
    assert sum(one.values()) == pytest.approx(1.0)
