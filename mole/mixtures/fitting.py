"""Which weights of a routing go to which rows of a module's input.

A routing speaks of examples and tokens, [B, T]. A module may see these as they are, as one flat row of tokens, or one
vector per example, made by pooling: then the gates are pooled in the same way. Convolutions see channels; where a
kernel is wider than 1, only gates of whole examples are the same before and after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mole.backbones.modules import reads_left_to_right
from mole.routing import Frame, Routing

POOLED_GATES = ("auto", "first", "last", "mean")


@dataclass(frozen=True)
class Fit:
    """How one module's rows find their gates.

    `takes` as of its bank. `pooled` first, last (token that is no padding) or mean. `pointwise` a convolution of kernel
    1 along one axis. `is_head` the output head, which sees the positions of `logits_to_keep` only. `widths` features of
    the module's input and output, where it is no linear module that says so.
    """

    site: str
    num_experts: int
    takes: str = "features"
    pooled: str = "mean"
    pointwise: bool = False
    is_head: bool = False
    widths: tuple[int, int] | None = None


def pooling(backbone: nn.Module, wanted: str) -> str:
    """`wanted`, or for auto: mean for vision, last for what reads from left to right, first for other encoders."""
    if wanted != "auto":
        return wanted
    if getattr(backbone, "main_input_name", "") == "pixel_values":
        return "mean"
    return "last" if reads_left_to_right(backbone) else "first"


def fitted(routing: Routing, x: Tensor, base_out: Tensor, fit: Fit, frame: Frame) -> tuple[Routing, Tensor]:
    """The routing as the bank takes it, and `x` as [B, T, …] (channels and outputs: as it is).

    Raises ValueError for rows that no gates belong to.
    """
    if fit.is_head and frame.logits_to_keep is not None and routing.weights.shape[1] > 1:
        routing = _kept(routing, frame.logits_to_keep)
    if fit.takes == "channels":
        return _for_channels(routing, x, fit, frame), x
    rows, shape = (base_out if fit.takes == "outputs" else x), routing.weights.shape
    lead = rows.shape if fit.takes == "ids" else rows.shape[:-1]
    if len(lead) == 2 and _serves(shape[0], lead[0]) and _serves(shape[1], lead[1]):
        return routing, x
    if fit.takes == "ids":
        if len(lead) == 2 and lead[0] == 1 and _serves(shape[1], lead[1]):  # positions, the same for all examples
            return routing, x.expand(shape[0], -1)
    elif len(lead) > 2 and _serves(shape[0], lead[0]) and _serves(shape[1], lead[1]):
        return _with_more_axes(routing, x, lead)
    elif len(lead) == 1:
        found = _for_flat(routing, lead[0], fit, frame)
        if found is not None:
            return found, x if fit.takes == "outputs" else x[None]
    raise ValueError(
        f"the routing for {fit.site} has shape {tuple(shape)}, which fits no input of shape {tuple(rows.shape)}: there "
        "are gates for every token, for a flat view of all tokens, or for one pooled vector per example"
    )


def _serves(size: int, wanted: int) -> bool:
    """Whether an axis of that size is there, or is shared."""
    return size == 1 or size == wanted  # not `in`: a trace finds no symbolic length in a tuple


def _with_more_axes(routing: Routing, x: Tensor, lead: torch.Size) -> tuple[Routing, Tensor]:
    """`x` [B, T, *more, d]: every token's gates serve all of its vectors."""
    if routing.weights.shape[1] == 1:
        return routing, x.flatten(1, -2)
    flat = _changed(routing, lambda tensor: tensor.expand(*lead[:2], *tensor.shape[2:]).flatten(0, 1)[:, None])
    return flat, x.flatten(0, 1).flatten(1, -2)


def _for_flat(routing: Routing, rows: int, fit: Fit, frame: Frame) -> Routing | None:
    """The routing [1, rows, K] for `rows` vectors: all tokens in a row, or one per example; None if it is neither."""
    batch, tokens, _ = routing.weights.shape
    if batch == tokens == 1:
        return routing
    if rows == batch * tokens:
        return _changed(routing, lambda tensor: tensor.flatten(0, 1)[None])
    if tokens == 1 and rows % batch == 0:
        return _changed(routing, lambda tensor: tensor.repeat_interleave(rows // batch, dim=0).flatten(0, 1)[None])
    if rows == batch:
        return _changed(_pooled(routing, fit, frame), lambda tensor: tensor.flatten(0, 1)[None])
    return None


def _for_channels(routing: Routing, x: Tensor, fit: Fit, frame: Frame) -> Routing:
    batch, tokens, _ = routing.weights.shape
    if batch not in (1, x.shape[0]):
        raise ValueError(f"{fit.site}: gates for {batch} examples, and an input of shape {tuple(x.shape)}")
    if tokens == 1 or (fit.pointwise and tokens == x.shape[-1]):
        return routing
    if frame.fixed is not None:
        raise ValueError(
            f"{fit.site}: a convolution takes one gate per example, and the fixed routing has one for each of "
            f"{tokens} tokens; give weights of shape [B, 1, E]"
        )
    return _pooled(routing, fit, frame)


def _pooled(routing: Routing, fit: Fit, frame: Frame) -> Routing:
    """One set of gates per example, [B, 1, K]."""
    tokens = routing.weights.shape[1]
    mask = frame.inputs.attention_mask
    mask = mask[:, -tokens:] if mask is not None and mask.dim() == 2 and mask.shape[1] >= tokens else None
    if fit.pooled == "first":
        return _changed(routing, lambda tensor: tensor[:, :1])
    if fit.pooled == "last":
        if mask is None:
            return _changed(routing, lambda tensor: tensor[:, -1:])
        places = torch.arange(tokens, device=mask.device)
        last = (places * mask.ne(0)).argmax(dim=1)
        return _changed(routing, lambda tensor: _at(tensor, last.to(tensor.device)))
    weights = routing.weights if routing.expert_ids is None else routing.dense(fit.num_experts)
    base = None if routing.base is None else routing.base.expand(*weights.shape[:2], 1)
    if mask is None:
        return Routing(weights.mean(dim=1, keepdim=True), base=None if base is None else base.mean(1, keepdim=True))
    counted = mask.ne(0).to(weights.device, weights.dtype)[..., None]

    def mean(tensor: Tensor) -> Tensor:
        return (tensor * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp_min(1)

    return Routing(mean(weights), base=None if base is None else mean(base))


def _at(tensor: Tensor, places: Tensor) -> Tensor:
    if tensor.shape[0] == 1:
        return tensor[:, places].transpose(0, 1)
    return tensor[torch.arange(tensor.shape[0], device=tensor.device), places][:, None]


def _kept(routing: Routing, keep: Any) -> Routing:
    """The positions that the head sees."""
    if isinstance(keep, int):
        return routing if keep == 0 else _changed(routing, lambda tensor: tensor[:, -keep:])
    return _changed(routing, lambda tensor: tensor[:, keep.to(tensor.device)])


def _changed(routing: Routing, change: Callable[[Tensor], Tensor]) -> Routing:
    """What mixtures read of a routing, with `change` done to it; what else it has is for others."""
    ids, base = routing.expert_ids, routing.base
    if ids is not None:
        ids = change(ids.expand_as(routing.weights))
    if base is not None:
        base = change(base.expand(*routing.weights.shape[:2], 1))
    return Routing(change(routing.weights), ids, base=base)
