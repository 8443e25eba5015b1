"""One linear map per group of rows: against a loop over the groups, gradients included."""

import pytest
import torch

from mole.kernels.grouped_linear import grouped_linear


@pytest.mark.parametrize("sizes", [(3, 0, 4), (0, 0, 5), (0, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize(("width", "out"), [(8, 8), (5, 3), (1, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_each_group_meet_their_own_map(sizes, width, out, dtype):
    torch.manual_seed(0)
    rows = torch.randn(sum(sizes), width, dtype=dtype, requires_grad=True)
    mats = torch.randn(3, width, out, dtype=dtype, requires_grad=True)
    bias = torch.randn(3, out, dtype=dtype, requires_grad=True)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    pull = torch.randn(sum(sizes), out, dtype=dtype)
    found = grouped_linear(rows, mats, ends, bias)
    parts = zip(rows.split(list(sizes)), mats, bias, strict=True)
    wanted = torch.cat([part @ mat + shift for part, mat, shift in parts])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    grads = [torch.autograd.grad(y, (rows, mats, bias), pull) for y in (found, wanted)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_second_derivative_is_refused():
    rows = torch.randn(4, 8, requires_grad=True)
    mats, ends = torch.randn(1, 8, 8, requires_grad=True), torch.tensor([4], dtype=torch.int32)
    (first,) = torch.autograd.grad(grouped_linear(rows, mats, ends).square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        first.sum().backward()
