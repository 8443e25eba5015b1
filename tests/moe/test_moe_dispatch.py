"""What is dispatched where, and what comes back: back-ends against the reference, gradients included."""

import pytest
import torch
from moe_cases import DIM, block, inputs, mlp, mlps, with_backend
from torch import nn

from mole.moe import MoEBlock
from mole.moe.dispatch import BACKENDS, register_grouped

FAST = sorted(set(BACKENDS) - {"reference"})


def outcome(moe, x, backend):
    """Output, gradients of x and of every parameter."""
    with_backend(moe, backend).zero_grad()
    x = x.clone().requires_grad_()
    y = moe(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in moe.parameters())]


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("backend", FAST)
def test_back_ends_agree_with_the_reference_gradients_included(backend, experts):
    moe, x = block(experts, k=min(2, experts)), inputs(2, 9, DIM)
    wanted = outcome(moe, x, "reference")
    found = outcome(moe, x, backend)
    assert moe.backend_used == backend
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_experts_that_nobody_chose_have_gradients_of_zero(backend):
    moe = with_backend(block(6, k=1), backend)
    moe.router.weight.data.zero_()
    moe.router.weight.data[2] = inputs(DIM)
    x = inputs(1, 20, DIM)
    x = x * torch.sign(x @ moe.router.weight[2])[..., None]  # all tokens like expert 2 best
    moe(x).sum().backward()
    assert int(moe.abs_experts_load()[2]) == 20
    for index, expert in enumerate(moe.experts):
        for parameter in expert.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == (index == 2)


@pytest.mark.parametrize("backend", ["loop", "vmap", "grouped", "stacked"])
@pytest.mark.parametrize("options", [{"k": 1}, {"k": 3, "aggregation": "mean"}, {"k": 2, "router_norm_topk": True}])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "cosine"])
def test_identical_experts_with_gates_that_sum_to_one_are_one_expert(backend, options, score):
    if options["k"] == 1:
        options = {**options, "router_norm_topk": True, "router_straight_through": True}
    moe = block([mlp(0) for _ in range(4)], router_score=score, backend=backend, **options)
    x = inputs(2, 5, DIM)
    torch.testing.assert_close(moe(x), mlp(0)(x), atol=1e-6, rtol=1e-5)


def test_one_expert_with_one_slot_is_the_module_itself():
    moe, x = block(1), inputs(2, 5, DIM)
    torch.testing.assert_close(moe(x), mlp(0)(x), atol=1e-6, rtol=0)


def test_all_experts_in_all_slots_are_weighted_with_their_probabilities():
    moe, x = block(4, k=4), inputs(2, 5, DIM)
    p = torch.softmax(x @ moe.router.weight.T, dim=-1)
    wanted = sum(p[..., e, None] * expert(x) for e, expert in enumerate(moe.experts))
    torch.testing.assert_close(moe(x), wanted, atol=1e-6, rtol=1e-5)


def test_the_mean_over_all_experts_with_equal_scores_is_their_arithmetic_mean():
    moe, x = block(4, k=4, aggregation="mean"), inputs(2, 5, DIM)
    moe.router.weight.data.zero_()
    wanted = sum(expert(x) for expert in moe.experts) / 4
    torch.testing.assert_close(moe(x), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_permuting_tokens_permutes_the_output(backend):
    moe, x = block(5, k=2, backend=backend), inputs(1, 12, DIM)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(moe(x[:, order]), moe(x)[:, order], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["top_k", "expert_choice", "soft"])
def test_samples_do_not_see_each_other(name):
    moe = block(4, router_name=name)
    a, b = inputs(2, 6, DIM), inputs(3, 6, DIM, seed=1)
    torch.testing.assert_close(moe(torch.cat([a, b])), torch.cat([moe(a), moe(b)]), atol=1e-6, rtol=1e-5)


def test_another_order_of_experts_changes_nothing():
    one, order = block(4, k=2), [2, 0, 3, 1]
    other = block([one.experts[place] for place in order], k=2)
    other.router.weight.data = one.router.weight.data[order]
    x = inputs(2, 7, DIM)
    torch.testing.assert_close(one(x), other(x), atol=1e-6, rtol=1e-5)
    assert torch.equal(one.abs_experts_load()[order], other.abs_experts_load())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    "shape", [(7, DIM), (2, 5, DIM), (2, 3, 4, DIM), (1, 1, DIM), (1, DIM), (0, 5, DIM), (2, 0, DIM)]
)
def test_inputs_of_every_rank_and_size(backend, shape):
    moe, x = block(3, backend=backend), inputs(*shape)
    y = moe(x)
    assert y.shape == x.shape
    flat = moe(x.reshape(-1, DIM))
    torch.testing.assert_close(y.reshape(-1, DIM), flat, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["loop", "vmap", "stacked", "reference"])
def test_gradients_are_right_in_float64(backend):
    experts = mlps(3, hidden=3, dim=4, out=2)
    moe = block(experts, k=2, backend=backend, router_norm_topk=True).double()
    names, parameters = zip(*moe.named_parameters(), strict=True)
    x = inputs(1, 5, 4, dtype=torch.float64).requires_grad_()

    def run(x, *values):
        return torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 13, 17])
def test_low_rank_experts_of_every_rank_through_grouped_products(rank, dtype):
    experts = [nn.Sequential(nn.Linear(DIM, rank, bias=False), nn.Linear(rank, 7)) for _ in range(3)]
    moe, x = block(experts, k=2).to(dtype), inputs(2, 6, DIM, dtype=dtype)
    wanted, found = outcome(moe, x, "reference"), outcome(moe, x, "grouped")
    for one, other in zip(found, wanted, strict=True):
        close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.05}
        torch.testing.assert_close(one, other, **close)


def test_an_expanded_gradient_goes_through_grouped_products():
    moe = block(3, backend="grouped")
    x = inputs(2, 6, DIM).requires_grad_()
    moe(x).sum().backward()
    wanted = x.grad.clone()
    x.grad = None
    with_backend(moe, "loop")(x).sum().backward()
    torch.testing.assert_close(x.grad, wanted, atol=1e-6, rtol=1e-5)


def test_experts_of_unequal_kind_work_together():
    experts = [nn.Linear(DIM, 5), nn.Sequential(nn.Linear(DIM, 30), nn.ReLU(), nn.Linear(30, 5)), nn.LazyLinear(5)]
    experts[2](torch.zeros(1, DIM))
    moe, x = block(experts, k=3, aggregation="mean"), inputs(2, 6, DIM)
    assert moe(x).shape == (2, 6, 5)
    assert moe.backend_used == "loop"
    with pytest.raises(ValueError, match="architectures differ"):
        block(experts, backend="vmap")


def test_a_class_whose_layers_mean_something_else_is_no_grouped_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.ReLU()

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x))) * 2

    moe, x = block([Twice() for _ in range(3)], k=2), inputs(1, 40, DIM)
    moe(x)
    assert moe.backend_used == "loop"
    moe = block([Twice() for _ in range(3)], backend="grouped")
    with pytest.raises(ValueError, match="something else"):
        moe(x)
    register_grouped(Twice, lambda layers, rows: layers.linear("fc2", layers.linear("fc1", rows).relu()) * 2)
    again = block([Twice() for _ in range(3)], k=2)
    wanted, found = outcome(again, x, "reference"), outcome(again, x, "grouped")
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_modules_of_transformers_go_through_grouped_products():
    from transformers import GPT2Config, LlamaConfig
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    llama = LlamaConfig(hidden_size=DIM, intermediate_size=20, num_attention_heads=2)
    gpt2 = GPT2Config(n_embd=DIM, resid_pdrop=0.0)
    for make in (lambda: LlamaMLP(llama), lambda: GPT2MLP(20, gpt2)):
        moe, x = block([make() for _ in range(3)], k=2), inputs(2, 6, DIM)
        for backend in ("grouped", "stacked", "vmap"):
            for one, other in zip(outcome(moe, x, backend), outcome(moe, x, "reference"), strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_back_ends_that_cannot_run_the_experts_say_why():
    with pytest.raises(ValueError, match="dtype float64"):
        block([expert.double() for expert in mlps(2)], backend="grouped")
    deep = nn.Sequential(*(nn.Linear(DIM, DIM) for _ in range(3)))
    moe = block([deep], backend="stacked")
    with pytest.raises(ValueError, match="third linear level"):
        moe(inputs(1, 4, DIM))
    with pytest.raises(ValueError, match="not supported"):
        block([nn.Sequential(nn.Linear(DIM, DIM), nn.PReLU())], backend="grouped")

    class Own(MoEBlock):
        def expert_forward(self, expert, x):
            return expert(x) + x

    with pytest.raises(ValueError, match="expert_forward is overridden"):
        Own(mlps(2), backend="grouped")
    own = Own(mlps(2), backend="vmap", noise=None, k=2)
    x = inputs(1, 9, DIM)
    for one, other in zip(outcome(own, x, "vmap"), outcome(own, x, "reference"), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_auto_goes_by_what_it_knows():
    small = block(16, k=2)
    small(inputs(1, 64, DIM))
    assert small.backend_used == "grouped"
    small(inputs(1, 4, DIM))
    assert small.backend_used == "loop"  # fewer slots than experts
    low = block([nn.Sequential(nn.Linear(64, 2), nn.Linear(2, 64)) for _ in range(4)])
    low(inputs(1, 64, 64))
    assert low.backend_used == "stacked"
    double = block(16, k=2).double()
    double(inputs(1, 64, DIM, dtype=torch.float64))
    assert double.backend_used == "loop"


def test_an_edit_of_an_expert_is_seen_by_the_next_forward():
    for backend in FAST:
        moe, x = block(2, backend=backend), inputs(1, 6, DIM)
        before = moe(x)
        with torch.no_grad():
            for expert in moe.experts:
                for parameter in expert.parameters():
                    parameter.zero_()
        assert before.any()
        assert not moe(x).any()


def test_dropout_inside_experts_works_in_every_back_end():
    for backend in FAST:
        experts = [nn.Sequential(nn.Linear(DIM, 64), nn.Dropout(0.5), nn.Linear(64, DIM)) for _ in range(2)]
        moe, x = block(experts, backend=backend), inputs(1, 6, DIM)
        assert not torch.equal(moe(x), moe(x))
        moe.eval()
        assert torch.equal(moe(x), moe(x))


def test_an_output_that_does_not_fit_names_the_expert():
    class Bad(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.out, self.weight = out, nn.Parameter(torch.zeros(DIM))

        def forward(self, x):
            return self.out(x)

    for out, said in ((lambda x: (x, x), "tuple"), (lambda x: x.sum(1), "leading dimensions")):
        moe = MoEBlock([Bad(out), Bad(out)], input_dim=DIM, contract="zeros", noise=None)
        with pytest.raises(ValueError, match=rf"expert [01] \(Bad\).*{said}"):  # whichever is asked first
            moe(inputs(1, 3, DIM))
