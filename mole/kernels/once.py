"""Gradients of kernels with a backward of their own: a first derivative, and an error in the place of a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def once(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients as a backward hands them out, such that differentiating them again is a RuntimeError."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(gradients)
    leaf = torch.zeros((), requires_grad=True)
    return tuple(g if g is None else _Once.apply(g, leaf) for g in gradients)  # type: ignore[misc]


class _Once(Function):
    """A gradient, unchanged, that cannot be differentiated again: its derivative would silently be 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, leaf: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "this kernel has a first derivative only: build the mixture with kernel='loop' for second ones"
        )
