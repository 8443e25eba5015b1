"""One vector per example from the inputs of a module: the mean over its prompt, over all its tokens, or so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mole.routers.float32 import at_least_float32
from mole.routing import Frame


def prompt_of(frame: Frame, router: str) -> Tensor:
    """bool [B, T], true at valid tokens of the prompt; while `generate` reads a prompt, all valid tokens are of it.

    Raises ValueError if nobody said what the prompt is.
    """
    mask = frame.inputs.prompt_mask
    if mask is None and frame.generating:
        mask = frame.inputs.attention_mask
        if mask is None and frame.inputs.input_ids is not None:
            mask = torch.ones_like(frame.inputs.input_ids)
    return (frame.need("prompt_mask", router) if mask is None else mask).bool()


def valid_of(frame: Frame, x: Tensor) -> Tensor:
    """bool [B, T], true at tokens that are no padding."""
    mask = frame.inputs.attention_mask
    if mask is None or mask.dim() != 2:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return mask.bool()


def by_example(x: Tensor, mask: Tensor, router: str) -> tuple[Tensor, Tensor]:
    """`x` [B, T, d] or all tokens in a row [1, B·T, d], and `mask` [B, T] or of one of its copies → both [B, T, …].

    Raises ValueError for a mask that does not fit.
    """
    mask = mask.to(x.device)
    if x.shape[0] == 1 and mask.shape[0] > 1 and x.shape[1] == mask.numel():
        x = x.view(*mask.shape, x.shape[-1])
    if x.shape[0] != mask.shape[0] and x.shape[0] % mask.shape[0] == 0:
        mask = mask.repeat_interleave(x.shape[0] // mask.shape[0], dim=0)
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"router={router}: a mask of shape {tuple(mask.shape)} does not say which of the module's inputs "
            f"{tuple(x.shape)} it means; a module that sees no single tokens takes a router for the whole model"
        )
    return x, mask


def mean_of(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of `mask` [B, T]: [B, T, d] → float32 [B, 1, d]; 0 where an example has none."""
    seen = at_least_float32(x).masked_fill(~mask[..., None], 0.0)
    return (seen.sum(1) / mask.sum(1, keepdim=True).clamp_min(1))[:, None]


@dataclass
class RunningMean:
    """The mean over the tokens of `length` positions of a cache: `sums` [B, d] of `counts` [B, 1] tokens."""

    sums: Tensor
    counts: Tensor
    length: int

    def reorder(self, rows: Tensor) -> None:
        """Beams change places."""
        self.sums, self.counts = (t.index_select(0, rows.to(t.device)) for t in (self.sums, self.counts))


def means_so_far(x: Tensor, frame: Frame, place: str, router: str) -> Tensor:
    """Mean over the valid tokens up to each token and with it: [B, T, d] → float32 [B, T, d].

    `generate` carries the sums of `place` on from forward to forward. Raises ValueError for other forwards that
    continue a cache, and if the cache was cut: the sums do not know what it lost.
    """
    mask = valid_of(frame, x)
    length = mask.shape[1]
    x, mask = by_example(x, mask[:, -x.shape[1] :] if frame.goes_on else mask, router)
    sums = at_least_float32(x).masked_fill(~mask[..., None], 0.0).cumsum(1)
    counts = mask.cumsum(1)[..., None]
    if frame.goes_on:
        before = frame.kept.get(place) if frame.generating else None
        if not isinstance(before, RunningMean) or before.length != length - x.shape[1]:
            raise ValueError(
                f"router={router} with pool=causal reads all tokens before, and this forward continues a cache of "
                "which it saw others, or nothing: use generate() without drafts, or pass the whole text"
            )
        sums, counts = sums + before.sums[:, None], counts + before.counts[:, None]
    if frame.generating:
        frame.kept[place] = RunningMean(sums[:, -1], counts[:, -1], length)
    return sums / counts.clamp_min(1)
