"""The stacked kernel: what it keeps for its backward, what it computes, few tokens and many."""

from itertools import product

import pytest
import torch
from kernel_cases import gradients, problem
from torch.utils._python_dispatch import TorchDispatchMode

from mole.kernels import loop, stacked


class Matmuls(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 2)], ids=str)
def test_gradients_equal_the_loops_whoever_wants_one(ranks):
    p = problem(ranks)
    for wanted in list(product([False, True], repeat=5))[1:]:
        for mine, want in zip(gradients(p, stacked, wanted), gradients(p, loop, wanted), strict=True):
            assert (mine is None) == (want is None)
            if want is not None:
                assert (mine - want).abs().max() <= 1e-10 * want.abs().max()


@pytest.mark.parametrize(("ranks", "kept_width"), [((1, 2), 3), ((4, 4), 7)], ids=str)
def test_frozen_experts_keep_the_hidden_state_or_the_input_for_the_backward_and_no_more(ranks, kept_width):
    p = problem(ranks)
    p.x.requires_grad_()
    p.weights.requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (p.stack.A, p.stack.B, p.stack.scales, p.weights)}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        p.run(stacked)
    assert kept == ([(2, 5, kept_width)] if len(set(ranks)) == 1 else [(2, 5, kept_width), (sum(ranks),)])


def test_nothing_is_kept_where_only_the_input_has_a_gradient():
    p = problem((3,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stacked(p.x.requires_grad_(), p.stack, p.weights)
    assert {tuple(t.shape) for t in kept} == {(3, 7), (6, 3), (2, 5, 1), (1,)}  # A, B, weights, scales: no h, no x


def test_a_gradient_that_nobody_wants_is_not_computed():
    """Forward: two products. Backward: dy B, and one more for each of x, A, B; h once more if x was kept for it."""
    counts = {}
    for wanted in ("w", "xw", "xABw"):
        p = problem((1, 1))
        for name, tensor in zip("xABw", p.tensors()[:4], strict=True):
            tensor.requires_grad_(name in wanted)
        with Matmuls() as found:
            stacked(p.x, p.stack, p.weights).sum().backward()
        counts[wanted] = found.count
    assert counts == {"w": 3, "xw": 4, "xABw": 7}


def test_checkpointing_changes_no_gradient():
    p = problem((2, 3))
    found = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)):
        w = p.weights.clone().requires_grad_()
        first, second = (wrap(lambda w, x=x: stacked(x, p.stack, w), w) for x in (p.x, 2 * p.x))
        (first.square().sum() + second.sum()).backward()
        found.append(w.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 5, 2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 40), (1, 1), (2, 1)], ids=str)
def test_many_tokens_and_few_give_the_same_without_gradients(ranks, shape):
    p = problem(ranks, shape, length=40)
    whole = p.run(stacked)
    weights = p.weights.expand(2, 40, -1)
    for t in range(40):
        part = stacked(p.x[:, t, None], p.stack, weights[:, t, None], p.base_out[:, t, None])
        assert (whole[:, t, None] - part).abs().max() < 1e-12


def test_loop_drops_a_mask_of_its_own_for_each_expert():
    p = problem((3, 3), (1, 1), length=400, d_in=1)
    ones = p.stack._replace(A=torch.ones(6, 1).double(), B=torch.eye(6).double(), scales=torch.ones(2).double())
    torch.manual_seed(0)
    x, weights = torch.ones(1, 400, 1).double(), torch.ones(1, 400, 2).double()
    out = loop(x, ones, weights, dropout=(0.5, 0.0))
    first, second = out[0, :, 0], out[0, :, 3]
    assert set(first.tolist()) == {0.0, 2.0}
    assert 120 < int((first == 0).sum()) < 280
    assert set(second.tolist()) == {1.0}
