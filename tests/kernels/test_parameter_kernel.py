"""Experts combined by their parameters: what that is, next to their outputs."""

import pytest
import torch
from kernel_cases import Largest, gradients, problem

from mole.kernels import loop, over_all, parameters
from mole.kernels.parameters import check_blocks

SHAPES = [(2, 5), (1, 1), (2, 1), (1, 5)]
BLOCKS = [None, 1, 2]


def case(shape, blocks=None, chosen=None, ranks=(3, 3, 3), **sizes):
    """Weights of `blocks` blocks of the features; ids where `chosen`."""
    p = problem(ranks, shape, chosen, **{"d_in": 8, "d_out": 6, **sizes})
    if blocks is None:
        return p
    generator = torch.Generator().manual_seed(blocks)
    count = chosen or len(ranks)
    weights = torch.randn(*shape, blocks, count, generator=generator, dtype=torch.float64)
    ids = None if chosen is None else torch.randint(-1, len(ranks), weights.shape, generator=generator)
    return p._replace(weights=weights, ids=ids)


def matrix_per_token(p):
    """The mixed factors of each token, made, and spent on it."""
    stack, n = p.stack, p.stack.num_experts
    weights = over_all(p.weights, p.ids, n)
    weights = weights if weights.dim() == 4 else weights[:, :, None]
    weights = weights.expand(*p.x.shape[:2], -1, -1)
    A, B = stack.blocks()
    out = torch.zeros(*p.x.shape[:2], stack.B.shape[0], dtype=torch.float64)
    for b in range(p.x.shape[0]):
        for t in range(p.x.shape[1]):
            rows = []
            for factors, scales in ((A, torch.ones(n)), (B, stack.scales)):
                parts = factors.unflatten(-1, (weights.shape[2], -1))
                rows.append(torch.einsum("qn,nrqd->rqd", weights[b, t] * scales, parts).flatten(1))
            out[b, t] = p.x[b, t] @ rows[0].T @ rows[1]
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda q: f"Q{q}")
@pytest.mark.parametrize("chosen", [None, 2], ids=["all", "two"])
def test_parameters_are_mixed_then_spent(shape, blocks, chosen):
    p = case(shape, blocks, chosen)
    want = matrix_per_token(p)
    assert (parameters(p.x, p.stack, p.weights, None, p.ids) - want).abs().max() < 1e-12
    assert (p.run(parameters) - p.base_out - want).abs().max() < 1e-12
    low = p.to(torch.float32)
    assert (low.run(parameters).double() - p.base_out - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda q: f"Q{q}")
def test_gradients_equal_finite_differences(shape, blocks):
    p = case((shape[0], min(2, shape[1])), blocks, ranks=(2, 2), length=2, d_in=4, d_out=2)
    assert torch.autograd.gradcheck(lambda *tensors: p.of(*tensors).run(parameters), p.leaves().tensors())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_gradients_are_those_of_float64_up_to_rounding(shape):
    p = case(shape)
    for mine, want in zip(gradients(p.to(torch.bfloat16), parameters), gradients(p, parameters), strict=True):
        assert (mine.double() - want).abs().max() <= 6e-2 * want.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_expert_alone_is_that_expert(shape):
    p = case(shape)
    ids = torch.full((*shape, 1), 1)
    weights = torch.ones(*shape, 1, dtype=torch.float64)
    assert torch.allclose(parameters(p.x, p.stack, weights, None, ids), loop(p.x, p.stack, weights, None, ids))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_are_linear_in_the_weights_and_parameters_quadratic(shape):
    p = case(shape)
    for kernel, factor in ((loop, 3.0), (parameters, 9.0)):
        once, thrice = (kernel(p.x, p.stack, c * p.weights) for c in (1.0, 3.0))
        assert torch.allclose(thrice, factor * once)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_identical_experts_are_the_expert_either_way(shape):
    p = case(shape)
    A, B, scales = p.stack.A[:3].repeat(3, 1), p.stack.B[:, :3].repeat(1, 3), p.stack.scales[:1].expand(3)
    same = p.stack._replace(A=A, B=B, scales=scales)
    weights = p.weights.softmax(-1)
    one = torch.eye(3, dtype=torch.float64)[0].expand_as(weights)
    alone = loop(p.x, same, one)
    for kernel in (loop, parameters):
        assert torch.allclose(kernel(p.x, same, weights), alone)


def test_the_two_differ_by_half_the_weighted_covariance_of_the_factors():
    """ΔW_parameters = ΔW_outputs − ½ Σ_ef w_e w_f (s_e B_e − s_f B_f)(A_e − A_f) for Σ w = 1."""
    p = case((1, 1), batch=1, length=8)
    x = torch.eye(8, dtype=torch.float64)[None]
    weights = p.weights.softmax(-1)
    by_outputs, by_parameters = (kernel(x, p.stack, weights)[0].T for kernel in (loop, parameters))
    A, B = p.stack.blocks()
    w, scaled = weights.flatten(), B * p.stack.scales[:, None, None]
    share = torch.zeros_like(by_outputs)
    for e in range(3):
        for f in range(3):
            share += w[e] * w[f] * (scaled[e] - scaled[f]).T @ (A[e] - A[f])
    assert (by_parameters - (by_outputs - share / 2)).abs().max() < 1e-13
    assert share.norm() > 0.1 * by_outputs.norm()


def test_other_factors_of_the_same_expert_change_parameters_and_not_outputs():
    p = case((1, 1))
    generator = torch.Generator().manual_seed(1)
    M = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    A, B = p.stack.A.clone(), p.stack.B.clone()
    A[:3], B[:, :3] = M @ A[:3], B[:, :3] @ torch.linalg.inv(M)
    turned = p.stack._replace(A=A, B=B)
    weights = p.weights.softmax(-1)
    assert torch.allclose(loop(p.x, p.stack, weights), loop(p.x, turned, weights))
    before, after = (parameters(p.x, stack, weights) for stack in (p.stack, turned))
    assert (before - after).norm() > 0.05 * before.norm()


def test_weights_of_tokens_make_no_matrix_per_token():
    p = case((2, 64), ranks=(4,) * 6, length=64, d_in=64, d_out=64).leaves()
    with Largest() as seen:
        p.run(parameters).sum().backward()
    assert seen.numbers <= max(2 * 64 * 64, 6 * 4 * 64, 2 * 64 * 6 * 4)  # x, the factors, [B, T, n, r]


def test_weights_of_tokens_keep_x_and_the_weights_only():
    p = case((2, 5)).leaves()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        parameters(p.x, p.stack, p.weights)
    assert sorted(s for s in kept if s[:2] == (2, 5)) == [(2, 5, 3), (2, 5, 8)]


def test_unequal_ranks_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="experts of one rank, here are 1, 2, 5: use combine=outputs"):
        problem((2, 1, 5)).run(parameters)


def test_blocks_divide_the_features():
    with pytest.raises(ValueError, match="8 → 6 features cannot be split into 4 blocks"):
        case((2, 1), blocks=4).run(parameters)
    check_blocks(2, 8, 6)


def test_second_derivative_of_weights_of_tokens_is_an_error():
    p = case((2, 5)).leaves()
    (first,) = torch.autograd.grad(p.run(parameters).square().sum(), p.weights, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        first.sum().backward()
