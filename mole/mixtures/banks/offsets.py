"""Biases of experts at one module: what an expert adds to every output, whatever the input.

`lora_bias` trains β in s (B A x + β); `bias="all"` and `"lora_only"` train the module's own bias, so that the expert
adds b_e − b_0. Either is gated as the rest of the expert is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mole.adapters import LoraWeights
from mole.mixtures.banks.bank import Bank
from mole.routing import Routing


class OffsetBank(Bank):
    """One vector [d_out] per expert.

    `scales` mixture index → s for biases of LoRA. `base_bias` is b_0 where the vectors are trained biases of the module
    itself. `channels_first` for convolutions. `gated=False` adds Σ_e s_e β_e whatever the routing, as PEFT's X-LoRA
    does. Raises ValueError for vectors of another length than the module's output. Linear in the vectors: combined by
    their parameters they come to the same.
    """

    kind = ""

    def __init__(
        self,
        offsets: Mapping[int, Tensor],
        num_experts: int,
        *,
        dtype: torch.dtype,
        scales: Mapping[int, float] | None = None,
        base_bias: Tensor | None = None,
        channels_first: bool = False,
        gated: bool = True,
    ):
        super().__init__(offsets, num_experts)
        rows = [offsets[e].detach().flatten().to(dtype) for e in self.present]
        self.offsets = nn.Parameter(torch.stack(rows), requires_grad=False)
        self.scales = None if scales is None else tuple(scales[e] for e in self.present)
        self._base_bias = None if base_bias is None else base_bias.detach()
        self.takes = "channels" if channels_first else "features"
        self.gated = gated

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """`x` [B, T, d] or [B, C, *positions]; only its shape matters."""
        weights = self.local_weights(routing)
        if not self.gated:
            weights = torch.ones_like(weights[:1, :1])
        offsets = self._added(weights.dtype)
        if weights.dim() == 4:  # [1|B, 1|T, Q, n]: each block of features with its weights
            share = torch.einsum("btqn,nqd->btqd", weights, offsets.unflatten(-1, (weights.shape[2], -1))).flatten(-2)
        else:
            share = weights @ offsets  # [1|B, 1|T, d_out]
        if self.takes == "channels":
            share = share.transpose(1, 2)
            share = share.reshape(*share.shape, *(1,) * (base_out.dim() - 3))
        elif base_out.dim() != x.dim():  # a flat view of the rows
            share = share.expand(*x.shape[:-1], -1).reshape(base_out.shape)
        return base_out + share.to(base_out.dtype)

    def check_parameters(self) -> None:
        """Nothing to refuse."""

    def _added(self, dtype: torch.dtype) -> Tensor:
        """What each expert adds, [n, d_out]: s_e β_e, or b_e − b_0."""
        offsets = self.offsets
        if self._base_bias is not None:
            offsets = offsets - self._base_bias.to(offsets.device, offsets.dtype)
        offsets = offsets.to(dtype)
        return offsets if self.scales is None else offsets * offsets.new_tensor(self.scales)[:, None]

    def inner(self, base_out: Tensor, x: Tensor, direction: Tensor) -> Tensor:
        """⟨δ_e, direction⟩ of every expert: [B, T, E], 0 for absent ones."""
        found = direction @ self._added(direction.dtype).T
        empty = found.new_zeros(*found.shape[:-1], self.num_experts)
        return empty.index_copy(-1, self._present.to(found.device), found)

    def completed(self, expert: int, weights: LoraWeights | None) -> LoraWeights | None:
        """`weights` with this expert's bias of LoRA in it."""
        if self.scales is None or weights is None or expert not in self.present:
            return weights
        return replace(weights, bias=self.offsets.detach()[self.present.index(expert)])

    def base_bias(self, expert: int) -> Tensor | None:
        """The bias of the module itself that this expert trained along."""
        if self.scales is not None or expert not in self.present:
            return None
        return self.offsets.detach()[self.present.index(expert)]
