"""What PEFT's programs look at: the classifier's settings and sizes; and gates over all experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from mole.xlora.model import XLoraModel


class ClassifierView:
    """The router of an XLoraModel under the names of PEFT's classifier; all else is the router's own."""

    def __init__(self, model: XLoraModel):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.router, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.router(*args, **kwargs)

    @property
    def config(self) -> Any:
        return self._model.xlora_config

    @property
    def override_scaling_pass_value(self) -> float | None:
        return self._model.xlora_config.scaling_pass_value

    @property
    def n_layers(self) -> int:
        return len(self._model.layers)

    @property
    def n_classes(self) -> int:
        return self._model.shape.num_experts


def dense_gates(gates: Tensor, ids: Tensor | None, num_experts: int) -> Tensor:
    """Gates [..., K] of the experts `ids` → [..., E]; ids None: they are dense already."""
    if ids is None:
        return gates
    return gates.new_zeros(*gates.shape[:-1], num_experts).scatter(-1, ids, gates)
