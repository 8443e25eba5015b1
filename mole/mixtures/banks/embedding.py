"""LoRA experts at an embedding: y = base(ids) + ε Σ_e w_e s_e B_e A_e[:, ids]. Tokens are looked up, then gated.

Combined by parameters: y = base(ids) + ε Σ_e w_e s_e B_e (Σ_e w_e A_e[:, ids]).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole.adapters import LoraWeights
from mole.kernels import check_ranks, columns_of
from mole.mixtures.banks.bank import Bank
from mole.routing import Routing


class EmbeddingBank(Bank):
    """Each expert with its own rank and scale. `base` is the embedding: its padding_idx, and its scale ε, read live."""

    takes = "ids"
    kind = "lora"

    def __init__(self, experts: Mapping[int, LoraWeights], num_experts: int, *, base: nn.Module, dtype: torch.dtype):
        super().__init__(experts, num_experts)
        members = [experts[e] for e in self.present]
        self.ranks = tuple(m.rank for m in members)
        self.alphas = tuple((m.alpha, m.rslora) for m in members)
        self.scales = tuple(m.scale for m in members)
        # One row per token, so that a look-up reads what it needs in one piece.
        table = torch.cat([m.A.detach().to(dtype) for m in members], dim=0).T.contiguous()
        self.table = nn.Parameter(table, requires_grad=False)  # [vocabulary, R]
        self.B = nn.Parameter(torch.cat([m.B.detach().to(dtype) for m in members], dim=1), requires_grad=False)
        self._base = (base,)  # in a tuple: it is the mixture layer's, and no part of the bank

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """`x` int64 [B, T]; `base_out` [1|B, T, d]. One row of positions for all examples becomes a row for each."""
        weights = self.local_weights(routing)
        if weights.dim() == 4:
            raise ValueError("an embedding has no blocks of input features that could have weights of their own")
        low = F.embedding(x, self.table, padding_idx=getattr(self._base[0], "padding_idx", None))
        columns = columns_of(self.ranks, low.device)
        if self.combine == "parameters":
            mean = (low.unflatten(-1, (len(self.ranks), -1)) * weights[..., None]).sum(-2)
            low = mean.repeat(1, 1, len(self.ranks))
        weights = weights * weights.new_tensor(self.scales)
        delta = (low * weights.index_select(-1, columns)).to(self.B.dtype) @ self.B.T
        scale = getattr(self._base[0], "embed_scale", None)
        if scale is not None:
            delta = delta * (scale.to(delta.dtype) if isinstance(scale, Tensor) else scale)
        return base_out + delta.to(base_out.dtype)

    def check_parameters(self) -> None:
        """Raises ValueError for experts of unequal ranks."""
        check_ranks(self.ranks)

    def weights(self, expert: int) -> LoraWeights | None:
        """The weights of the expert with that mixture index, as views of the bank; None if it has none here."""
        if expert not in self.present:
            return None
        place = self.present.index(expert)
        start = sum(self.ranks[:place])
        part = slice(start, start + self.ranks[place])
        alpha, rslora = self.alphas[place]
        A, B = self.table.detach()[:, part].T, self.B.detach()[:, part]
        return LoraWeights(A=A, B=B, alpha=alpha, rslora=rslora, embedding=True)
