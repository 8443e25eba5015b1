"""A bank: the experts of one kind at one mixed module, stacked once; single experts are views of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mole.adapters import LoraWeights
from mole.kernels import LoraStack, choose
from mole.routing import EMPTY, Routing


class LoraBank(nn.Module):
    """LoRA experts at one module, each with its own rank, alpha and scale.

    `experts` mixture index → weights, for the experts that have weights here; the others add nothing here, and the
    weight that a routing gives them is lost. The stacked tensors are the parameters, frozen unless asked otherwise
    (parameters, not buffers: data-parallel training would broadcast buffers at every forward).
    """

    _scales: Tensor
    _present: Tensor
    _local: Tensor

    def __init__(
        self, experts: Mapping[int, LoraWeights], num_experts: int, *, dtype: torch.dtype, kernel: str = "auto"
    ):
        super().__init__()
        self.num_experts = num_experts
        self.present = tuple(sorted(experts))
        members = [experts[e] for e in self.present]
        self.ranks = tuple(m.rank for m in members)
        self.alphas = tuple((m.alpha, m.rslora) for m in members)
        self.A = nn.Parameter(torch.cat([m.A.detach().to(dtype) for m in members], dim=0), requires_grad=False)
        self.B = nn.Parameter(torch.cat([m.B.detach().to(dtype) for m in members], dim=1), requires_grad=False)
        local = torch.full((num_experts,), EMPTY)
        local[list(self.present)] = torch.arange(len(self.present))
        self.register_buffer("_scales", torch.tensor([m.scale for m in members]), persistent=False)
        self.register_buffer("_present", torch.tensor(self.present), persistent=False)
        self.register_buffer("_local", local, persistent=False)
        self._kernel = choose(kernel)

    def _local_weights(self, routing: Routing) -> Tensor:
        """The routing over the experts of this bank, dense: [1|B, 1|T, n]."""
        if routing.expert_ids is not None:
            ids = torch.where(routing.expert_ids >= 0, self._local[routing.expert_ids.clamp_min(0)], EMPTY)
            return Routing(routing.weights, ids).dense(len(self.present))
        if len(self.present) == self.num_experts:
            return routing.weights
        return routing.weights.index_select(-1, self._present)

    def delta(self, x: Tensor, routing: Routing) -> Tensor:
        """Σ_e w_e s_e B_e A_e x. `x` [B, T, d_in] → [B, T, d_out]."""
        stack = LoraStack(self.A, self.B, self._scales, self.ranks)
        return self._kernel(x, stack, self._local_weights(routing))

    def weights(self, expert: int) -> LoraWeights | None:
        """The weights of the expert with that mixture index, as views of the bank; None if it has none here."""
        if expert not in self.present:
            return None
        place = self.present.index(expert)
        part = LoraStack(self.A, self.B, self._scales, self.ranks).slices()[place]
        alpha, rslora = self.alphas[place]
        return LoraWeights(A=self.A.detach()[part], B=self.B.detach()[:, part], alpha=alpha, rslora=rslora)
