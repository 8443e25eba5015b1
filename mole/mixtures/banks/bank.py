"""What every bank is: the experts of one kind at one mixed module, and how they spend a routing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mole.adapters import LoraWeights
from mole.registry import unknown
from mole.routing import Routing

COMBINE = ("outputs", "parameters")
MISSING = ("drop", "renormalise")


class Bank(nn.Module):
    """Experts at one module; `present` are the mixture indices of those that have something here.

    The others add nothing here, and the weight that a routing gives them is lost, unless `spend` said otherwise. What
    experts hold are parameters, frozen unless asked otherwise (no buffers: data-parallel training would broadcast
    buffers at every forward).
    `takes` says what decides the gates of the module's rows: its input, tokens with `features` [B, T, d], token `ids`
    [B, T] or `channels` [B, C, *positions], or its `outputs` [B, T, d].
    A bank with an `own_dtype` stays in it when the model moves to another. `combine` and `missing` are those of
    `spend`. `kind` is what its experts are; "" of a bank that holds only a further part of them. `reads_output`: what
    its experts do goes by the module's own output. `mixes_base`: it gives the backbone the weight that the routing has
    for it; else the layer does.
    """

    takes = "features"
    own_dtype: torch.dtype | None = None
    combine = "outputs"
    missing = "drop"
    kind = "expert"
    reads_output = False
    mixes_base = False

    def __init__(self, present: Iterable[int], num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.present = tuple(sorted(present))
        self._among = self.present
        self._make_tables(torch.device("cpu"))

    def _make_tables(self, device: torch.device) -> None:
        """Small tensors that follow the parameters. No buffers: see above."""
        self._present = torch.tensor(self.present, device=device)
        # By id + 1, with one more place at either end, for ids of nobody.
        places, in_all = [-1] * (self.num_experts + 2), [False] * (self.num_experts + 2)
        for place, expert in enumerate(self.present):
            places[expert + 1] = place
        for expert in self._among:
            in_all[expert + 1] = True
        self._places = torch.tensor(places, device=device)
        self._present_in_all = torch.tensor(self._among, device=device)
        self._in_all = torch.tensor(in_all, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bank:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if self.own_dtype is None or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        first = next(self.parameters(), None)
        self._make_tables(torch.device("cpu") if first is None else first.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Contiguous copies where the bank keeps views, as trainers hand the tensors to safetensors."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            own = [f"{prefix}{name}" for name, parameter in self._parameters.items() if parameter is not None]
            destination.update({name: destination[name].contiguous() for name in own})

    def spend(self, *, combine: str = "outputs", missing: str = "drop", among: Iterable[int] | None = None) -> None:
        """How routings are spent from now on.

        `combine` outputs, or parameters where the kind of bank has such a sum; `missing` drop: the weight of experts
        that are absent is lost, renormalise: it goes to those present in proportion, `among` all that the module has in
        several banks. Raises ValueError for what this bank cannot do.
        """
        for name, value, known in (("combine", combine, COMBINE), ("missing", missing, MISSING)):
            if value not in known:
                raise ValueError(unknown(name, value, known))
        if combine == "parameters":
            self.check_parameters()
        self.combine, self.missing = combine, missing
        self._among = self.present if among is None else tuple(sorted(among))
        self._make_tables(self._present.device)

    def check_parameters(self) -> None:
        """Raises ValueError, with the reason, unless these experts can be combined by their parameters."""
        raise ValueError(
            f"combine=parameters: a {type(self).__name__} mixes no parameters of its experts: use combine=outputs"
        )

    def local_weights(self, routing: Routing) -> Tensor:
        """The routing over the experts of this bank, dense: [1|B, 1|T, n]; [1|B, 1|T, Q, n] if it has blocks.

        Raises ValueError for blocks where experts are combined by their outputs.
        """
        if routing.weights.dim() == 4 and self.combine == "outputs":
            raise ValueError(
                f"this routing has weights for {routing.num_blocks} blocks of features: they belong to "
                "combine=parameters"
            )
        weights = routing.dense(self.num_experts)
        if len(self.present) == self.num_experts:
            return weights
        device = weights.device
        found = weights.index_select(-1, self._present.to(device))
        if self.missing == "renormalise" and len(self._among) < self.num_experts:
            found = found * _share(weights, weights.index_select(-1, self._present_in_all.to(device)))
        return found

    def local_choice(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """The routing's choice as places in this bank: weights [1|B, 1|T, K], and ids in their shape, -1 for nobody.

        `routing` has ids, and no blocks.
        """
        weights, ids = routing.weights, routing.expert_ids
        assert ids is not None
        ids = ids.expand_as(weights)
        if len(self.present) == self.num_experts:
            return weights, ids  # kernels take ids from n on as nobody's
        found = self._places.to(ids.device)[ids.clamp(-1, self.num_experts) + 1]
        if self.missing == "renormalise" and len(self._among) < self.num_experts:
            known = (ids >= 0) & (ids < self.num_experts)
            here = self._in_all.to(ids.device)[ids.clamp(-1, self.num_experts) + 1]
            weights = weights * _share(weights * known, weights * here)
        return weights, found

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """`base_out`, which is not changed, and what the experts add to it for the input `x`, in its shape and dtype.

        `routing` fits `x`: [1|B, 1|T, K] for its tokens or positions.
        """
        raise NotImplementedError

    def delta(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """What the experts add to `base_out`, in its shape and dtype; as `forward`, which adds it."""
        return self(base_out, x, routing) - base_out

    def inner(self, base_out: Tensor, x: Tensor, direction: Tensor) -> Tensor:
        """⟨δ_e(x), direction⟩ of every expert of the mixture: `direction` [B, T, d_out] → [B, T, E], 0 for absent ones.

        One expert after another, so that nothing of size [B, T, E, d_out] is made.
        """
        found: list[Tensor | None] = [None] * self.num_experts
        for expert in self.present:
            alone = Routing(direction.new_ones(1, 1, 1), torch.full((1, 1, 1), expert, device=direction.device))
            share = self.delta(base_out, x, alone).reshape(direction.shape)
            found[expert] = (share * direction).sum(-1)
        nothing = direction.new_zeros(direction.shape[:-1])
        return torch.stack([nothing if part is None else part for part in found], dim=-1)

    def weights(self, expert: int) -> LoraWeights | None:
        """The LoRA weights of the expert with that mixture index, as views of the bank; None if it has none here."""
        return None

    def base_bias(self, expert: int) -> Tensor | None:
        """The bias of the module itself that this expert trained along."""
        return None

    def full_module(self, expert: int) -> dict[str, Tensor] | None:
        """The whole module that this expert trained along: name → tensor."""
        return None


class BankOfBanks(nn.Module):
    """Several banks at one module, of which each adds its part: experts of unlike kinds, or one with several parts.

    Each bank adds to what those before it made; what it reads of the module's output is the module's own.
    """

    def __init__(self, banks: Iterable[Any]):
        super().__init__()
        self.banks: Any = nn.ModuleList(banks)
        self.num_experts = self.banks[0].num_experts
        self.present = tuple(sorted({e for bank in self.banks for e in bank.present}))
        self.takes = getattr(self.banks[0], "takes", "features")
        self.mixes_base = any(bank.mixes_base for bank in self.banks)

    def requires_grad_(self, requires_grad: bool = True) -> BankOfBanks:
        for bank in self.banks:
            bank.requires_grad_(requires_grad)
        return self

    def spend(self, *, combine: str = "outputs", missing: str = "drop") -> None:
        """As a bank's. Raises ValueError for parameters of experts of several kinds."""
        kinds = sorted({bank.kind for bank in self.banks} - {""})
        if combine == "parameters" and len(kinds) > 1:
            raise ValueError(
                f"combine=parameters: experts of different kinds, {' and '.join(kinds)}, share no parameters: use "
                "combine=outputs"
            )
        for bank in self.banks:
            bank.spend(combine=combine, missing=missing, among=self.present)

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """As a bank's."""
        out = base_out
        for bank in self.banks:
            if bank.reads_output and out is not base_out:
                out = out + bank.delta(base_out, x, routing)
            else:
                out = bank(out, x, routing)
        return out

    def delta(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """As a bank's."""
        found = self.banks[0].delta(base_out, x, routing)
        for bank in self.banks[1:]:
            found = found + bank.delta(base_out, x, routing)
        return found

    def inner(self, base_out: Tensor, x: Tensor, direction: Tensor) -> Tensor:
        """As a bank's."""
        found = self.banks[0].inner(base_out, x, direction)
        for bank in self.banks[1:]:
            found = found + bank.inner(base_out, x, direction)
        return found

    def weights(self, expert: int) -> LoraWeights | None:
        """The LoRA weights of the expert, put together from the parts; None if it has none here."""
        found = None
        for bank in self.banks:
            found = bank.completed(expert, found) if hasattr(bank, "completed") else bank.weights(expert) or found
        return found

    def base_bias(self, expert: int) -> Tensor | None:
        """The bias of the module itself that this expert trained along."""
        parts = [bank.base_bias(expert) for bank in self.banks if hasattr(bank, "base_bias")]
        return next((part for part in parts if part is not None), None)

    def full_module(self, expert: int) -> dict[str, Tensor] | None:
        """As a bank's: none, whole modules have no parts."""
        return None


def _share(every: Tensor, here: Tensor) -> Tensor:
    """By what to multiply the weights of those present so that they have the mass of all, [.., 1]; 1 if they have none.

    The mass is that of absolute weights: weights may be negative.
    """
    mass = here.abs().sum(-1, keepdim=True)
    return torch.where(mass > 0, every.abs().sum(-1, keepdim=True) / (mass + (mass == 0)), 1.0)
