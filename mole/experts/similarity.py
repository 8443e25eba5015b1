"""How alike experts are, from their factors alone: inner products of updates, embeddings, interference.

⟨ΔW_e, ΔW_f⟩ = s_e s_f Σ (B_eᵀ B_f) ∘ (A_e A_fᵀ), summed over modules: no update is ever made whole, and the result does
not depend on how an expert's factors are rotated. Of DoRA the low-rank part is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from mole.adapters import Adapter, LoraWeights

_BLOCK = 1 << 22  # entries of an update that are made at a time


def inner_product(B: Tensor, A: Tensor, D: Tensor, C: Tensor) -> float:
    """⟨B A, D C⟩ for B [d_out, r], A [r, d_in], D [d_out, q], C [q, d_in], in O(r q (d_in + d_out))."""
    return float(((B.T @ D) * (A @ C.T)).sum())


def flat_factors(weights: LoraWeights) -> tuple[Tensor, Tensor]:
    """s B [d_out, r] and A [r, d_in] in float64; a convolution's kernel counts as input.

    Raises ValueError for a convolution with groups and for weights that are no LoRA factors.
    """
    if not isinstance(weights, LoraWeights):
        raise ValueError(f"{type(weights).__name__} holds no LoRA factors: only experts with such are compared")
    if weights.kind == "convolution" and weights.B.shape[1] != weights.rank:
        raise ValueError("a convolution with groups is no single product of factors")
    return weights.scale * weights.B.detach().double().flatten(1), weights.A.detach().double().flatten(1)


def gram(experts: Mapping[str, Adapter]) -> Tensor:
    """G [E, E] in float64, G_ef = ⟨ΔW_e, ΔW_f⟩ over all modules, in the order of `experts`.

    A module that an expert does not adapt counts as zero. Raises ValueError, naming expert and module, where experts
    were made for unlike modules.
    """
    total = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for path in _paths(experts):
        parts = _factors_at(path, experts)
        B, A = torch.cat([b for b, _ in parts.values()], 1), torch.cat([a for _, a in parts.values()])
        products = (B.T @ B) * (A @ A.T)
        owner = torch.cat([torch.full((len(a),), index) for index, (_, a) in parts.items()])
        sums = torch.zeros(len(owner), len(experts), dtype=torch.float64).index_add_(1, owner, products)
        total.index_add_(0, owner, sums)
    return total


def cosines(G: Tensor) -> Tensor:
    """cos [E, E] of a Gram matrix; 0 where an update is zero."""
    norms = G.diagonal().clamp_min(0).sqrt()
    return G / (norms[:, None] * norms).masked_fill_(norms[:, None] * norms == 0, torch.inf)


def distances(G: Tensor) -> Tensor:
    """‖ΔW_e − ΔW_f‖ [E, E] of a Gram matrix."""
    squares = G.diagonal()
    return (squares[:, None] + squares - 2 * G).clamp_min(0).sqrt()


def svd_embedding(G: Tensor, num_components: int = 64) -> Tensor:
    """One row of length 1 for each expert, [E, k]: the left singular vectors of the E updates, times their values.

    G = U Λ Uᵀ gives U_k √Λ_k, exactly what the SVD of the E × D matrix of whole updates would.
    """
    values, vectors = torch.linalg.eigh((G + G.T) / 2)
    order = values.argsort(descending=True)[: min(num_components, len(G))]
    rows = vectors[:, order] * values[order].clamp_min(0).sqrt()
    return torch.nn.functional.normalize(rows, dim=1)


def parameter_embedding(experts: Mapping[str, Adapter], *, sparsity: float = 0.0, num_components: int = 64) -> Tensor:
    """As `svd_embedding`, of the raw factors in sorted order of names; the `sparsity` smallest entries count as zero.

    It depends on how an expert's factors are rotated: for comparison with libraries that embed parameters. Raises
    ValueError for experts of unlike modules or ranks.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: wanted from 0 to below 1")
    rows, wanted = [], None
    for name, adapter in experts.items():
        tensors = adapter.tensors()
        shapes = {key: tuple(tensors[key].shape) for key in sorted(tensors)}
        if wanted is not None and shapes != wanted:
            raise ValueError(f"expert {name!r} has other tensors than the first: compare updates instead (gram)")
        wanted = shapes
        row = torch.cat([tensors[key].detach().double().flatten() for key in shapes])
        if cut := int(sparsity * row.numel()):
            row = row.masked_fill(row.abs() <= row.abs().kthvalue(cut).values, 0.0)
        rows.append(row)
    X = torch.stack(rows)
    return svd_embedding(X @ X.T, num_components)


@dataclass(frozen=True)
class Interference:
    """How much two experts get in each other's way, means over the modules that both adapt.

    `cosine` of their updates (over all modules); `overlap` of what they read, ‖Q_eᵀ Q_f‖² / min(r) for orthonormal
    bases of the rows of A, from 0 to 1; `sign_agreement`, the share of entries with the same sign, ½ by chance.
    """

    first: str
    second: str
    cosine: float
    overlap: float
    sign_agreement: float


def interference(experts: Mapping[str, Adapter]) -> list[Interference]:
    """One report for each pair of experts; NaN where no module is adapted by both."""
    cosine, names = cosines(gram(experts)), list(experts)
    found = []
    for i, j in combinations(range(len(names)), 2):
        shared = [path for path in experts[names[i]].modules if path in experts[names[j]].modules]
        rows = [_between(*(flat_factors(experts[names[e]].modules[path]) for e in (i, j))) for path in shared]
        overlap, agreement = (sum(column) / len(rows) for column in zip(*rows, strict=True)) if rows else (_NAN, _NAN)
        found.append(Interference(names[i], names[j], float(cosine[i, j]), overlap, agreement))
    return found


_NAN = float("nan")


def _between(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Overlap of the rows read, and the share of entries with equal signs."""
    Q, P = (torch.linalg.qr(A.T)[0] for _, A in (one, other))
    overlap = float((Q.T @ P).square().sum()) / min(Q.shape[1], P.shape[1])
    (B, A), (D, C) = one, other
    step = max(1, _BLOCK // A.shape[1])
    same = sum(
        int(((B[i : i + step] @ A).sign() == (D[i : i + step] @ C).sign()).sum()) for i in range(0, len(B), step)
    )
    return overlap, same / (B.shape[0] * A.shape[1])


def _paths(experts: Mapping[str, Adapter]) -> Sequence[str]:
    return sorted({path for adapter in experts.values() for path in adapter.modules})


def _factors_at(path: str, experts: Mapping[str, Adapter]) -> dict[int, tuple[Tensor, Tensor]]:
    """Index of an expert → its factors at that module. Raises ValueError if they are for unlike modules."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for index, (name, adapter) in enumerate(experts.items()):
        if path in adapter.modules:
            try:
                found[index] = flat_factors(adapter.modules[path])
            except ValueError as error:
                raise ValueError(f"expert {name!r} at {path}: {error}") from error
    shapes = {(B.shape[0], A.shape[1]) for B, A in found.values()}
    if len(shapes) > 1:
        raise ValueError(f"{path}: the experts were made for unlike modules ({sorted(shapes)})")
    return found
