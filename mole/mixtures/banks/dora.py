"""DoRA experts at one linear module (Liu et al., 2024, arXiv 2402.09353).

    ν_e = m_e / ‖W + s_e B_e A_e‖ (row by row);   δ_e(x) = (ν_e − 1) ∘ W x + ν_e ∘ s_e B_e A_e x

Gated and summed that is one elementwise product with what the module gave, without its bias, and a LoRA with
diag(ν_e) B_e. The norm is no part of the gradient, as in the paper; of frozen experts it is a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mole.adapters import LoraWeights
from mole.backbones.modules import dense_weight
from mole.kernels import LoraStack
from mole.mixtures.banks.lora import LoraBank
from mole.routing import Routing


class DoraBank(LoraBank):
    """As a LoraBank, with a magnitude for each expert.

    `base` is the module: of it are read the weight, once, and the bias.
    """

    kind = "dora"
    reads_output = True

    def __init__(self, experts: Mapping[int, LoraWeights], num_experts: int, *, base: nn.Module, **options: Any):
        super().__init__(experts, num_experts, **options)
        rows = [experts[e].magnitude for e in self.present]
        flat = [row.detach().flatten() for row in rows if row is not None]
        self.magnitude = nn.Parameter(torch.stack(flat).to(self.A.dtype), requires_grad=False)
        self._base = (base,)  # in a tuple: it is the mixture layer's, and no part of the bank
        self._norm: Tensor | None = None

    def requires_grad_(self, requires_grad: bool = True) -> DoraBank:
        self._norm = None  # training may have changed the factors
        super().requires_grad_(requires_grad)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> DoraBank:
        self._norm = None
        super()._apply(fn, recurse)
        return self

    def ratio(self) -> Tensor:
        """ν [n, d_out]: the trained length of each row of the weight over the length that it has."""
        norm = self._norm
        if norm is None or norm.device != self.magnitude.device or self.A.requires_grad:
            norm = self._norm = self._row_lengths()
        return self.magnitude / norm

    @torch.no_grad()
    def _row_lengths(self) -> Tensor:
        """‖W + s B A‖ of each expert and row, [n, d_out]."""
        weight = dense_weight(self._base[0]).to(self.A.device)
        rows = []
        for place, part in enumerate(super()._stack().slices()):
            A, B = self.A[part].to(weight.dtype), self.B[:, part].to(weight.dtype)
            rows.append(torch.linalg.vector_norm(torch.addmm(weight, B, A, alpha=self.scales[place]), dim=1))
        return torch.stack(rows)

    def _stack(self) -> LoraStack:
        """The stack with diag(ν_e) B_e in the place of B_e."""
        stack = super()._stack()
        lengths = self.ratio().index_select(0, stack.column_experts()).T
        return stack._replace(B=(stack.B * lengths).to(stack.B.dtype))

    def check_parameters(self) -> None:
        """Raises ValueError: there is no such sum."""
        raise ValueError(
            "combine=parameters: what DoRA's experts do is not linear in A and B, and nothing says how to mix their "
            "magnitudes: use combine=outputs"
        )

    def _own(self, base_out: Tensor, x: Tensor) -> Tensor:
        """W x, [B, T, d_out]."""
        bias = getattr(self._base[0], "bias", None)
        return (base_out if bias is None else base_out - bias).reshape(*x.shape[:-1], -1)

    def _spent(self, base_out: Tensor, x: Tensor, routing: Routing, start: Tensor | None) -> Tensor:
        """`base_out` is what the module itself gave."""
        gates = self.local_weights(routing)
        share = (gates @ (self.ratio() - 1).to(gates.dtype)) * self._own(base_out, x)
        share = share.reshape(base_out.shape).to(base_out.dtype)
        return super()._spent(base_out, x, routing, share if start is None else start + share)

    def inner(self, base_out: Tensor, x: Tensor, direction: Tensor) -> Tensor:
        """⟨δ_e(x), direction⟩ of every expert: [B, T, E], 0 for absent ones."""
        own = (direction * self._own(base_out, x)) @ (self.ratio() - 1).to(direction.dtype).T
        found = super().inner(base_out, x, direction)
        return found.index_add(-1, self._present.to(found.device), own.to(found.dtype))

    def weights(self, expert: int) -> LoraWeights | None:
        """The weights of the expert with that mixture index, as views of the bank; None if it has none here."""
        if expert not in self.present:
            return None
        place = self.present.index(expert)
        part = super()._stack().slices()[place]
        alpha, rslora = self.alphas[place]
        A, B = self.A.detach()[part], self.B.detach()[:, part]
        return LoraWeights(A=A, B=B, alpha=alpha, rslora=rslora, magnitude=self.magnitude.detach()[place])
