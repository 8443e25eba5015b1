"""Every kernel equals the naive sum over batch, token and choice, in values and gradients: one table of cases."""

import pytest
import torch
from kernel_cases import RANKS, SERVED, TOLERANCES, Largest, gradients, naive, problem

from mole.kernels import KERNELS, check_kernel, loop

SOME = [case for case in SERVED if case.shape in ((2, 5), (2, 1), (1, 1)) and case.chosen in (None, 2)]
SOME += [case for case in SERVED if case.kernel == "segments"]


@pytest.mark.parametrize("case", SERVED, ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=lambda ranks: f"E{len(ranks)}")
def test_kernel_equals_the_naive_sum(case, ranks):
    exact = problem(ranks, case.shape, case.chosen, length=5 if case.shape[1] == 5 else 2)
    want = naive(exact)
    for dtype, tolerance in TOLERANCES.items():
        p = exact.to(dtype)
        out = KERNELS[case.kernel](p.x, p.stack, p.weights, None, p.ids)
        assert out.dtype == dtype
        assert out.shape == want.shape
        assert (out.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_kernel_adds_to_the_base_output_and_leaves_it_as_it_was(case):
    p = problem((1, 5, 17, 2), case.shape, case.chosen)
    want = naive(p) + p.base_out
    for base_out in (p.base_out, p.base_out.flatten(0, 1)):  # as rows of examples, or of tokens
        for records in (False, True):
            before = base_out.clone()
            q = p._replace(x=p.x.detach().requires_grad_(records), base_out=base_out)
            out = q.run(KERNELS[case.kernel])
            assert out.shape == base_out.shape
            assert torch.equal(base_out, before)
            assert (out.view(2, 5, 6) - want).abs().max() < 1e-12


@pytest.mark.parametrize("case", SOME, ids=str)
def test_result_has_the_dtype_of_the_base_output(case):
    p = problem((2, 3), case.shape, case.chosen).to(torch.bfloat16)
    base_out = torch.randn(2, 5, 6)
    out = p._replace(base_out=base_out).run(KERNELS[case.kernel])
    assert out.dtype == torch.float32
    want = naive(p) + base_out
    assert (out - want).abs().max() <= 2e-2 * want.abs().max()


@pytest.mark.parametrize("case", SERVED, ids=str)
@pytest.mark.parametrize("ranks", [(2, 1), (2, 2)], ids=str)
def test_kernel_gradients_equal_finite_differences(case, ranks):
    shape = (case.shape[0], min(2, case.shape[1]))
    p, kernel = problem(ranks, shape, case.chosen, length=2, d_in=3, d_out=2), KERNELS[case.kernel]
    assert torch.autograd.gradcheck(lambda *tensors: p.of(*tensors).run(kernel), p.leaves().tensors())
    assert torch.autograd.gradcheck(lambda x, w: kernel(x, p.stack, w, None, p.ids), [p.leaves().x, p.leaves().weights])


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_gradients_are_the_loops(case):
    exact = problem((4, 1, 3, 4), case.shape, case.chosen)
    want = gradients(exact, loop)
    for dtype, tolerance in {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}.items():
        p = exact.to(dtype)
        mine = gradients(p, KERNELS[case.kernel])
        assert [g.dtype for g in mine] == [t.dtype for t in p.tensors()]
        for m, w in zip(mine, want, strict=True):
            assert (m.double() - w).abs().max() <= tolerance * max(1e-3, w.abs().max())


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_an_expanded_gradient_is_taken(case):
    p = problem((4, 4), case.shape, case.chosen, d_in=8, d_out=8).to(torch.float32).leaves()
    p.run(KERNELS[case.kernel]).sum().backward()  # the gradient of a sum is one number, expanded
    want = gradients_of_the_sum(problem((4, 4), case.shape, case.chosen, d_in=8, d_out=8))
    assert (p.x.grad - want).abs().max() <= 1e-5 * want.abs().max()


def gradients_of_the_sum(p):
    x = p.x.clone().requires_grad_()
    p._replace(x=x).run(loop).sum().backward()
    return x.grad


@pytest.mark.parametrize("case", [case for case in SERVED if case.chosen], ids=str)
def test_experts_that_nobody_chose_get_a_gradient_of_zero(case):
    p = problem((2, 4, 3), case.shape, case.chosen).leaves()
    p = p._replace(ids=torch.ones_like(p.ids))
    p.run(KERNELS[case.kernel]).square().sum().backward()
    for gradient in (p.stack.A.grad, p.stack.B.grad.t()):
        assert (gradient.abs().sum(1) > 0).tolist() == [False] * 2 + [True] * 4 + [False] * 3


@pytest.mark.parametrize("case", SOME, ids=str)
def test_autocast_computes_in_its_dtype_and_gradients_come_back_in_float32(case):
    p = problem((2, 3), case.shape, case.chosen).to(torch.float32)
    p = p._replace(base_out=torch.zeros(2, 5, 6, dtype=torch.bfloat16)).leaves()
    kernel = KERNELS[case.kernel]
    with torch.autocast("cpu", torch.bfloat16):
        out = p.run(kernel)
        alone = kernel(p.x, p.stack, p.weights, None, p.ids)
    assert out.dtype == alone.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {t.grad.dtype for t in p.tensors()[:4]} == {torch.float32}
    want = naive(p)
    assert (out - want).abs().max() <= 6e-2 * want.abs().max()


@pytest.mark.parametrize("case", SOME, ids=str)
def test_autocast_leaves_float64_alone(case):
    p = problem((2, 3), case.shape, case.chosen)
    with torch.autocast("cpu", torch.bfloat16):
        out = KERNELS[case.kernel](p.x, p.stack, p.weights, None, p.ids)
    assert (out - naive(p)).abs().max() < 1e-12


@pytest.mark.parametrize("case", SOME, ids=str)
def test_factors_of_another_dtype_are_cast_to_the_inputs(case):
    p = problem((2, 3), case.shape, case.chosen).to(torch.float32)
    assert KERNELS[case.kernel](p.x.bfloat16(), p.stack, p.weights, None, p.ids).dtype == torch.bfloat16


@pytest.mark.parametrize("case", SERVED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_kernel_takes_no_tokens_at_all(case, dtype):
    rows = 0 if case.shape[0] == 2 else 1
    p = problem((4, 4), (rows, case.shape[1]), case.chosen, d_in=8, d_out=8) if rows else nothing(case)
    p = p.to(dtype)._replace(x=torch.zeros(0, 5, 8, dtype=dtype), base_out=torch.zeros(0, 5, 8, dtype=dtype))
    assert KERNELS[case.kernel](p.x, p.stack, p.weights, None, p.ids).shape == (0, 5, 8)
    p = p.leaves()
    p.run(KERNELS[case.kernel]).sum().backward()
    assert p.base_out.grad.shape == (0, 5, 8)
    assert p.weights.grad is None or not p.weights.grad.any()


def nothing(case):
    p = problem((4, 4), case.shape, case.chosen, d_in=8, d_out=8)
    return p._replace(weights=p.weights[:0], ids=None if p.ids is None else p.ids[:0])


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_rows_that_are_a_view_of_others_are_taken(case):
    p = problem((4, 2), case.shape, case.chosen, d_in=8)
    wide = torch.randn(2, 10, 9, dtype=torch.float64)
    p = p._replace(x=wide[:, ::2, 1:])
    assert (KERNELS[case.kernel](p.x, p.stack, p.weights, None, p.ids) - naive(p)).abs().max() < 1e-12
    low = p.to(torch.float32)._replace(x=wide.float()[:, ::2, 1:])
    assert (KERNELS[case.kernel](low.x, low.stack, low.weights, None, low.ids) - naive(p)).abs().max() < 1e-4


@pytest.mark.parametrize("case", [case for case in SERVED if case.kernel not in ("loop", "folded")], ids=str)
def test_second_derivative_is_an_error_and_the_loop_has_it(case):
    for kernel in (KERNELS[case.kernel], loop):
        p = problem((2, 2), case.shape, case.chosen, nobody=False).leaves()
        (first,) = torch.autograd.grad(p.run(kernel).square().sum(), p.weights, create_graph=True)
        if kernel is loop:
            first.sum().backward()
            assert p.x.grad.abs().max() > 0
        else:
            with pytest.raises(RuntimeError, match="kernel='loop' for second ones"):
                first.sum().backward()


@pytest.mark.parametrize("case", [case for case in SERVED if case.shape != (1, 5)], ids=str)
def test_no_tensor_has_all_experts_and_all_features_of_a_token(case):
    """[B, T, E, d] and [B, T, d, r] are forbidden: the largest thing made is x or a stack, or the chosen rows."""
    ranks, d, tokens = (2,) * 8, 40, 2 * 64
    p = problem(
        ranks, case.shape if case.shape[1] == 1 else (case.shape[0], 64), case.chosen, length=64, d_in=d, d_out=d
    )
    most = max(tokens * d * (case.chosen or 1), sum(ranks) * d, tokens * sum(ranks))
    if case.kernel == "grouped" and case.chosen is None:
        return  # all experts of a token as if it had chosen them: nobody asks for that
    p = p.leaves()
    with Largest() as seen:
        p.run(KERNELS[case.kernel]).sum().backward()
    assert seen.numbers <= most


def test_unknown_kernel_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown kernel 'stakced'; did you mean stacked"):
        check_kernel("stakced")
    assert check_kernel("auto") == "auto"


@pytest.mark.parametrize("shape", [(2, 5), (1, 5)])
def test_segments_serves_whole_examples_only(shape):
    p = problem((2, 2), shape, 1)
    with pytest.raises(ValueError, match=r"one expert per example, .*got \(\d, 5, 1\): use kernel=auto"):
        p.run(KERNELS["segments"])
    with pytest.raises(ValueError, match="one expert per example"):
        problem((2, 2), (2, 1), 2).run(KERNELS["segments"])
    with pytest.raises(ValueError, match="one expert per example"):
        problem((2, 2), (2, 1)).run(KERNELS["segments"])


@pytest.mark.parametrize("shape", [(2, 5), (2, 1), (1, 5)])
def test_folded_serves_static_weights_only(shape):
    with pytest.raises(ValueError, match=r"the same for all tokens, \[1, 1, K\]; got .*: use kernel=auto"):
        problem((2, 2), shape).run(KERNELS["folded"])
