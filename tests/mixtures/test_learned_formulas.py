"""Learned routers in whole models against the formulas, and what they say of themselves."""

import pytest
import torch
from learned_cases import equal_experts, full_inputs, learned, left_padded
from mixture_cases import TASKS, llama

from mole.mixtures import MultiExpertModel, own_statistics
from mole.routers import AttentionConfig, PolyConfig, SmearConfig, StaticConfig


@pytest.fixture
def prompts() -> dict:
    return left_padded()


@pytest.fixture
def full(batch) -> dict:
    return full_inputs(batch)


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
