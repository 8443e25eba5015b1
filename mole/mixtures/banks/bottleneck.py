"""Bottleneck experts at one module: δ_e(z) = s_e (U_e σ_e(D_e z + b_e) + c_e), z the module's output or its input.

Stacked, a = σ(D z + b) of all experts in one product, gated column by column, and y = (a ∘ G) U + G c. Under weights
that are the same for every token, one expert after another: then each gives bit for bit what it gives alone. Combined
by parameters, all four tensors are averaged before the non-linearity: that is one bottleneck per token or example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole.adapters import BottleneckWeights
from mole.adapters.bottleneck import ACTIVATIONS, added
from mole.kernels import columns_of
from mole.mixtures.banks.bank import Bank
from mole.routing import Routing


class BottleneckBank(Bank):
    """Experts of which all read the module's output, or all its input; each with its size, activation and scale.

    `dropout` mixture index → the rate with which an expert drops what it reads while it trains; `expert_dropout` as of
    a LoraBank: off never, shared one mask for all experts of a rate (auto), independent a mask for each.
    """

    kind = "bottleneck"

    def __init__(
        self,
        experts: Mapping[int, BottleneckWeights],
        num_experts: int,
        *,
        dtype: torch.dtype,
        dropout: Mapping[int, float] | None = None,
        expert_dropout: str = "auto",
    ):
        super().__init__(experts, num_experts)
        members = [experts[e] for e in self.present]
        (self.reads,) = {member.reads for member in members}
        self.reads_output = self.reads == "output"
        self.sizes = tuple(member.rank for member in members)
        self.scales = tuple(member.scale for member in members)
        self.activations = tuple(member.activation for member in members)
        rates = dropout if dropout is not None and expert_dropout != "off" else {}
        self.dropout = tuple(rates.get(e, 0.0) for e in self.present)
        self.expert_dropout = expert_dropout

        def held(parts: list[Tensor], dim: int) -> nn.Parameter:
            return nn.Parameter(torch.cat([part.detach().to(dtype) for part in parts], dim=dim), requires_grad=False)

        self.down = held([m.down for m in members], 0)  # [R, d]
        self.down_bias = held([m.down_bias for m in members], 0)  # [R]
        self.up = held([m.up for m in members], 1)  # [d_out, R]
        self.up_bias = held([m.up_bias[None] for m in members], 0)  # [n, d_out]
        self.learned = tuple(m.gain is not None for m in members)
        gains = [torch.ones(1) if m.gain is None else m.gain for m in members]
        self.gain = held(gains, 0) if any(self.learned) else None  # [n]

    def check_parameters(self) -> None:
        """Raises ValueError unless all are of one size and activation."""
        if len(set(self.sizes)) > 1 or len(set(self.activations)) > 1:
            raise ValueError(
                f"combine=parameters: bottlenecks of sizes {self.sizes} and activations {self.activations} have no "
                "average: use combine=outputs"
            )

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """`x` [B, T, d_in]; `base_out` as many vectors [d_out] in any leading shape → its shape and dtype."""
        return base_out + self.delta(base_out, x, routing)

    def delta(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """What the experts add to `base_out`, in its shape and dtype."""
        weights = self.local_weights(routing)
        if weights.dim() == 4:
            raise ValueError("weights for blocks of features, and a bottleneck's features have no blocks: num_splits=1")
        seen = base_out.reshape(*x.shape[:-1], -1) if self.reads_output else x
        if routing.is_static and self.combine == "outputs" and not self._drops():
            return self._one_by_one(base_out, seen, weights)
        seen = seen.to(self.down.dtype)
        scaled = weights * self._scales(weights)
        if self.combine == "parameters":
            hidden = self._averaged(seen, weights, scaled)
        else:
            hidden = self._hidden(seen) * scaled.index_select(-1, columns_of(self.sizes, scaled.device))
        share = F.linear(hidden.to(seen.dtype), self.up) + scaled.to(seen.dtype) @ self.up_bias
        return share.to(base_out.dtype).reshape(base_out.shape)

    def _drops(self) -> bool:
        """Whether dropout acts now."""
        return self.training and self.down.requires_grad and any(self.dropout)

    def _scales(self, like: Tensor) -> Tensor:
        """s of every expert, [n]; of those that did not learn it their constant."""
        scales = like.new_tensor(self.scales)
        if self.gain is None:
            return scales
        return scales * torch.where(like.new_tensor(self.learned) > 0, self.gain.to(like.dtype), 1.0)

    def _one_by_one(self, base_out: Tensor, seen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(base_out)
        for place, expert in enumerate(self.present):
            update = added(self._member(expert), seen).to(base_out.dtype).reshape(base_out.shape)
            out = out + weights[..., place, None].to(base_out.dtype) * update
        return out

    def _hidden(self, seen: Tensor) -> Tensor:
        """σ(D z + b), [B, T, R]: in one product for neighbours of one activation and rate of dropout."""
        rates = self.dropout if self._drops() else (0.0,) * len(self.dropout)
        masks = list(enumerate(rates)) if self.expert_dropout == "independent" else [(0, rate) for rate in rates]
        masks = [mask if mask[1] else (0, 0.0) for mask in masks]
        inputs = {mask: F.dropout(seen, mask[1]) if mask[1] else seen for mask in dict.fromkeys(masks)}
        kinds = list(zip(self.activations, masks, strict=True))
        ends, found, start = list(accumulate(self.sizes)), [], 0
        for place, (activation, mask) in enumerate(kinds):
            if place + 1 < len(kinds) and kinds[place + 1] == (activation, mask):
                continue
            part = slice(start, ends[place])
            found.append(ACTIVATIONS[activation](F.linear(inputs[mask], self.down[part], self.down_bias[part])))
            start = ends[place]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def _averaged(self, seen: Tensor, weights: Tensor, scaled: Tensor) -> Tensor:
        """σ(Σ_e w_e (D_e z + b_e)) once for each expert, gated: [B, T, R]."""
        before = F.linear(seen, self.down, self.down_bias).unflatten(-1, (len(self.sizes), -1))
        hidden = ACTIVATIONS[self.activations[0]]((before * weights[..., None]).sum(-2))
        return (hidden[..., None, :] * scaled[..., None]).flatten(-2)

    def weights(self, expert: int) -> BottleneckWeights | None:  # type: ignore[override]
        """The tensors of the expert with that mixture index, as views of the bank; None if it has none here."""
        if expert not in self.present:
            return None
        found = self._member(expert)
        tensors = {name: value.detach() for name, value in vars(found).items() if isinstance(value, Tensor)}
        return replace(found, **tensors)

    def _member(self, expert: int) -> BottleneckWeights:
        place = self.present.index(expert)
        start = sum(self.sizes[:place])
        part = slice(start, start + self.sizes[place])
        return BottleneckWeights(
            down=self.down[part],
            down_bias=self.down_bias[part],
            up=self.up[:, part],
            up_bias=self.up_bias[place],
            gain=self.gain[place, None] if self.gain is not None and self.learned[place] else None,
            activation=self.activations[place],
            scale=self.scales[place],
            reads=self.reads,
        )
