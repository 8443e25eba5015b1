"""How experts of a known make compute, written once for one expert and run by back-ends over all of them.

A recipe is a function (layers, rows) → rows. `layers.linear(path, rows)` is the linear layer of that name of all
experts; what has no parameters is taken from `layers.first`, the first expert. Linear layers, chains of them with
activations between, gated and two-layer MLPs as transformers and timm write them are known; register_grouped adds
more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Layers(Protocol):
    """All experts at once."""

    first: nn.Module

    def linear(self, path: str, rows: Tensor) -> Tensor:
        """The linear layers called `path` ("": the experts themselves)."""
        ...


Recipe = Callable[[Any, Tensor], Tensor]


class Known(NamedTuple):
    """A recipe, and what is known of it without trying.

    `linear`: nothing but linear maps; `sure`: it is what the expert does; `shallow`: stacking serves it.
    """

    recipe: Recipe
    linear: bool = False
    sure: bool = False
    shallow: bool = False


_REGISTERED: dict[type, Recipe] = {}
_GATED = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
_INERT = (nn.Identity, nn.Dropout)
# First and second layer, what follows the activation, and what follows the second layer: timm, GPT-2, GPT-NeoX.
_TWO = (
    ("fc1", "fc2", ("drop1", "norm"), ("drop2",)),
    ("c_fc", "c_proj", (), ("dropout",)),
    ("dense_h_to_4h", "dense_4h_to_h", (), ()),
)


def register_grouped(kind: type, recipe: Recipe) -> None:
    """Makes experts of class `kind` known, for the back-ends grouped and stacked; see the head of this file.

    It is checked against the class's own forward before it is used.
    """
    _REGISTERED[kind] = recipe


def is_linear(module: nn.Module) -> bool:
    """A plain linear layer, transformers' Conv1D among them."""
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nx"))


def known(expert: nn.Module) -> Known | None:
    """How an expert computes; None if nobody said so."""
    if type(expert) in _REGISTERED:
        return Known(_REGISTERED[type(expert)])
    if is_linear(expert):
        return Known(_single, linear=True, sure=True, shallow=True)
    if isinstance(expert, nn.Sequential):
        return _chain(expert)
    return _gated(expert) or _two_layers(expert)


def _single(layers: Any, rows: Tensor) -> Tensor:
    return layers.linear("", rows)


def silent(module: nn.Module) -> bool:
    """Without parameters, and by token: an activation, dropout or nothing."""
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return False
    if type(module) in (nn.Dropout, nn.Identity):
        return True
    if getattr(module, "dim", -1) != -1 or isinstance(module, nn.Softmax2d):
        return False
    return type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations")


def _chain(expert: nn.Sequential) -> Known | None:
    parts = [
        (name, part)
        for name, part in expert.named_modules()
        if not isinstance(part, nn.Sequential) and next(part.children(), None) is None
    ]
    listed = [part for part in expert.modules() if not isinstance(part, nn.Sequential)]
    if len(listed) != len(parts) or not all(is_linear(part) or silent(part) for _, part in parts):
        return None
    places = [place for place, (_, part) in enumerate(parts) if is_linear(part)]
    if not places:
        return None
    behind = [part for _, part in parts[places[-1] + 1 :]]
    shallow = len(places) == 1 or (len(places) == 2 and all(type(part) in _INERT for part in behind))

    def recipe(layers: Any, rows: Tensor) -> Tensor:
        for name, part in parts:
            rows = layers.linear(name, rows) if is_linear(part) else layers.first.get_submodule(name)(rows)
        return rows

    linear = all(is_linear(part) or type(part) is nn.Identity for _, part in parts)
    return Known(recipe, linear, sure=True, shallow=shallow)


def _children(expert: nn.Module, linears: tuple[str, ...], others: tuple[str, ...]) -> str | None:
    """The activation's name, if the expert has these linear layers and besides only `others` and an activation."""
    children = dict(expert.named_children())
    if not all(name in children and is_linear(children[name]) for name in linears):
        return None
    act = next((name for name in _ACTIVATIONS if callable(getattr(expert, name, None))), None)
    if act is None or set(children) - {*linears, *others, act}:
        return None
    if next(expert.parameters(recurse=False), None) is not None:
        return None
    return act if all(silent(children[name]) for name in (*others, act) if name in children) else None


def _gated(expert: nn.Module) -> Known | None:
    """down(act(gate x) ⊙ up x)"""
    act = _children(expert, _GATED, ())
    if act is None:
        return None

    def recipe(layers: Any, rows: Tensor) -> Tensor:
        gate = getattr(layers.first, act)(layers.linear("gate_proj", rows))
        return layers.linear("down_proj", gate * layers.linear("up_proj", rows))

    return Known(recipe)


def _two_layers(expert: nn.Module) -> Known | None:
    """second(act(first x)), with the dropouts that a class may have"""
    for first, second, between, behind in _TWO:
        act = _children(expert, (first, second), (*between, *behind))
        if act is not None:
            break
    else:
        return None

    def recipe(layers: Any, rows: Tensor) -> Tensor:
        rows = getattr(layers.first, act)(layers.linear(first, rows))
        for name in between:
            rows = getattr(layers.first, name)(rows) if hasattr(layers.first, name) else rows
        rows = layers.linear(second, rows)
        for name in behind:
            rows = getattr(layers.first, name)(rows) if hasattr(layers.first, name) else rows
        return rows

    return Known(recipe)


def weights_of(experts: Any, path: str) -> tuple[list[Tensor], list[Tensor] | None]:
    """The linear layers called `path`, as maps [d_in, d_out] each, and their biases."""
    layers = [expert.get_submodule(path) for expert in experts]
    mats = [layer.weight.t() if type(layer) is nn.Linear else layer.weight for layer in layers]
    return mats, None if layers[0].bias is None else [layer.bias for layer in layers]
