"""What every bank is: the experts of one kind at one mixed module, and how they spend a routing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mole.adapters import LoraWeights
from mole.routing import Routing


class Bank(nn.Module):
    """Experts at one module; `present` are the mixture indices of those that have something here.

    The others add nothing here, and the weight that a routing gives them is lost. What experts hold are parameters,
    frozen unless asked otherwise (no buffers: data-parallel training would broadcast buffers at every forward).
    `takes` says what decides the gates of the module's rows: its input, tokens with `features` [B, T, d], token `ids`
    [B, T] or `channels` [B, C, *positions], or its `outputs` [B, T, d].
    A bank with an `own_dtype` stays in it when the model moves to another.
    """

    takes = "features"
    own_dtype: torch.dtype | None = None

    def __init__(self, present: Iterable[int], num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.present = tuple(sorted(present))
        self._make_tables(torch.device("cpu"))

    def _make_tables(self, device: torch.device) -> None:
        """Small tensors that follow the parameters. No buffers: see above."""
        self._present = torch.tensor(self.present, device=device)

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

    def local_weights(self, routing: Routing) -> Tensor:
        """The routing over the experts of this bank, dense: [1|B, 1|T, n]."""
        weights = routing.dense(self.num_experts)
        if len(self.present) == self.num_experts:
            return weights
        return weights.index_select(-1, self._present.to(weights.device))

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """`base_out`, which is not changed, and what the experts add to it for the input `x`, in its shape and dtype.

        `routing` fits `x`: [1|B, 1|T, K] for its tokens or positions.
        """
        raise NotImplementedError

    def spend(self, *, combine: str = "outputs", missing: str = "drop") -> None:
        """How routings are spent from now on, see `Combining`. Raises ValueError for what this bank cannot do."""
        if combine != "outputs":
            raise ValueError(f"combine={combine}: not for a {type(self).__name__}: use combine=outputs")
        self.missing = missing

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

    The first bank gets the module's own output, the next what the first made of it, and so on.
    """

    def __init__(self, banks: Iterable[Any]):
        super().__init__()
        self.banks: Any = nn.ModuleList(banks)
        self.num_experts = self.banks[0].num_experts
        self.present = tuple(sorted({e for bank in self.banks for e in bank.present}))
        self.takes = getattr(self.banks[0], "takes", "features")

    def requires_grad_(self, requires_grad: bool = True) -> BankOfBanks:
        for bank in self.banks:
            bank.requires_grad_(requires_grad)
        return self

    def spend(self, *, combine: str = "outputs", missing: str = "drop") -> None:
        """As a bank's."""
        for bank in self.banks:
            bank.spend(combine=combine, missing=missing)

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """As a bank's."""
        out = base_out
        for bank in self.banks:
            out = bank(out, x, routing)
        return out

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
