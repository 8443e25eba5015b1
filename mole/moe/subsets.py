"""Exact sampling of k-subsets with gradients of their marginals (SIMPLE: Ahmed, Zeng et al. 2023, arXiv 2210.01941).

    p(z) ∝ exp(Σ_{e∈z} S_e) over z with |z| = k;    μ_e = p(e ∈ z) = ∂ log Z_k / ∂ S_e

Z_j of the first i scores follows Z[i, j] = Z[i−1, j] + e^{S_i} Z[i−1, j−1], in logarithms: O(E k). The gradient of a
sample is that of μ, which is right for every k.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = -1e30  # a logarithm of nothing whose gradients are finite


def _tables(scores: Tensor, k: int) -> list[Tensor]:
    """[.., k + 1] after 0, 1, … E scores: log Z of the subsets with 0 … k members among them."""
    start = scores.new_full((*scores.shape[:-1], k + 1), NEVER)
    start[..., 0] = 0.0
    tables = [start]
    for score in scores.unbind(-1):
        last = tables[-1]
        more = torch.cat([torch.full_like(last[..., :1], NEVER), last[..., :-1] + score[..., None]], dim=-1)
        tables.append(torch.logaddexp(last, more))
    return tables


def marginals(scores: Tensor, k: int) -> Tensor:
    """μ [.., E] of `scores` [.., E], with graph."""
    scores = scores.clamp_min(NEVER / 4)
    before = _tables(scores, k)
    after = _tables(scores.flip(-1), k)
    whole, found = before[-1][..., k], []
    for place, score in enumerate(scores.unbind(-1)):
        # k − 1 others: j among those before it, the rest among those behind it
        left, right = before[place][..., :k], after[scores.shape[-1] - 1 - place][..., :k].flip(-1)
        found.append(torch.exp(score + torch.logsumexp(left + right, dim=-1) - whole))
    return torch.stack(found, dim=-1)


@torch.no_grad()
def sampled(scores: Tensor, k: int) -> Tensor:
    """0/1 [.., E] with k ones, from the exact distribution."""
    scores = scores.clamp_min(NEVER / 4)
    tables = _tables(scores, k)
    missing = torch.full(scores.shape[:-1], k, dtype=torch.long, device=scores.device)
    found = torch.zeros_like(scores)
    for place in reversed(range(scores.shape[-1])):
        whole = tables[place + 1].gather(-1, missing[..., None])[..., 0]
        fewer = tables[place].gather(-1, (missing - 1).clamp_min(0)[..., None])[..., 0]
        chance = torch.exp(scores[..., place] + fewer - whole)
        # Where as many are left as are missing, all are taken, whatever rounding says.
        taken = ((torch.rand_like(chance) < chance) | (missing > place)) & (missing > 0)
        found[..., place] = taken.to(scores.dtype)
        missing = missing - taken.long()
    return found


def subset(scores: Tensor, k: int) -> Tensor:
    """A sample [.., E] of zeros and ones, whose gradient is that of its marginals."""
    if k >= scores.shape[-1]:
        return torch.ones_like(scores) + 0.0 * scores
    mean = marginals(scores, k)
    return mean + (sampled(scores, k) - mean).detach()
