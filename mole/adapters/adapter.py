"""What an adapter is: its weights apart from any model (`Adapter`), and its layer on a model (`AdapterLayer`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

# What joins the registry as a method: (config, model) → path of a module → what makes the new layer there, from a
# source of random numbers. Raises ValueError for a model that the method has no place in.
Maker = Callable[[torch.Generator], "AdapterLayer"]
Method = Callable[[Any, nn.Module], dict[str, Maker]]


class AdapterWeights(Protocol):
    """What an adapter adds at one module of the backbone, as tensors."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their short names."""
        ...

    def layer(self, base: nn.Module, dropout: float, model: nn.Module) -> AdapterLayer:
        """A layer on `base`, a module of `model`, with a float32 copy of these weights.

        Raises ValueError if the shapes do not fit.
        """
        ...


@dataclass(frozen=True)
class Weights:
    """Base of the weights of methods other than LoRA. A rank and an alpha are what cards tell of some methods.

    `symbol` stands for the module's path where the method itself knows its place in any backbone (see places.py).
    """

    rank: ClassVar[int | None] = None
    alpha: ClassVar[float | None] = None

    @property
    def symbol(self) -> str | None:
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their short names."""
        raise NotImplementedError

    def misfit(self, module: nn.Module, model: nn.Module) -> str | None:
        """Why they cannot be at `module` of `model`; None if they can."""
        raise NotImplementedError

    def layer(self, base: nn.Module, dropout: float, model: nn.Module) -> AdapterLayer:
        """As `AdapterWeights.layer`."""
        if reason := self.misfit(base, model):
            raise ValueError(reason)
        return self._layer(base, dropout, model)

    def _layer(self, base: nn.Module, dropout: float, model: nn.Module) -> AdapterLayer:
        raise NotImplementedError


@dataclass(frozen=True)
class Adapter:
    """A trained adapter apart from any model.

    `method` is the registry's name. `modules` holds path of a module in the backbone → weights. `dropout` is what it
    was trained with. `targets` are the names that the modules were found by (ends of paths), if they find these and
    no others in the backbone; empty where that is not known. `fan_in_fan_out` tells PEFT that the wrapped modules
    keep their matrix transposed (GPT-2's Conv1D). `task_type` is PEFT's word for the head that it was trained under.

    What an adapter may hold of the backbone itself, path of a module → tensors:
    `biases`       the bias of that module, trained along (`bias_kind` is PEFT's word for which ones: all, lora_only).
    `full_modules` whole modules trained along, such as a classification head: name of a parameter → tensor;
                   `full_names` are the names that they were found by.
    `base_weights` copies of the backbone's own weights that came with the adapter. They say which backbone it is for.
    """

    method: str
    modules: dict[str, Any] = field(repr=False)
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    task_type: str | None = "CAUSAL_LM"
    biases: dict[str, Tensor] = field(default_factory=dict, repr=False)
    bias_kind: str = "none"
    full_modules: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    full_names: tuple[str, ...] = ()
    base_weights: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that were trained, as `<module>.<short name>`."""
        found = {f"{path}.{name}": t for path, part in self.modules.items() for name, t in part.tensors().items()}
        found |= {f"{path}.base_bias": tensor for path, tensor in self.biases.items()}
        for path, part in self.full_modules.items():
            found |= {f"{path}.full.{name}": tensor for name, tensor in part.items()}
        return found

    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among its tensors."""
        dtypes = {tensor.dtype for tensor in self.tensors().values()}
        return max(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)))


class AdapterLayer(nn.Module):
    """Wraps a module of the backbone, neither copied nor changed; unknown attributes are the wrapped module's."""

    method: str

    def __init__(self, base: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(dropout)
        self.training = self.dropout.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def weights(self) -> Any:
        """The adapter's weights now, copied to the CPU."""
        raise NotImplementedError


def trainable(tensor: Tensor, device: torch.device) -> nn.Parameter:
    """A float32 copy of `tensor` on `device` that gets gradients."""
    return nn.Parameter(tensor.detach().to(device, torch.float32, copy=True).contiguous())
