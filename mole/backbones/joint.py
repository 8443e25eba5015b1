"""What joins the two ends of a split site: x and h of a sub-layer are held until the norm that closes it runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mole.backbones.sites import Site


class Joint:
    """Notes x and h of one site of `model` as they pass, by hooks on the modules that stand there now.

    Modules and their paths stay as they are; `remove` takes the hooks off again. Each forward of the block, one that is
    recomputed too, notes both before its norm asks.
    """

    def __init__(self, model: nn.Module, site: Site):
        self.site = site
        self.x: Tensor | None = None
        self.h: Tensor | None = None
        reads, gives = model.get_submodule(site.reads), model.get_submodule(site.gives)
        self.handles = (
            reads.register_forward_pre_hook(self._before, with_kwargs=True),
            gives.register_forward_hook(self._after),
        )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x = args[0] if args else kwargs["hidden_states"]

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.h = output[0] if isinstance(output, tuple) else output

    def take(self) -> tuple[Tensor, Tensor]:
        """h and x [B, T, d] of the forward that is under way; they are not held any longer."""
        h, x = self.h, self.x
        self.h = self.x = None
        assert h is not None, f"{self.site.norm} runs without the sub-layer that it closes"
        assert x is not None, f"{self.site.norm} runs without the sub-layer that it closes"
        return h, x

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()
