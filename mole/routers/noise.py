"""Noise on the scores of routers, and what would be chosen under another draw of it."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel(like: Tensor) -> Tensor:
    """Gumbel(0, 1), in the shape of `like`."""
    return -torch.empty_like(like).exponential_().log()


def jittered(x: Tensor, eps: float) -> Tensor:
    """x ⊙ U(1 − eps, 1 + eps) (Switch Transformer, arXiv 2101.03961)."""
    return x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)


def chances(noisy: Tensor, clean: Tensor, size: Tensor, k: int) -> Tensor:
    """[.., E]: P(e is among the k best), were its own noise drawn anew: Φ((z_e − the k-th best of the others) / σ).

    `noisy` and `clean` scores, `size` σ of the noise (Shazeer et al. 2017, arXiv 1701.06538).
    """
    best = noisy.topk(k + 1, dim=-1).values
    last, next_one = best[..., -2:-1], best[..., -1:]
    return torch.special.ndtr((clean - torch.where(noisy >= last, next_one, last)) / size)
