"""All kernels equal the naive sum over batch, token and expert, in values and gradients."""

import pytest
import torch

from mole.kernels import KERNELS, LoraStack, choose


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
def test_kernel_gradients_equal_finite_differences(name):
    x, stack, weights = problem((2, 3))
    tensors = [t.requires_grad_() for t in (x, stack.A, stack.B, weights)]

    def run(x, a, b, w):
        return KERNELS[name](x, LoraStack(a, b, stack.scales, stack.ranks), w)

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_takes_no_tokens_at_all(name):
    _, stack, _ = problem((2, 3))
    out = KERNELS[name](torch.zeros(0, 4, 7, dtype=torch.float64), stack, torch.zeros(0, 4, 2))
    assert out.shape == (0, 4, 6)


def test_unknown_kernel_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown kernel 'stakced'; did you mean fused"):
        choose("stakced")
