"""Whole modules that experts trained along, mixed: y = M_0(x) + Σ_e w_e (M_e(x) − M_0(x)). Exact, E modules large.

Of modules that are linear in their parameters that is the mix of their parameters as well.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mole.mixtures.banks.bank import Bank
from mole.routing import Routing


class ModuleBank(Bank):
    """Copies of `base`, each with the tensors of one expert. Its gates are those of the rows that the module gives."""

    takes = "outputs"
    kind = "whole module"
    reads_output = True

    def __init__(self, tensors: Mapping[int, Mapping[str, Tensor]], num_experts: int, *, base: nn.Module):
        super().__init__(tensors, num_experts)
        self.members = nn.ModuleList([filled(base, tensors[e]) for e in self.present])
        self.requires_grad_(False)

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """`x` is what the module takes; `base_out` [B, T, d], or [B, d] where it is pooled."""
        weights = self.local_weights(routing)
        out = base_out
        for place, member in enumerate(self.members):
            share = weights[..., place, None] * (member(x).reshape(base_out.shape) - base_out)
            out = out + share.to(base_out.dtype).reshape(base_out.shape)
        return out

    def check_parameters(self) -> None:
        """Raises ValueError for modules that are not linear in their parameters."""
        linear = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, Conv1D)
        if not isinstance(self.members[0], linear):
            raise ValueError(
                f"combine=parameters: a {type(self.members[0]).__name__} is not known to be linear in its parameters: "
                "use combine=outputs"
            )

    def full_module(self, expert: int) -> dict[str, Tensor] | None:
        """The whole module that this expert trained along: name → tensor."""
        if expert not in self.present:
            return None
        return {name: p.detach() for name, p in self.members[self.present.index(expert)].named_parameters()}


def filled(base: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `base` with these parameters, in its dtype. Raises ValueError for other names or shapes."""
    made = copy.deepcopy(base)
    parameters = dict(made.named_parameters())
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != given:
        raise ValueError(f"a whole module of {given} for one of {wanted}")
    for name, parameter in parameters.items():
        parameter.data = tensors[name].detach().to(parameter.device, parameter.dtype, copy=True)
    return made
