"""What a block reads of its input: units that are routed, what the router sees of them, and which are padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mole.routing import Frame


@dataclass(frozen=True)
class Units:
    """`x` [N, *in] the rows of the dispatch; `read` [B, T, d] what the router sees; `valid` bool [B, T] or None.

    Tokens: N = B·T, whatever lies between the batch and the width. Whole samples: N = B, T = 1; `mask` bool [B, T'] is
    then of the tokens inside them.
    """

    x: Tensor
    read: Tensor
    valid: Tensor | None
    mask: Tensor | None = None


def units_of(x: Tensor, route: str, input_dim: int | None, given: Tensor | None, frame: Frame | None) -> Units:
    """The units of `x`. `given`: a padding mask, 1 at real tokens; else the attention mask of the frame, where it fits.

    Raises ValueError for another rank or width, or a mask of another shape.
    """
    if route == "images":
        if x.dim() < 3:
            raise ValueError(f"route=images needs [B, C, …], got shape {tuple(x.shape)}")
        if given is not None:
            raise ValueError("padding_mask: route=images has no padding")
        _check_width(x.shape[1], input_dim, x)
        return Units(x, x.flatten(2).mean(2, dtype=_fine(x))[:, None], None)
    if x.dim() < 2 or (route == "sequence" and x.dim() != 3):
        wanted = "[B, T, d]" if route == "sequence" else "[B, T, d] or [N, d]"
        raise ValueError(f"route={route} needs {wanted}, got shape {tuple(x.shape)}")
    _check_width(x.shape[-1], input_dim, x)
    lead = (1, *x.shape[:-1]) if x.dim() == 2 else tuple(x.shape[:-1])
    mask = _mask(x, given, frame)
    mask = None if mask is None else mask.reshape(lead[0], -1)
    read = x.reshape(lead[0], int(torch.Size(lead[1:]).numel()), x.shape[-1])
    if route == "tokens":
        return Units(read.flatten(0, 1), read, mask)
    if mask is None:
        return Units(x, x.mean(1, keepdim=True, dtype=_fine(x)), None)
    real = mask[..., None].to(_fine(x))
    mean = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return Units(x, mean, mask.any(1, keepdim=True), mask)


def _fine(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_width(width: int, wanted: int | None, x: Tensor) -> None:
    if wanted is not None and width != wanted:
        raise ValueError(f"the block has input_dim={wanted}, got an input of shape {tuple(x.shape)}")


def _mask(x: Tensor, given: Tensor | None, frame: Frame | None) -> Tensor | None:
    """bool in the shape of the tokens, None if all are real."""
    if given is not None:
        fits = given.shape == x.shape[:-1] or (x.dim() == 2 and given.shape == (1, x.shape[0]))
        if not fits and not (x.dim() > 3 and given.numel() == x[..., 0].numel() and given.shape[0] == x.shape[0]):
            raise ValueError(
                f"padding_mask has shape {tuple(given.shape)}, the tokens are {tuple(x.shape[:-1])}: give one number "
                "for each, 1 at real tokens"
            )
        mask = given
    else:
        mask = None if frame is None else frame.inputs.attention_mask
        if mask is None or mask.shape != x.shape[:-1]:
            return None
    mask = mask.to(x.device).bool()
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask
