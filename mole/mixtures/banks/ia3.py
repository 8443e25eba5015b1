"""IA3 experts at one linear module: δ_e = (l_e − 1) ∘ f(x), or W ((l_e − 1) ∘ x) where they multiply its input.

Either is linear in l, so the weighted sum of the factors comes first, then one product: combining by outputs and by
parameters is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mole.adapters import Ia3Weights
from mole.mixtures.banks.bank import Bank
from mole.routing import Routing


class Ia3Bank(Bank):
    """Experts of which all multiply the module's output, or all its input. `base` is the module.

    The factors are held in float32 at least: near 1, what is less makes little of l − 1.
    """

    kind = "ia3"

    def __init__(self, experts: Mapping[int, Ia3Weights], num_experts: int, *, base: nn.Module, dtype: torch.dtype):
        super().__init__(experts, num_experts)
        members = [experts[e] for e in self.present]
        (self.feedforward,) = {member.feedforward for member in members}
        self.reads_output = not self.feedforward
        dtype = torch.promote_types(dtype, torch.float32)
        self.factors = nn.Parameter(torch.stack([m.factors.detach().to(dtype) for m in members]), requires_grad=False)
        self._base = (base,)  # in a tuple: it is the mixture layer's, and no part of the bank

    def check_parameters(self) -> None:
        """Nothing to refuse: the sum is linear in the factors."""

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """`x` [B, T, d_in]; `base_out` as many vectors [d_out] in any leading shape → its shape and dtype."""
        return base_out + self.delta(base_out, x, routing)

    def delta(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """What the experts add to `base_out`, in its shape and dtype."""
        change = self._change(self.local_weights(routing))
        if not self.feedforward:
            rows = base_out.reshape(*x.shape[:-1], -1)
            return (change * rows).to(base_out.dtype).reshape(base_out.shape)
        base = self._base[0]
        share, bias = base((change * x).to(x.dtype)), getattr(base, "bias", None)
        return (share if bias is None else share - bias).to(base_out.dtype).reshape(base_out.shape)

    def _change(self, weights: Tensor) -> Tensor:
        """Σ_e w_e (l_e − 1): weights [1|B, 1|T, n] → [1|B, 1|T, d]; [.., Q, n] weigh each block of features apart."""
        change = self.factors - 1
        weights = weights.to(change.dtype)
        if weights.dim() == 3:
            return weights @ change
        blocks = change.view(len(self.present), weights.shape[-2], -1)
        return torch.einsum("btqn,nqd->btqd", weights, blocks).flatten(-2)

    def weights(self, expert: int) -> Ia3Weights | None:  # type: ignore[override]
        """The factors of the expert with that mixture index, as a view of the bank; None if it has none here."""
        if expert not in self.present:
            return None
        return Ia3Weights(self.factors.detach()[self.present.index(expert)], self.feedforward)
