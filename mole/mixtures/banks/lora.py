"""LoRA experts at one linear module, stacked once; single experts are views of the stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole.adapters import LoraWeights
from mole.kernels import LoraStack, choose, columns_of, loop, spread_of
from mole.mixtures.banks.bank import Bank
from mole.registry import unknown
from mole.routing import Routing

EXPERT_DROPOUT = ("auto", "off", "shared", "independent")
EXPERT_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoraBank(Bank):
    """LoRA experts at one module, each with its own rank, alpha and scale.

    `experts` mixture index → weights, for the experts that have weights here; the others add nothing here, and the
    weight that a routing gives them is lost. The stacked tensors are the parameters, frozen unless asked otherwise
    (parameters, not buffers: data-parallel training would broadcast buffers at every forward).

    `dtype` is that of the module's computation, which `expert_dtype` auto takes; another one holds and computes the
    experts in that dtype, and stays when the model moves to another. `dropout` gives the rate of each expert, by
    mixture index, with which it drops its input while it trains:
    `expert_dropout` off never, shared one mask for all experts of a rate (auto), independent a mask for each, by the
    loop. Frozen experts drop nothing. Raises ValueError for an unknown setting.
    """

    def __init__(
        self,
        experts: Mapping[int, LoraWeights],
        num_experts: int,
        *,
        dtype: torch.dtype,
        kernel: str = "auto",
        dropout: Mapping[int, float] | None = None,
        expert_dropout: str = "auto",
        expert_dtype: str = "auto",
    ):
        for name, value, known in (
            ("expert_dropout", expert_dropout, EXPERT_DROPOUT),
            ("expert_dtype", expert_dtype, tuple(EXPERT_DTYPES)),
        ):
            if value not in known:
                raise ValueError(unknown(name, value, known))
        super().__init__(experts, num_experts)
        members = [experts[e] for e in self.present]
        self.ranks = tuple(m.rank for m in members)
        self.alphas = tuple((m.alpha, m.rslora) for m in members)
        self.scales = tuple(m.scale for m in members)
        self.dropout = tuple((dropout or {}).get(e, 0.0) for e in self.present)
        self.expert_dropout = expert_dropout
        self.own_dtype = EXPERT_DTYPES[expert_dtype]
        dtype = self.own_dtype or dtype
        self.A = nn.Parameter(torch.cat([m.A.detach().to(dtype) for m in members], dim=0), requires_grad=False)
        self.B = nn.Parameter(torch.cat([m.B.detach().to(dtype) for m in members], dim=1), requires_grad=False)
        self._kernel = choose(kernel)
        self._make_tables(self.A.device)

    def _make_tables(self, device: torch.device) -> None:
        super()._make_tables(device)
        if hasattr(self, "A"):  # not while Bank is being built
            precision = torch.promote_types(self.A.dtype, torch.float32)
            self._scales = torch.tensor(self.scales, device=device, dtype=precision)
            self._columns = columns_of(self.ranks, device)
            self._spread = spread_of(self._columns, self._scales)

    def _stack(self) -> LoraStack:
        A = self.A
        if self._scales.device != A.device:  # moved by what sets parameters one by one
            self._make_tables(A.device)
        return LoraStack(A, self.B, self._scales, self.ranks, self._columns, self._spread)

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """base_out + Σ_e w_e s_e B_e A_e x, in the shape and dtype of `base_out`, which is not changed.

        `x` [B, T, d_in]; `base_out` as many vectors [d_out] in any leading shape.
        """
        stack = self._stack()
        weights = self.local_weights(routing)
        if self.own_dtype is not None:
            x = x.to(self.own_dtype)
        if self.training and self.A.requires_grad and self.expert_dropout != "off" and any(self.dropout):
            return self._with_dropout(base_out, x, stack, weights)
        return self._kernel(x, stack, weights, base_out)

    def _with_dropout(self, base_out: Tensor, x: Tensor, stack: LoraStack, weights: Tensor) -> Tensor:
        if self.expert_dropout == "independent":
            return loop(x, stack, weights, base_out, dropout=self.dropout)
        for rate in sorted(set(self.dropout)):
            part, columns = self._part(stack, [i for i, p in enumerate(self.dropout) if p == rate])
            base_out = self._kernel(F.dropout(x, rate), part, weights[..., columns], base_out)
        return base_out

    def _part(self, stack: LoraStack, places: list[int]) -> tuple[LoraStack, Any]:
        """The stack of some of the experts, and where their weights are."""
        if len(places) == len(self.present):
            return stack, slice(None)
        slices = stack.slices()
        ranks = tuple(self.ranks[i] for i in places)
        A = torch.cat([stack.A[slices[i]] for i in places], dim=0)
        B = torch.cat([stack.B[:, slices[i]] for i in places], dim=1)
        return LoraStack(A, B, stack.scales[places], ranks), places

    def weights(self, expert: int) -> LoraWeights | None:
        """The weights of the expert with that mixture index, as views of the bank; None if it has none here."""
        if expert not in self.present:
            return None
        place = self.present.index(expert)
        part = self._stack().slices()[place]
        alpha, rslora = self.alphas[place]
        return LoraWeights(A=self.A.detach()[part], B=self.B.detach()[:, part], alpha=alpha, rslora=rslora)
