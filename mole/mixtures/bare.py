"""A call of a mixture's backbone by itself, outside a forward of the mixture: routers that need no more work."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mole.mixtures.forward_routing import route
from mole.routing import RoutingInputs

# What only a forward of the mixture gives or makes.
BEYOND = ("task_names", "texts", "prompt_mask", "hidden_states", "encoder_states")


class BareCalls:
    """Hooks on the backbone of `model` that open a frame for such a call, and close it. They copy with the model.

    A call raises ValueError, naming the router and what it needs, if the router cannot work there.
    """

    def __init__(self, model: Any):
        self.model = model
        self.parameters = tuple(inspect.signature(model.backbone.forward).parameters)
        self.handles = (
            model.backbone.register_forward_pre_hook(self.before, with_kwargs=True),
            model.backbone.register_forward_hook(self.after, always_call=True),
        )

    def before(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Opens a frame where there is none."""
        model = self.model
        if model.context.current is not None:
            return
        for router in model.routers().values():
            if missing := [name for name in BEYOND if name in router.needs]:
                raise ValueError(
                    f"router={model.router_config.name} needs {', '.join(missing)}, which a call of the backbone by "
                    "itself does not give: call the mixture, as model(…); the plain backbone is inside of "
                    "model.experts_off(), or what model.unload() gives back"
                )
        inputs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        ids, mask = (_matrix(inputs.get(name)) for name in ("input_ids", "attention_mask"))
        frame = replace(model.new_frame(RoutingInputs(input_ids=ids, attention_mask=mask)), recording=False)
        frame.notes["bare"] = True
        with model.context.push(frame):
            route(model, frame, inputs)
        model.context.begin(frame)

    def after(self, backbone: nn.Module, args: Any, output: Any) -> None:
        """Closes it, also where the call failed."""
        frame = self.model.context.current
        if frame is not None and "bare" in frame.notes:
            self.model.context.end()

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()


def _matrix(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.dim() == 2 else None
