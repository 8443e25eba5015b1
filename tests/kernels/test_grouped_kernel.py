"""Grouped products within torch's limits, and the kernel on them: memory, order, parts."""

from importlib import import_module
from itertools import pairwise

import pytest
import torch
from kernel_cases import gradients, naive, problem

from mole.kernels import grouped, grouped_mm, loop
from mole.kernels import stacked as stacked_kernel

MODULE = import_module("mole.kernels.grouped")  # its name in the package is the kernel's
NATIVE = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {"none": [0, 0, 0], "first alone": [5, 0, 0], "some empty": [0, 3, 0, 4, 0], "one row": [1, 0], "even": [4, 4]}


def groups(sizes, k, m, dtype):
    generator = torch.Generator().manual_seed(k + m)
    rows = torch.randn(sum(sizes), k, generator=generator).to(dtype)
    mats = torch.randn(len(sizes), k, m, generator=generator).to(dtype)
    return rows, mats, torch.tensor(sizes).cumsum(0).to(torch.int32)


def one_by_one(rows, mats, ends):
    stops = [0, *ends.tolist()]
    parts = [rows[a:b].double() @ m.double() for (a, b), m in zip(pairwise(stops), mats, strict=True)]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float64, *NATIVE], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_grouped_products_equal_those_of_each_group_for_any_sizes(dtype, sizes):
    for k in (1, 2, 3, 4, 6, 8, 16):  # multiples of 16 bytes and not
        for m in (1, 4, 6, 8):
            rows, mats, ends = groups(sizes, k, m, dtype)
            want, limit = one_by_one(rows, mats, ends), 2e-2 if dtype.itemsize == 2 else 1e-5
            found = grouped_mm.grouped_mm(rows, mats, ends)
            assert found.shape == want.shape
            assert torch.allclose(found.double(), want, atol=limit, rtol=limit)
            outer = grouped_mm.grouped_outer(rows, want.to(dtype), ends)
            stops = [0, *ends.tolist()]
            for e, (a, b) in enumerate(pairwise(stops)):
                exact = rows[a:b].double().t() @ want[a:b].to(dtype).double()
                assert torch.allclose(outer[e].double(), exact, atol=5 * limit, rtol=5 * limit)


def test_torchs_function_is_used_where_it_knows_the_dtype(monkeypatch):
    used = []
    plain = grouped_mm._function()
    monkeypatch.setattr(grouped_mm, "_function", lambda: lambda *a, **k: used.append(a[0].dtype) or plain(*a, **k))
    grouped_mm.has_grouped_mm("cpu", torch.float32)
    used.clear()
    for dtype in (torch.float32, torch.float64):
        grouped_mm.grouped_mm(*groups([2, 3], 4, 4, dtype))
    assert used == [torch.float32]


def test_without_torchs_function_each_group_is_a_product_of_its_own(monkeypatch):
    monkeypatch.setattr(grouped_mm, "has_grouped_mm", lambda device, dtype: False)
    rows, mats, ends = groups([2, 0, 3], 4, 4, torch.float32)
    assert torch.allclose(grouped_mm.grouped_mm(rows, mats, ends).double(), one_by_one(rows, mats, ends), atol=1e-5)
    p = problem((4, 4, 4), chosen=2)
    assert torch.allclose(p.run(grouped), p.run(loop))


def test_a_version_of_torch_without_the_function_is_known(monkeypatch):
    grouped_mm.has_grouped_mm.cache_clear()
    monkeypatch.setattr(grouped_mm, "_function", lambda: None)
    assert not grouped_mm.has_grouped_mm("cpu", torch.float32)
    grouped_mm.has_grouped_mm.cache_clear()


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_operands_off_the_16_bytes_are_copied(dtype):
    rows, mats, ends = groups([2, 3], 8, 8, dtype)
    shifted = torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(rows.shape)
    slipped = torch.cat([mats.new_zeros(1), mats.flatten()])[1:].view(mats.shape)
    wide = torch.cat([rows, rows[:, :1]], dim=1)[:, :8]  # rows 9 numbers apart
    assert shifted.data_ptr() % 16
    want = grouped_mm.grouped_mm(rows, mats, ends)
    for some, others in ((shifted, mats), (rows, slipped), (wide, mats), (rows, mats.mT.contiguous().mT)):
        assert torch.allclose(grouped_mm.grouped_mm(some, others, ends), want, atol=1e-5, rtol=1e-2)
    assert torch.equal(
        grouped_mm.grouped_mm(rows[:1].expand(5, -1), mats, ends), grouped_mm.grouped_mm(rows[[0] * 5], mats, ends)
    )


# torch's own: its tracer makes an object of every autograd function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_compiles_to_one_graph_in_dtypes_that_torch_cannot_trace(dtype):
    torch._dynamo.reset()
    p = problem((4, 4, 4), chosen=2, d_in=8, d_out=8).to(dtype)

    def run(x, weights, ids):
        return grouped(x, p.stack, weights, None, ids)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    found = []
    for function in (compiled, run):
        x, weights = (t.detach().clone().requires_grad_() for t in (p.x, p.weights))
        out = function(x, weights, p.ids)
        out.float().square().sum().backward()
        found.append((out.detach().float(), x.grad.float(), weights.grad))
    for mine, want in zip(*found, strict=True):
        assert (mine - want).abs().max() <= (1e-5 if dtype == torch.float32 else 3e-2) * want.abs().max()


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_what_is_kept_for_the_backward_does_not_depend_on_how_many_experts_there_are(trains):
    kept = {}
    for experts in (4, 64):
        p = problem((4,) * experts, chosen=2, d_in=16, d_out=16, nobody=False).to(torch.float32).leaves()
        p.stack.A.requires_grad_(trains)
        p.stack.B.requires_grad_(trains)
        own = {t.untyped_storage().data_ptr() for t in (p.stack.A, p.stack.B, p.stack.scales)}
        sizes = []

        def pack(tensor, own=own, sizes=sizes):
            if tensor.untyped_storage().data_ptr() not in own and tensor.dtype != torch.int32:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            p.run(grouped)
        kept[experts] = sum(sizes)
    assert kept[4] == kept[64]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_parts_that_fit_into_a_cache_make_no_difference(dtype, monkeypatch):
    p = problem((4, 2, 3, 1, 4), (2, 40), 2, length=40)
    want, exact = gradients(p, loop), naive(p) + p.base_out
    for rows in (1, 3, 7, 1000):
        monkeypatch.setattr(MODULE, "IN_CACHE", rows * 7)
        limit = 1e-12 if dtype == torch.float64 else 1e-5
        assert (p.to(dtype).run(grouped).double() - exact).abs().max() <= limit * exact.abs().max()
        for mine, other in zip(gradients(p.to(dtype), grouped), want, strict=True):
            assert (mine.double() - other).abs().max() <= 10 * limit * other.abs().max()


def test_slots_of_nobody_do_no_work(monkeypatch):
    rows = []
    plain = grouped_mm.grouped_mm
    monkeypatch.setattr(MODULE, "grouped_mm", lambda r, *a: rows.append(len(r)) or plain(r, *a))
    p = problem((2, 2), chosen=3)
    p = p._replace(ids=torch.tensor([0, -1, 2]).expand(2, 5, 3))
    assert torch.allclose(p.run(grouped), p.run(stacked_kernel))
    assert rows == [10, 10]


def test_a_routing_of_whole_examples_sorts_examples_only(monkeypatch):
    sorted_shapes = []
    plain = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda t, **k: sorted_shapes.append(tuple(t.shape)) or plain(t, **k))
    p = problem((2, 3, 2), (2, 1), 2)
    assert torch.allclose(p.run(grouped), p.run(loop))
    assert sorted_shapes == [(4,)]
