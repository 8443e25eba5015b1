"""Spectral router: every token goes to the experts whose update moves it most, z_te = ‖ΔW_e x_t‖, in any direction.

SpectR: Fleshman and Van Durme 2025, arXiv 2504.03454. ‖ΔW x‖ = ‖M x‖ for M = R A with B = Q R, which costs r·d a token
and not d² (SEQR: arXiv 2509.18093). `prefilter`: first Arrow's best, then the norm (LAG: arXiv 2507.05346).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mole.registry import ROUTERS, config_dataclass
from mole.routers.arrow import LowRankRouter
from mole.routers.base import MixtureShape
from mole.routers.float32 import at_least_float32
from mole.routers.general_knowledge import Subtracting
from mole.routers.low_rank import Change, row_space
from mole.routers.prototypes import ABSENT, Norm, Prototyped, normed
from mole.routers.selection import largest


@config_dataclass
class SpectralConfig(Prototyped, Subtracting):
    """‖ΔW_e x‖ / temperature, over the experts' norms made comparable if `calibrate` says so.

    `calibrate` zscore: less its mean and by its standard deviation over activations of a dataset; frobenius: by
    ‖ΔW_e‖_F. `prefilter` m: only for the m experts that Arrow prefers, null: for all.
    """

    name: Literal["spectral"] = "spectral"
    top_k: Annotated[int, Field(ge=1)] | None = 4
    temperature: Annotated[float, Field(gt=0)] | None = 1.0
    input_norm: Norm = "none"
    calibrate: Literal["none", "zscore", "frobenius"] = "none"
    prefilter: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self):
        problems = [*self.placing_problems(), *self.subtraction_problems(self.combine, self.missing)]
        if self.prefilter is not None and self.top_k is not None and self.prefilter < self.top_k:
            problems.append(
                f"router.prefilter={self.prefilter} leaves fewer experts than router.top_k={self.top_k}: raise it"
            )
        if problems:
            raise ValueError("\n".join(problems))


@ROUTERS.register("spectral", SpectralConfig)
class SpectralRouter(LowRankRouter):
    """Per token, per module or group of modules; nothing is learned.

    `matrices` [R, d] are the M_e one above the other, R = Σ r_e, and `owners` [R] says whose each row is; `mean` and
    `deviation` [E] are those of the norms over a dataset, `frobenius` [E] the sizes ‖ΔW_e‖_F.
    """

    matrices: Tensor
    owners: Tensor
    mean: Tensor
    deviation: Tensor
    frobenius: Tensor
    calibrated: Tensor

    def __init__(self, config: SpectralConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        assert self.input_dim is not None
        experts = shape.num_experts
        self.register_buffer("matrices", torch.zeros(0, self.input_dim))
        self.register_buffer("owners", torch.zeros(0, dtype=torch.long))
        self.register_buffer("mean", torch.zeros(experts))
        self.register_buffer("deviation", torch.ones(experts))
        self.register_buffer("frobenius", torch.zeros(experts))
        self.register_buffer("calibrated", torch.zeros(experts, dtype=torch.bool))

    def take_experts(self, weights: Sequence[Mapping[int, Any]]) -> None:
        """As Arrow's."""
        self.matrices, self.owners = self.matrices[:0], self.owners[:0]
        super().take_experts(weights)

    def _take(self, expert: int, changes: list[Change]) -> None:
        super()._take(expert, changes)
        rows = torch.cat([row_space(change) for change in changes])
        self.matrices = torch.cat([self.matrices, rows.to(self.matrices)])
        self.owners = torch.cat([self.owners, self.owners.new_full((len(rows),), expert)])
        self.frobenius[expert] = rows.norm().to(self.frobenius)

    def norms(self, x: Tensor) -> Tensor:
        """`x` [.., d] → ‖ΔW_e x‖ [.., E], exactly; 0 for experts that change nothing here."""
        matrices = at_least_float32(self.matrices)
        squares = (x.to(matrices.dtype) @ matrices.T).square()
        summed = squares.new_zeros(*squares.shape[:-1], self.shape.num_experts).index_add(-1, self.owners, squares)
        # A square root has no slope at 0: there the gradient is 0.
        return summed.clamp_min(torch.finfo(summed.dtype).tiny).sqrt()

    def check_state(self) -> None:
        """Raises ValueError for matrices of other experts."""
        fits = len(self.owners) == len(self.matrices) and self.matrices.shape[1] == self.input_dim
        if len(self.owners):
            fits = fits and 0 <= int(self.owners.min()) <= int(self.owners.max()) < self.shape.num_experts
        if not fits:
            raise ValueError("the matrices of the router are not those of these experts")

    def take_calibration(self, statistics: Mapping[int, tuple[float, float]]) -> None:
        """Mean and standard deviation of the norms over a dataset, by mixture index."""
        for expert, (mean, deviation) in statistics.items():
            self.mean[expert], self.deviation[expert] = mean, max(deviation, 1e-12)
            self.calibrated[expert] = True

    def carry(self, old: Any) -> None:
        """The statistics of the experts that are as they were; all else follows from the experts themselves."""
        for to, source in self.unchanged(old):
            for name in ("mean", "deviation", "calibrated"):
                getattr(self, name)[to] = getattr(old, name)[source]

    def scores(self, x: Tensor) -> Tensor:
        """`x` [B, T, d] → [B, T, E], `ABSENT` for experts that the prefilter leaves out."""
        x = normed(x, self.config.input_norm)
        m = self.config.prefilter
        if m is None or m >= self.shape.num_experts:
            return self._comparable(self.norms(x))
        likely = (x @ self._v().T).abs().masked_fill(~self._allowed(), ABSENT)
        kept = torch.zeros_like(likely, dtype=torch.bool).scatter(-1, largest(likely.detach(), m), True)
        return self._comparable(self._norms_of(x, kept)).masked_fill(~kept, ABSENT)

    def _norms_of(self, x: Tensor, kept: Tensor) -> Tensor:
        """As `norms`, computed only where `kept` [B, T, E] is true; a trace computes all."""
        if torch.compiler.is_compiling():
            return self.norms(x)
        matrices = at_least_float32(self.matrices)
        columns = []
        for expert in range(self.shape.num_experts):
            M = matrices[self.owners == expert]
            column = x.new_zeros(x.shape[:-1], dtype=matrices.dtype)
            where = kept[..., expert].nonzero(as_tuple=True)
            squares = (x[where].to(M.dtype) @ M.T).square().sum(-1)
            root = squares.clamp_min(torch.finfo(M.dtype).tiny).sqrt()
            columns.append(column.index_put(where, root))
        return torch.stack(columns, dim=-1)

    def _comparable(self, norms: Tensor) -> Tensor:
        if self.config.calibrate == "zscore":
            return (norms - self.mean) / self.deviation
        if self.config.calibrate == "frobenius":
            return norms / self.frobenius.clamp_min(torch.finfo(norms.dtype).tiny)
        return norms

    def _require_ready(self) -> None:
        if self._is_ready or torch.compiler.is_compiling():
            return
        super()._require_ready()
        if self.config.calibrate == "zscore" and not bool(self.calibrated[self._allowed()].all()):
            self._is_ready = False
            raise ValueError(
                "router.calibrate=zscore needs the norms over a dataset first: mole build-moe router=spectral "
                "router.calibrate=zscore dataset=[…]"
            )
