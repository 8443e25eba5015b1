"""Exact singular values and vectors of low-rank changes ΔW = B A, without ever forming ΔW.

With Aᵀ = Q_A R_A and B = Q_B R_B (QR), ΔW = Q_B (R_B R_Aᵀ) Q_Aᵀ: the SVD of the small middle matrix gives that of ΔW.
Everything is float64, as prototypes are made once and compared for ever after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mole.adapters import LoraWeights


class Change(NamedTuple):
    """ΔW = B A of one expert at one module: `B` [d_out, r], scale included, `A` [r, d_in], both float64."""

    B: Tensor
    A: Tensor


def change_of(weights: LoraWeights) -> Change:
    """s B A of a linear module; of DoRA its low-rank part."""
    device = torch.device("cpu") if weights.A.device.type == "mps" else weights.A.device  # which has no float64
    B, A = (factor.detach().to(device, torch.float64) for factor in (weights.B, weights.A))
    return Change(weights.scale * B, A)


def added(changes: Sequence[Change], coefficients: Sequence[float]) -> Change:
    """Σ_i c_i ΔW_i, of the rank that all of them have together. They have the same d_in and d_out."""
    B = torch.cat([c * change.B for c, change in zip(coefficients, changes, strict=True)], dim=1)
    return Change(B, torch.cat([change.A for change in changes]))


def stacked(changes: Sequence[Change]) -> Change:
    """[ΔW_1; ΔW_2; …], one above the other: what modules with one common input make of it together."""
    return Change(torch.block_diag(*[change.B for change in changes]), torch.cat([change.A for change in changes]))


def row_space(change: Change) -> Tensor:
    """M = R_B A [min(d_out, r), d_in], for which ‖M x‖ = ‖ΔW x‖ for every x."""
    return torch.linalg.qr(change.B, mode="r").R @ change.A


def right_singular(change: Change) -> tuple[Tensor, Tensor]:
    """Singular values [m], largest first, and right singular vectors as rows [m, d_in]; m is at most the rank."""
    Q, R = torch.linalg.qr(change.A.T)
    middle = torch.linalg.qr(change.B, mode="r").R @ R.T
    _, sigma, V = torch.linalg.svd(middle, full_matrices=False)
    return sigma, V @ Q.T


def truncated(change: Change, rank: int) -> tuple[Change, float]:
    """The nearest change of that rank, with singular values split over both factors; ‖rest‖_F / ‖ΔW‖_F.

    Eckart and Young 1936: no other of that rank is nearer.
    """
    Q_A, R_A = torch.linalg.qr(change.A.T)
    Q_B, R_B = torch.linalg.qr(change.B)
    U, sigma, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    total = sigma.norm()
    error = float(sigma[rank:].norm() / total) if total > 0 else 0.0
    return Change(Q_B @ U[:, :rank] * root, (root[:, None] * V[:rank]) @ Q_A.T), error


def lora_of(change: Change) -> LoraWeights:
    """The change as LoRA weights of scale 1."""
    return LoraWeights(A=change.A, B=change.B, alpha=float(change.A.shape[0]))


def require_lora(weights: Any, *, router: str, expert: str, site: str) -> LoraWeights:
    """`weights` if they are LoRA's (or DoRA's) at a linear module; ValueError otherwise."""
    if isinstance(weights, LoraWeights) and weights.kind == "linear":
        return weights
    what = f"LoRA at a {weights.kind}" if isinstance(weights, LoraWeights) else type(weights).__name__
    raise ValueError(
        f"router={router} goes by the low-rank change of each expert at linear modules, and {expert!r} has {what} at "
        f"{site}: leave that expert out, or choose another router"
    )
