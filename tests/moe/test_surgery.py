"""Surgery: what it makes of a model, what it refuses, and that the way back is exact."""

import copy
import io

import pytest
import torch
from surgery_cases import MLPS, TwoBranches, batch, llama
from torch import nn

from mole.moe import CapacityConfig, MoEBlock, MoEConfig, MoERouterConfig, moefy, unmoefy
from mole.moe.surgery import surgery_of


def logits(model, **given):
    with torch.no_grad():
        return model(**(given or batch())).logits


def close(one, other):
    return (one - other).abs().max() <= 1e-6 * other.abs().max()


def blocks(model):
    return [module for module in model.modules() if isinstance(module, MoEBlock)]


def test_the_way_there_and_back_is_bit_equal_with_the_same_keys_and_objects():
    model = llama()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    wanted = logits(model)
    moefy(model, MLPS, num_experts=3)
    assert not torch.equal(logits(model), wanted)
    unmoefy(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(module is modules[name] for name, module in model.named_modules())
    assert torch.equal(logits(model), wanted)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    with pytest.raises(ValueError, match="has no blocks that moefy made"):
        unmoefy(model)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "cosine"])
def test_equal_experts_with_gates_that_sum_to_one_are_the_dense_model(k, score):
    model = llama()
    wanted = logits(model)
    config = MoEConfig(k=k, aggregation="mean", router=MoERouterConfig(score=score, noise=None))
    report = moefy(model, MLPS, num_experts=4, init_noise=0.0, config=config)
    assert close(logits(model), wanted)
    assert report.equals_dense
    assert "computes what the dense one does" in str(report)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"aggregation": "sum"}, "gates are not normalised"),
        ({"init_noise": 0.01}, "init_noise=0.01"),
        ({"hole": True}, "null experts"),
        ({"config": MoEConfig(aggregation="mean", capacity=CapacityConfig(factor=0.5, minimum=1))}, "capacity.factor"),
        ({"config": MoEConfig(aggregation="mean", shared_experts=1)}, "shared experts"),
        ({"init": "fresh"}, "init=fresh"),
    ],
)
def test_the_report_says_why_the_model_is_not_the_dense_one(settings, reason):
    model = llama()
    wanted = logits(model)
    report = moefy(model, MLPS, num_experts=2, **{"init_noise": 0.0, **settings})
    assert not report.equals_dense
    assert any(reason in said for said in report.changes)
    assert not close(logits(model), wanted)


def test_the_report_counts_parameters():
    model = llama()
    mlp = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    report = moefy(model, MLPS, num_experts=4, k=2, noise=None)
    router = 4 * 16
    assert [(row.before, row.after, row.active) for row in report.rows] == [
        (mlp, 4 * mlp + router, 2 * mlp + router)
    ] * 2
    assert report.names == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert report.total("after") == 2 * (4 * mlp + router)


def test_expert_0_is_the_module_and_the_others_lie_around_it():
    model = llama()
    mlp = model.model.layers[0].mlp
    weight = mlp.up_proj.weight.detach().clone()
    state = torch.get_rng_state()
    moefy(model, MLPS, num_experts=3, init_noise=0.1, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    experts = model.model.layers[0].mlp.experts
    assert experts[0] is mlp
    assert torch.equal(experts[0].up_proj.weight, weight)
    for expert in experts[1:]:
        noise = (expert.up_proj.weight.detach() - weight) / weight.std(correction=0)
        assert 0.07 < float(noise.std()) < 0.13
    again = llama()
    moefy(again, MLPS, num_experts=3, init_noise=0.1, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = llama()
    moefy(other, MLPS, num_experts=3, init_noise=0.1, seed=6)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_patterns_are_whole_names_lists_or_predicates():
    one = moefy(llama(), [r"model\.layers\.0\.mlp", r"model\.layers\.1\.mlp\.up_proj"], num_experts=2)
    assert one.names == ["model.layers.0.mlp", "model.layers.1.mlp.up_proj"]
    two = moefy(llama(), lambda name, module: isinstance(module, nn.Linear) and "gate" in name, num_experts=2)
    assert two.names == ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"]


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        (r"model\.layer\.\d+\.mlp", r"matches no module; did you mean model.layers.0.mlp"),
        (r"model\.layers\.0\.mlp(\..*)?", "matches model.layers.0.mlp and model.layers.0.mlp.gate_proj inside it"),
        (r"model\.layers\.0\.self_attn", r"a LlamaAttention cannot be an expert.*self_attn.q_proj"),
        (r"model\.layers\.0\.input_layernorm", "no linear layer that says how many features it takes: give input_dim"),
    ],
)
def test_what_cannot_become_experts_is_refused_with_nothing_changed(pattern, told):
    model = llama()
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match=told):
        moefy(model, pattern, num_experts=2)
    assert list(model.named_modules()) == modules
    assert not model._forward_pre_hooks


def test_a_module_that_gives_no_tensor_is_refused():
    model = nn.Sequential(nn.LSTM(6, 6, batch_first=True))
    with pytest.raises(ValueError, match="it gives a tuple, not a tensor"):
        moefy(model, "0", num_experts=2, input_dim=6)


def test_settings_that_do_not_fit_leave_the_model_as_it_was():
    model = llama()
    for settings, told in [
        ({}, "num_experts is missing"),
        ({"num_experts": 2, "k": 3}, "k=3: valid are 1 … 2"),
        ({"num_experts": 2, "init": "clone"}, "init='clone': known are"),
        ({"num_experts": 2, "config": MoEConfig(), "k": 1}, "config and k are both given"),
        ({"num_experts": 2, "config": MoEConfig(num_experts=3)}, "num_experts=2 here and 3 in config"),
        ({"num_experts": 2, "expert_choice": True}, "lets a token's output depend on later tokens"),
        ({"num_experts": 3, "init": [llama()]}, "1 models beside this make 2 experts, not 3"),
        ({"num_experts": 2, "nosie": None}, "unknown option 'nosie'; did you mean noise"),
        ({"num_experts": 2, "drop_order": "position"}, "give a whole MoEConfig"),
        ({"num_experts": 2, "hole": True, "null_experts": ("zero",)}, "give one of them"),
        ({"num_experts": 2, "score": "sigmoid", "noise": "gumbel"}, "samples from a softmax"),
        ({"num_experts": 2, "slots": 2}, "is of router.name=soft, not top_k"),
        ({"num_experts": 2, "proj_dim": 8}, "is of router.score=cosine"),
        ({"num_experts": 2, "config": MoEConfig(k=9)}, "^k=9: valid are 1 … 2"),
        ({"num_experts": 2, "k": 9, "score": "softmin"}, "^score='softmin': valid is .*; k=9: valid are 1 … 2"),
    ]:
        with pytest.raises(ValueError, match=told):
            moefy(model, MLPS, **settings)
    assert not blocks(model)


def test_every_setting_can_be_given_by_its_name_and_acts():
    model = llama()
    options = {"null_experts": ("zero",), "score": "sigmoid", "bias_rate": 1e-3, "losses": {}, "aggregation": "sum"}
    moefy(model, MLPS, num_experts=3, shared_experts=1, expert_dropout=0.9, noise=None, **options)
    for block in blocks(model):
        assert (len(block.experts), len(block.shared), block.config.expert_dropout) == (3, 1, 0.9)
        assert (block.config.router.score, block.config.null_experts, block.coefficients) == ("sigmoid", ("zero",), {})
        assert block.router.bias.shape == (3,)
    ahead = llama()
    moefy(ahead, MLPS, num_experts=2, expert_choice=True, allow_noncausal=True)
    assert ahead(**batch()).logits.isfinite().all()


def test_what_is_no_regular_expression_is_refused():
    with pytest.raises(ValueError, match=r"'\*mlp' is no regular expression"):
        moefy(llama(), "*mlp", num_experts=2)


def test_wrapping_twice_is_refused_and_another_pattern_is_not():
    model = llama()
    wanted = logits(model)
    moefy(model, r"model\.layers\.0\.mlp", num_experts=2)
    for pattern in (r"model\.layers\.0\.mlp", r"model\.layers\.0\.mlp\.experts\.1\.up_proj", r"model\.layers\.0"):
        with pytest.raises(ValueError, match="is a mixture of experts already"):
            moefy(model, pattern, num_experts=2)
    moefy(model, r"model\.layers\.1\.mlp", num_experts=3)
    assert [len(block.experts) for block in blocks(model)] == [2, 3]
    assert len(model._forward_pre_hooks) == 1
    unmoefy(model)
    assert torch.equal(logits(model), wanted)


def test_one_module_under_two_names_is_one_block_under_both():
    model = TwoBranches()
    x = torch.randn(2, 5, 6)
    wanted = model(x)
    report = moefy(model, "right|other", num_experts=2, init_noise=0.0)
    assert [row.names for row in report.rows] == [("left", "right"), ("other",)]
    assert model.left is model.right
    assert isinstance(model.left, MoEBlock)
    assert close(model(x), wanted)
    unmoefy(model)
    assert model.left is model.right
    assert torch.equal(model(x), wanted)


def test_fresh_experts_start_anew_each_with_other_weights():
    model = llama()
    mlp = model.model.layers[0].mlp
    moefy(model, MLPS, num_experts=2, init="fresh")
    first, second = model.model.layers[0].mlp.experts
    assert mlp not in (first, second)
    assert not torch.equal(first.up_proj.weight, second.up_proj.weight)
    assert not torch.equal(first.up_proj.weight, mlp.up_proj.weight)
    unmoefy(model)
    assert model.model.layers[0].mlp is mlp


def test_what_cannot_start_anew_is_named():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.inner = Bare()

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    with pytest.raises(ValueError, match="inner, a Bare, has parameters but no reset_parameters"):
        moefy(nn.Sequential(Scaled()), "0", num_experts=2, init="fresh")


def test_other_models_modules_become_experts():
    model, others = llama(), [llama(1), llama(2)]
    report = moefy(model, MLPS, init=others)
    experts = model.model.layers[1].mlp.experts
    assert len(experts) == 3
    for expert, other in zip(experts[1:], others, strict=True):
        assert expert is not other.model.layers[1].mlp
        assert torch.equal(expert.up_proj.weight, other.model.layers[1].mlp.up_proj.weight)
    assert not report.equals_dense
    small = nn.ModuleDict({"a": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"a of model 0 does not fit: .* \(5, 4\)|a of model 0 does not fit: bias"):
        moefy(small, "a", init=[nn.ModuleDict({"a": nn.Linear(4, 5)})])
    with pytest.raises(ValueError, match="model 0 has no module a"):
        moefy(small, "a", init=[nn.ModuleDict({"b": nn.Linear(4, 4)})])


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    output = model(**batch())
    output.logits.square().mean().backward()
    optimizer.step()
    return model.eval()


def test_after_training_the_original_is_gone_unless_it_was_kept():
    model = llama()
    moefy(model, MLPS, num_experts=2, noise=None)
    trained(model)
    with pytest.raises(ValueError, match="its original was trained as expert 0.*keep_original=True"):
        unmoefy(model)
    assert len(blocks(model)) == 2
    kept = llama()
    mlps = [layer.mlp for layer in kept.model.layers]
    weights = [copy.deepcopy(mlp.state_dict()) for mlp in mlps]
    moefy(kept, MLPS, num_experts=2, noise=None, keep_original=True)
    trained(kept)
    unmoefy(kept)
    for layer, mlp, before in zip(kept.model.layers, mlps, weights, strict=True):
        assert layer.mlp is mlp
        assert all(torch.equal(tensor, before[name]) for name, tensor in mlp.state_dict().items())


def test_an_expert_or_the_mean_can_be_kept():
    model = llama()
    moefy(model, MLPS, num_experts=3, init_noise=0.5)
    experts = list(model.model.layers[0].mlp.experts)
    mean = torch.stack([expert.up_proj.weight for expert in experts]).double().mean(0).float()
    with pytest.raises(ValueError, match="keep=3: known are original, mean, and the experts 0 … 2"):
        unmoefy(model, keep=3)
    other = copy.deepcopy(model)
    unmoefy(model, keep=2)
    assert model.model.layers[0].mlp is experts[2]
    unmoefy(other, keep="mean")
    assert torch.allclose(other.model.layers[0].mlp.up_proj.weight, mean, atol=1e-7)


def test_what_the_model_was_stays():
    model = llama().double()
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    model.model.layers[0].mlp.requires_grad_(False)
    model.train()
    model.model.layers[1].mlp.eval()
    moefy(model, MLPS, num_experts=2)
    first, second = blocks(model)
    assert not any(p.requires_grad for p in first.experts.parameters())
    assert all(p.requires_grad for p in second.experts.parameters())
    assert all(p.dtype == torch.float64 for p in first.experts.parameters())
    assert (first.training, second.training) == (True, False)
    assert logits(model.eval()).dtype == torch.float64
    unmoefy(model)
    logits(model)
    assert len(seen) == 2


def test_copies_and_pickles_carry_the_surgery_along():
    model = llama()
    wanted = logits(model)
    moefy(model, MLPS, num_experts=2)
    made = logits(model)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other), made)
        assert surgery_of(other).root.context is blocks(other)[0].context
        assert surgery_of(other).root.context is not surgery_of(model).root.context
        unmoefy(other)
        assert torch.equal(logits(other), wanted)
    assert len(blocks(model)) == 2


def test_the_attention_mask_reaches_the_blocks_and_is_gone_afterwards():
    model = llama()
    moefy(model, MLPS, num_experts=3, k=2)
    given = batch(padded=4)
    logits(model, **given)
    tokens = int(given["attention_mask"].sum())
    for block in blocks(model):
        assert int(block.abs_experts_load().sum()) == 2 * tokens
    context = surgery_of(model).root.context
    assert context.current is None
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(input_ids=torch.full((1, 3), 1000))
    assert context.current is None


def test_padding_changes_no_other_token():
    model = llama()
    moefy(model, MLPS, num_experts=3, k=2)
    given = batch(padded=4)
    alone = {name: tensor[-1:, 4:] for name, tensor in given.items()}
    positions = (given["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    together = logits(model, **given, position_ids=positions)[-1, 4:]
    assert close(together, logits(model, **alone)[0])


def test_generation_with_a_cache_is_generation_without():
    model = llama()
    moefy(model, MLPS, num_experts=3)
    given = batch(padded=3)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**given, **options), model.generate(**given, **options, use_cache=False))


def test_images_go_through_blocks_of_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    x = torch.randn(4, 3, 6, 5)
    wanted = model(x)
    moefy(model, "2", num_experts=3, init_noise=0.0, route="images")
    assert close(model(x), wanted)
