"""What a bank is whose experts change how a module is called, and not what it gives: prefixes, prompts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mole.mixtures.banks.bank import Bank
from mole.routing import Routing


class CallBank(Bank):
    """Experts at a module that is called in another way because of them; see mixtures/call_mixture.py."""

    def call(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> Any:
        """What `base` gives for these arguments with the experts at work."""
        raise NotImplementedError

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """Not defined: they add nothing to an output."""
        raise ValueError(f"{self.kind} experts have no output of their own that a router could read or weigh")
