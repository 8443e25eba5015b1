"""All kernels equal the naive sum over batch, token and expert, in values and gradients."""

from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mole.kernels import KERNELS, LoraStack, check_kernel, loop, stacked


def problem(ranks, dtype=torch.float64, batch=2, length=5, d_in=7, d_out=6, shape=None):
    generator = torch.Generator().manual_seed(len(ranks))
    random = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    stack = LoraStack(
        A=random(sum(ranks), d_in).to(dtype),
        B=random(d_out, sum(ranks)).to(dtype),
        scales=torch.rand(len(ranks), generator=generator, dtype=torch.float64).to(
            torch.promote_types(dtype, torch.float32)
        ),
        ranks=tuple(ranks),
    )
    weights = random(*(shape or (batch, length)), len(ranks)).to(torch.promote_types(dtype, torch.float32))
    return random(batch, length, d_in).to(dtype), stack, weights


def naive(x, stack, weights):
    """Each output vector by itself, in float64."""
    out = torch.zeros(*x.shape[:-1], stack.B.shape[0], dtype=torch.float64)
    full = weights.double().expand(*x.shape[:-1], -1)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for e, part in enumerate(stack.slices()):
                delta = stack.B[:, part].double() @ (stack.A[part].double() @ x[b, t].double())
                out[b, t] += full[b, t, e] * stack.scales[e].double() * delta
    return out


def gradients(kernel, x, stack, weights, base_out, wanted):
    """Gradients of a random function of the output; `wanted` says of which of x, A, B, weights, base_out."""
    tensors = [t.detach().clone().requires_grad_(w) for t, w in zip(
        (x, stack.A, stack.B, weights, base_out), wanted, strict=True
    )]  # fmt: skip
    x, A, B, weights, base_out = tensors
    out = kernel(x, LoraStack(A, B, stack.scales, stack.ranks), weights, base_out)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (out * direction.to(out.dtype)).sum().backward()
    return [tensor.grad for tensor in tensors]


class Matmuls(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("ranks", [(1,), (4, 4, 4), (1, 5, 17, 2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (2, 1), (1, 5)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_kernel_equals_the_naive_sum(name, ranks, shape, dtype, tolerance):
    x, stack, weights = problem(ranks, dtype, shape=shape)
    out = KERNELS[name](x, stack, weights)
    want = naive(x, stack, weights)
    assert out.dtype == dtype
    assert out.shape == want.shape
    assert (out.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 5, 17, 2)], ids=str)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("records", [False, True])
def test_kernel_adds_to_the_base_output_and_leaves_it_as_it_was(name, ranks, flat, records):
    x, stack, weights = problem(ranks)
    base_out = torch.randn(*((10,) if flat else (2, 5)), 6, dtype=torch.float64)
    before = base_out.clone()
    out = KERNELS[name](x.requires_grad_(records), stack, weights, base_out)
    assert out.shape == base_out.shape
    assert torch.equal(base_out, before)
    assert (out.reshape(2, 5, 6) - before.view(2, 5, 6) - naive(x, stack, weights)).abs().max() < 1e-12


@pytest.mark.parametrize("name", KERNELS)
def test_result_has_the_dtype_of_the_base_output(name):
    x, stack, weights = problem((2, 3), torch.bfloat16)
    base_out = torch.randn(2, 5, 6)
    out = KERNELS[name](x, stack, weights, base_out)
    assert out.dtype == torch.float32
    want = naive(x, stack, weights) + base_out
    assert (out - want).abs().max() <= 2e-2 * want.abs().max()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("ranks", [(2, 3), (2, 2), (5, 4)], ids=str)  # the last keeps x for the backward
@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (2, 1)], ids=str)
def test_kernel_gradients_equal_finite_differences(name, ranks, shape):
    x, stack, weights = problem(ranks, shape=shape)
    base_out = torch.randn(2, 5, 6, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, stack.A, stack.B, weights, base_out)]

    def run(x, a, b, w, base):
        return KERNELS[name](x, LoraStack(a, b, stack.scales, stack.ranks), w, base)

    assert torch.autograd.gradcheck(run, tensors)
    frozen = LoraStack(stack.A.detach(), stack.B.detach(), stack.scales, stack.ranks)
    assert torch.autograd.gradcheck(lambda x, w: KERNELS[name](x, frozen, w), [x, weights])


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 5, 17, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("wanted", list(product([False, True], repeat=5)), ids=lambda w: "".join("01"[i] for i in w))
def test_fused_gradients_equal_the_loops_whoever_wants_one(ranks, wanted):
    if not any(wanted):
        return
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        x, stack, weights = problem(ranks, dtype)
        base_out = torch.randn(2, 5, 6).to(dtype)
        pairs = [gradients(kernel, x, stack, weights, base_out, wanted) for kernel in (stacked, loop)]
        for mine, want in zip(*pairs, strict=True):
            assert (mine is None) == (want is None)
            if want is not None:
                assert (mine - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("ranks", [(4, 4), (3, 5)], ids=str)
def test_gradients_in_bfloat16_are_those_of_float64_up_to_rounding(ranks):
    x, stack, weights = problem(ranks, torch.bfloat16)
    base_out = torch.randn(2, 5, 6).bfloat16()
    wanted = (True, True, True, True, True)
    mine = gradients(stacked, x, stack, weights, base_out, wanted)
    exact = LoraStack(stack.A.double(), stack.B.double(), stack.scales.double(), stack.ranks)
    want = gradients(loop, x.double(), exact, weights.double(), base_out.double(), wanted)
    assert [g.dtype for g in mine] == [t.dtype for t in (x, stack.A, stack.B, weights, base_out)]
    for m, w in zip(mine, want, strict=True):
        assert (m.double() - w).abs().max() <= 5e-2 * w.abs().max()


@pytest.mark.parametrize(("ranks", "kept_width"), [((1, 2), 3), ((4, 4), 7)], ids=str)
def test_frozen_experts_keep_the_hidden_state_or_the_input_for_the_backward_and_no_more(ranks, kept_width):
    x, stack, weights = problem(ranks)
    x.requires_grad_()
    weights.requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (stack.A, stack.B, stack.scales, weights)}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stacked(x, stack, weights, torch.zeros(2, 5, 6, dtype=torch.float64))
    assert kept == ([(2, 5, kept_width)] if len(set(ranks)) == 1 else [(2, 5, kept_width), (sum(ranks),)])


def test_nothing_is_kept_where_only_the_input_has_a_gradient():
    x, stack, weights = problem((3,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stacked(x.requires_grad_(), stack, weights)
    assert {tuple(t.shape) for t in kept} == {(3, 7), (6, 3), (2, 5, 1), (1,)}  # A, B, weights, scales: no h, no x


def test_a_gradient_that_nobody_wants_is_not_computed():
    """Forward: two products. Backward: dy B, and one more for each of x, A, B; h once more if x was kept for it."""
    counts = {}
    for wanted in ("w", "xw", "xABw"):
        x, stack, weights = problem((1, 1))
        for name, tensor in zip("xABw", (x, stack.A, stack.B, weights), strict=True):
            tensor.requires_grad_(name in wanted)
        with Matmuls() as found:
            stacked(x, stack, weights).sum().backward()
        counts[wanted] = found.count
    assert counts == {"w": 3, "xw": 4, "xABw": 7}


def test_second_derivative_of_the_fused_kernel_is_an_error_and_the_loop_has_it():
    x, stack, weights = problem((2, 2))
    x.requires_grad_()
    weights.requires_grad_()
    for kernel in (stacked, loop):
        (first,) = torch.autograd.grad(kernel(x, stack, weights).square().sum(), weights, create_graph=True)
        if kernel is loop:
            first.sum().backward()
            assert x.grad.abs().max() > 0
        else:
            with pytest.raises(RuntimeError, match="kernel='loop' for second ones"):
                first.sum().backward()


@pytest.mark.parametrize("name", KERNELS)
def test_autocast_computes_in_its_dtype_and_gradients_come_back_in_float32(name):
    x, stack, weights = problem((2, 3), torch.float32)
    for tensor in (x, stack.A, stack.B, weights):
        tensor.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = KERNELS[name](x, stack, weights, torch.zeros(2, 5, 6, dtype=torch.bfloat16))
        alone = KERNELS[name](x, stack, weights)
    assert out.dtype == alone.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {t.grad.dtype for t in (x, stack.A, stack.B, weights)} == {torch.float32}
    want = naive(x, stack, weights)
    assert (out - want).abs().max() <= 3e-2 * want.abs().max()


@pytest.mark.parametrize("name", KERNELS)
def test_autocast_leaves_float64_alone(name):
    x, stack, weights = problem((2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert (KERNELS[name](x, stack, weights) - naive(x, stack, weights)).abs().max() < 1e-12


@pytest.mark.parametrize("name", KERNELS)
def test_factors_of_another_dtype_are_cast_to_the_inputs(name):
    x, stack, weights = problem((2, 3), torch.float32)
    out = KERNELS[name](x.bfloat16(), stack, weights)
    assert out.dtype == torch.bfloat16


def test_checkpointing_changes_no_gradient():
    x, stack, weights = problem((2, 3))
    found = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)):
        w = weights.clone().requires_grad_()
        first, second = wrap(lambda w: stacked(x, stack, w), w), wrap(lambda w: stacked(2 * x, stack, w), w)
        (first.square().sum() + second.sum()).backward()
        found.append(w.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_takes_no_tokens_at_all(name):
    _, stack, _ = problem((2, 3))
    x, weights = torch.zeros(0, 4, 7, dtype=torch.float64), torch.zeros(0, 4, 2)
    assert KERNELS[name](x, stack, weights).shape == (0, 4, 6)
    weights.requires_grad_()
    KERNELS[name](x, stack, weights, torch.zeros(0, 4, 6, dtype=torch.float64)).sum().backward()
    assert weights.grad.shape == weights.shape


def test_loop_drops_a_mask_of_its_own_for_each_expert():
    x, weights = torch.ones(1, 400, 1).double(), torch.ones(1, 400, 2).double()
    ones = LoraStack(torch.ones(6, 1).double(), torch.eye(6).double(), torch.ones(2).double(), (3, 3))
    torch.manual_seed(0)
    out = loop(x, ones, weights, dropout=(0.5, 0.0))
    first, second = out[0, :, 0], out[0, :, 3]
    assert set(first.tolist()) == {0.0, 2.0}
    assert 120 < int((first == 0).sum()) < 280
    assert set(second.tolist()) == {1.0}


def test_unknown_kernel_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown kernel 'fusd'; did you mean stacked"):
        check_kernel("stakced")


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 5, 2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 40), (1, 1), (2, 1)], ids=str)
def test_many_tokens_and_few_give_the_same_without_gradients(ranks, shape):
    x, stack, weights = problem(ranks, length=40, shape=shape)
    base_out = torch.randn(2, 40, 6, dtype=torch.float64)
    whole = stacked(x, stack, weights, base_out)
    for t in range(40):
        part = stacked(x[:, t, None], stack, weights.expand(2, 40, -1)[:, t, None], base_out[:, t, None])
        assert (whole[:, t, None] - part).abs().max() < 1e-12
