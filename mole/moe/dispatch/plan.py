"""What a back-end needs to know of the experts, and the slots of a routing in the order of the experts.

backend(plan, x, ids, weights, limit=None) -> y

`x`       [N, *in]    tokens [N, d], or whole samples.
`ids`     int64 [N, K] one distinct expert per slot; outside 0 … E − 1 nobody.
`weights` [N, K]      gates.
`limit`   rows that no expert exceeds, where that is known without reading a number.
`y`       [N, *out]   Σ over the slots of gate · expert(x), in the dtype of the experts' output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mole.moe.quiet import quietly


@dataclass(frozen=True)
class ExpertPlan:
    """The experts of one block, and how one is called.

    `packed`  experts are given tokens, as [1, n, d]; else samples, [n, *in].
    `plain`   a call is nothing but the module's own.
    """

    experts: Sequence[nn.Module]
    forward: Callable[..., Any]
    packed: bool = True
    plain: bool = True

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    def call(self, index: int, rows: Tensor) -> Tensor:
        """Expert `index` on some rows [n, *in] → [n, *out]. Raises ValueError for an output that does not fit."""
        if not self.packed:
            return self.checked(index, self.forward(self.experts[index], rows), rows, 1)
        given = rows.unsqueeze(0)
        return self.checked(index, self.forward(self.experts[index], given), given, 2).squeeze(0)

    def checked(self, index: int, out: Any, given: Tensor, leading: int) -> Tensor:
        """`out`, if it is a tensor with the leading shape of what was given."""
        name = f"expert {index} ({type(self.experts[index]).__name__})"
        if not isinstance(out, Tensor):
            raise ValueError(f"{name} returns {type(out).__name__}: an expert must return one tensor")
        if out.shape[:leading] != given.shape[:leading]:
            raise ValueError(
                f"{name} returns shape {tuple(out.shape)} for an input of shape {tuple(given.shape)}: the leading "
                "dimensions must stay"
            )
        return out

    def alike(self, outputs: Sequence[tuple[int, Tensor]], leading: int) -> None:
        """Raises ValueError if the outputs of two experts (index, [*leading, *out]) cannot be added up."""
        for index, out in outputs[1:]:
            first, one = outputs[0]
            if out.shape[leading:] != one.shape[leading:]:
                names = [f"{i} ({type(self.experts[i]).__name__})" for i in (first, index)]
                raise ValueError(
                    f"expert {names[0]} gives {tuple(one.shape[leading:])} for a token and expert {names[1]} "
                    f"{tuple(out.shape[leading:])}: the outputs of all experts must have one shape"
                )

    def nothing(self, x: Tensor) -> Tensor:
        """[0, *out]: what an expert gives for no rows."""
        with quietly([self.experts[0]], x.device):
            out = self.call(0, x.new_zeros(1, *x.shape[1:]))
        return out[:0]


class Slots(NamedTuple):
    """The filled slots, sorted by expert and then by token: their rows of x [P], gates [P], and each expert's count."""

    tokens: Tensor
    gates: Tensor
    counts: list[int]


def sorted_slots(ids: Tensor, weights: Tensor, num_experts: int) -> Slots:
    """The slots of ids and weights [N, K]; waits for the device once, to know how many each expert has."""
    keys, order = sorted_keys(ids, num_experts)
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts].tolist()
    order = order[: sum(counts)]
    return Slots(order // ids.shape[1], weights.reshape(-1).index_select(0, order), counts)


def sorted_keys(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Experts of all slots [N·K], sorted, nobody's last as E; and the places of the slots."""
    flat = ids.reshape(-1)
    return torch.where((flat >= 0) & (flat < num_experts), flat, num_experts).sort(stable=True)


def gated(out: Tensor, gates: Tensor) -> Tensor:
    """`out` [P, *out] times gates [P], in its own dtype: one rounding."""
    return (out * gates.view(-1, *(1,) * (out.dim() - 1))).to(out.dtype)


def with_unused(y: Tensor, plan: ExpertPlan, counts: Sequence[int]) -> Tensor:
    """`y`, whose backward gives zeros to the parameters of the experts that nobody chose, in the place of None."""
    if not torch.is_grad_enabled():
        return y
    idle = [
        parameter
        for expert, count in zip(plan.experts, counts, strict=True)
        if not count
        for parameter in expert.parameters()
        if parameter.requires_grad
    ]
    if not idle:
        return y
    out = _Unused.apply(y, *idle)
    assert isinstance(out, Tensor)
    return out


class _Unused(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (grads[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))
