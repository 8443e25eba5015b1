"""Activation checkpointing of a mixture: the recomputation has to find the routing that its forward made."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from mole.routing import RoutingContext


def enable(backbone: Any, context: RoutingContext, kwargs: Mapping[str, Any] | None, **options: Any) -> None:
    """Switches it on in `backbone`, under whichever name its transformers has. Raises ValueError for reentrant mode."""
    given = {"use_reentrant": False, **(kwargs or {})}
    _refuse_reentrant(given)
    given["context_fn"] = context.checkpoint_contexts
    newer = getattr(backbone, "activation_checkpointing_enable", None)
    (newer or backbone.gradient_checkpointing_enable)(given, **options)


def bind(backbone: nn.Module, context: RoutingContext) -> None:
    """Lets checkpointing that is on already recompute under the routing of its forward.

    Raises ValueError, and changes nothing, where it is reentrant or of a kind that takes no context.
    """
    active = [module for module in backbone.modules() if getattr(module, "gradient_checkpointing", False)]
    functions = {module: getattr(module, "_gradient_checkpointing_func", None) for module in active}
    for module, function in functions.items():
        if not isinstance(function, partial):
            raise ValueError(
                f"the checkpointing of this backbone's {type(module).__name__} takes no context for its recomputation: "
                "switch it off before the mixture is built, and on again by its activation_checkpointing_enable"
            )
        _refuse_reentrant(function.keywords)
    for module, function in functions.items():
        assert isinstance(function, partial)
        keywords = {**function.keywords, "use_reentrant": False, "context_fn": context.checkpoint_contexts}
        module._gradient_checkpointing_func = partial(function.func, *function.args, **keywords)  # type: ignore


def _refuse_reentrant(given: Mapping[str, Any]) -> None:
    if given.get("use_reentrant", True):  # torch's own default
        raise ValueError(
            "reentrant gradient checkpointing recomputes outside the forward that made the routing; "
            "use gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
