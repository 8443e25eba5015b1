"""LoRA experts at a convolution: A has its kernel, stride and padding, B is a convolution of kernel 1.

DoRA's experts too, where the kernel is 1: δ_e(x) = (ν_e − 1) ∘ W x + ν_e ∘ s_e B_e A_e x, channel by channel.
Combined by parameters: Σ_e w_e s_e B_e ∗ (Σ_e w_e A_e ∗ x).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole.adapters import LoraWeights
from mole.backbones.modules import dense_weight
from mole.kernels import check_ranks
from mole.mixtures.banks.bank import Bank
from mole.routing import Routing

_CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class ConvolutionBank(Bank):
    """Each expert with its own rank and scale; `base` is the convolution.

    A routing has one weight per example, or, where the kernel is 1, one per position of the last axis.
    """

    takes = "channels"
    kind = "lora"
    reads_output = True

    def __init__(self, experts: Mapping[int, LoraWeights], num_experts: int, *, base: nn.Module, dtype: torch.dtype):
        super().__init__(experts, num_experts)
        members = [experts[e] for e in self.present]
        self.alphas = tuple((m.alpha, m.rslora) for m in members)
        self.scales = tuple(m.scale for m in members)
        self.A = nn.ParameterList([nn.Parameter(m.A.detach().to(dtype), requires_grad=False) for m in members])
        self.B = nn.ParameterList([nn.Parameter(m.B.detach().to(dtype), requires_grad=False) for m in members])
        lengths = {str(i): m.magnitude for i, m in enumerate(members) if m.magnitude is not None}
        self.magnitude = nn.ParameterDict(
            {i: nn.Parameter(m.detach().to(dtype), requires_grad=False) for i, m in lengths.items()}
        )
        self._base: tuple[Any] = (base,)  # in a tuple: it is the mixture layer's, and no part of the bank

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """`x` [B, C, *positions]; `base_out` [B, C_out, *positions]. The experts one after another: they are few."""
        base = self._base[0]
        convolve = _CONVOLVE[self.A[0].dim()]
        weights = self.local_weights(routing)
        if weights.dim() == 4:
            raise ValueError("the channels of a convolution have no blocks that could have weights of their own")
        gates = weights.transpose(1, 2)  # [1|B, n, 1|T]
        gates = gates.reshape(*gates.shape[:2], *(1,) * (x.dim() - 3), gates.shape[2])
        plain = None
        out = base_out
        lows = [convolve(x, A.to(x.dtype), stride=base.stride, padding=base.padding) for A in self.A]
        if self.combine == "parameters":
            gated = [gates[:, place : place + 1] * low for place, low in enumerate(lows)]
            lows = [torch.stack(gated).sum(0).to(x.dtype)] * len(lows)
        for place, (low, scale) in enumerate(zip(lows, self.scales, strict=True)):
            B = self.B[place].to(x.dtype)
            delta = convolve(low, B, groups=base.groups) * scale
            if str(place) in self.magnitude:
                if plain is None:
                    plain = base_out if base.bias is None else base_out - base.bias.view(-1, *(1,) * (x.dim() - 2))
                ratio = self._ratio(place).to(delta.dtype)
                delta = (ratio - 1) * plain + ratio * delta
            out = out + (gates[:, place : place + 1] * delta).to(base_out.dtype)
        return out

    def check_parameters(self) -> None:
        """Raises ValueError for experts of unequal ranks, and for DoRA's."""
        check_ranks(tuple(A.shape[0] for A in self.A))
        if len(self.magnitude):
            raise ValueError("combine=parameters: DoRA's experts are not linear in A and B: use combine=outputs")

    def _ratio(self, place: int) -> Tensor:
        """ν [1, C_out, 1, …] of one expert with a magnitude."""
        with torch.no_grad():
            weight = dense_weight(self._base[0])
            A, B = self.A[place].to(weight.dtype), self.B[place].to(weight.dtype)
            moved = weight.flatten(1) + self.scales[place] * (B.flatten(1) @ A.flatten(1))
            norm = torch.linalg.vector_norm(moved, dim=1)
        return self.magnitude[str(place)] / norm.view_as(self.magnitude[str(place)])

    def weights(self, expert: int) -> LoraWeights | None:
        """The weights of the expert with that mixture index, as views of the bank; None if it has none here."""
        if expert not in self.present:
            return None
        place = self.present.index(expert)
        alpha, rslora = self.alphas[place]
        magnitude = self.magnitude[str(place)].detach() if str(place) in self.magnitude else None
        A, B = self.A[place].detach(), self.B[place].detach()
        return LoraWeights(A=A, B=B, alpha=alpha, rslora=rslora, magnitude=magnitude)
