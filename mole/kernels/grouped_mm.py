"""Products of sorted rows with one matrix per group, on torch's grouped_mm where it can, group by group where not.

torch's function has limits, and all of them stay in here: dtypes and devices that it does not know (float64 above all;
what it knows is asked of it once), strides that are no multiple of 16 bytes (filled up with zeros, which is exact),
expanded operands and addresses off 16 bytes (copied), and float32 in a trace (its shapes are told by an operator of our
own). Rows behind the last group would be left as they are on a GPU: there must be none.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ALIGNED = 16  # bytes


def multiple_of(dtype: torch.dtype) -> int:
    """How many numbers of that type fill 16 bytes: sizes that are multiples of it need no filling up."""
    return max(1, _ALIGNED // dtype.itemsize)


@cache
def has_grouped_mm(device: str, dtype: torch.dtype) -> bool:
    """Whether torch has a grouped product for such tensors here."""
    function = _function()
    if function is None or device == "meta":
        return False
    size = multiple_of(dtype)
    ends = torch.tensor([size, 2 * size], dtype=torch.int32, device=device)
    rows = torch.zeros(2 * size, size, dtype=dtype, device=device)
    try:
        function(rows, rows.new_zeros(2, size, size), offs=ends)
        function(rows.t(), rows, offs=ends)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _function() -> Any:
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def grouped_mm(rows: Tensor, mats: Tensor, ends: Tensor) -> Tensor:
    """`rows` [P, k], sorted by group, times the matrix of each one's group, `mats` [n, k, m] → [P, m].

    `ends` int32 [n]: where each group ends, the last at P. Groups may be empty. Not differentiable.
    """
    if torch.compiler.is_compiling():
        return _grouped_mm_op(rows, mats, ends)
    return _grouped_mm(rows, mats, ends)


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Σ over the rows of each group of left ⊗ right: `left` [P, k], `right` [P, m], sorted → [n, k, m].

    `ends` as of `grouped_mm`; an empty group's sum is 0. Not differentiable.
    """
    if torch.compiler.is_compiling():
        return _grouped_outer_op(left, right, ends)
    return _grouped_outer(left, right, ends)


def _grouped_mm(rows: Tensor, mats: Tensor, ends: Tensor) -> Tensor:
    if not rows.shape[0] or not has_grouped_mm(rows.device.type, rows.dtype):
        parts = [part @ mat for part, mat in zip(_parts(rows, ends), mats, strict=True)]
        return torch.cat(parts)
    k, m = mats.shape[1:]
    size = multiple_of(rows.dtype)
    mats = _fit(F.pad(mats, (0, -m % size, 0, -k % size)) if m % size or k % size else mats)
    return _function()(_fit(_widened(rows)), mats, offs=ends)[:, :m]


def _grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    if not left.shape[0] or not has_grouped_mm(left.device.type, left.dtype):
        pairs = zip(_parts(left, ends), _parts(right, ends), strict=True)
        return torch.stack([a.t() @ b for a, b in pairs])
    k, m = left.shape[1], right.shape[1]
    found = _function()(_fit(_widened(left)).t(), _fit(_widened(right)), offs=ends)
    return found[:, :k, :m]


def _parts(rows: Tensor, ends: Tensor) -> list[Tensor]:
    stops = ends.tolist()
    return [rows[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def _widened(rows: Tensor) -> Tensor:
    """`rows` with columns of zeros up to a multiple of 16 bytes."""
    lacking = -rows.shape[1] % multiple_of(rows.dtype)
    return F.pad(rows, (0, lacking)) if lacking else rows


def _fit(tensor: Tensor) -> Tensor:
    """The tensor in a layout that torch takes: rows or columns in one piece, a multiple of 16 bytes apart."""
    size, (down, across) = multiple_of(tensor.dtype), tensor.stride()[-2:]
    rows, columns = tensor.shape[-2:]
    good = (across == 1 and down >= columns and down % size == 0) or (
        down == 1 and across >= rows and across % size == 0
    )
    good = good and all(step % size == 0 for step in tensor.stride()[:-2])
    tensor = tensor if good else tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNED else tensor


@torch.library.custom_op("mole::grouped_mm", mutates_args=())
def _grouped_mm_op(rows: Tensor, mats: Tensor, ends: Tensor) -> Tensor:
    return _grouped_mm(rows, mats, ends).contiguous()


@_grouped_mm_op.register_fake
def _(rows: Tensor, mats: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], mats.shape[2])


@torch.library.custom_op("mole::grouped_outer", mutates_args=())
def _grouped_outer_op(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return _grouped_outer(left, right, ends).contiguous()


@_grouped_outer_op.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])
