"""Which experts a token keeps, and with what weights."""

from __future__ import annotations

from torch import Tensor


def largest(values: Tensor, k: int) -> Tensor:
    """Ids of the k largest values along the last axis, best first; ties go to the lower id on every device."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def chosen(probabilities: Tensor, k: int | None, *, normalise: bool = True) -> tuple[Tensor, Tensor | None]:
    """The k largest of `probabilities` [.., E] → their weights [.., K] and ids int64 [.., K].

    `normalise` makes the K weights sum to 1. All experts are kept for k None, or k ≥ E: then there are no ids.
    """
    if k is None or k >= probabilities.shape[-1]:
        return probabilities, None
    ids = largest(probabilities, k)
    weights = probabilities.gather(-1, ids)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids
