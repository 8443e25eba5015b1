"""Which modules of a model become blocks: found by name, checked before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mole.backbones.modules import device_of, input_output, kind_of
from mole.registry import nearest

Pattern = str | re.Pattern[str] | Sequence[str] | Callable[[str, nn.Module], bool]
SIDE = 16  # pixels of the small image on which modules of images are tried


@dataclass(frozen=True)
class Target:
    """A module to wrap and all the names under which the model has it."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def find_targets(model: nn.Module, pattern: Pattern, taken: type) -> list[Target]:
    """The modules whose full name `pattern` matches, in the model's order, each once however often it is reached.

    `pattern` is a regular expression for the whole name, several of them, or a predicate (name, module). Raises
    ValueError if it matches nothing, if one match lies inside another, or if a match is, holds or lies in a block of
    the class `taken`, and for what is no regular expression.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    _check_expressions(pattern)
    found = {name: module for name, module in modules.items() if _matches(pattern, name, module)}
    if not found:
        raise ValueError(_nothing(pattern, modules))
    for name, module in modules.items():
        if isinstance(module, taken):
            clash = next((n for n in found if n == name or _inside(n, name) or _inside(name, n)), None)
            if clash is not None:
                raise ValueError(
                    f"{clash}: {name} is a mixture of experts already: unmoefy(model) first, or narrow the pattern"
                )
    for name in found:
        outer = next((other for other in found if _inside(name, other)), None)
        if outer is not None:
            raise ValueError(
                f"pattern {told(pattern)} matches {outer} and {name} inside it: an expert cannot hold another block; "
                "narrow the pattern to one of them"
            )
    by_module: dict[int, list[str]] = {}
    for name, module in found.items():
        by_module.setdefault(id(module), []).append(name)
    every = {id(module): [n for n, m in modules.items() if m is module] for module in found.values()}
    return [Target(tuple(every[key]), modules[names[0]]) for key, names in by_module.items()]


def told(pattern: Pattern) -> str:
    """The pattern as a message or a file has it."""
    if callable(pattern):
        return f"<{getattr(pattern, '__name__', type(pattern).__name__)}>"
    if isinstance(pattern, str):
        return repr(pattern)
    return repr(pattern.pattern) if isinstance(pattern, re.Pattern) else repr(list(pattern))


def _check_expressions(pattern: Pattern) -> None:
    """Raises ValueError for a text that is no regular expression."""
    for text in () if callable(pattern) else (pattern,) if isinstance(pattern, str | re.Pattern) else pattern:
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(
                f"pattern {told(text)} is no regular expression ({error}): .* is any characters, \\. a dot"
            ) from None


def _matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    if callable(pattern):
        return bool(pattern(name, module))
    if isinstance(pattern, str | re.Pattern):
        return re.fullmatch(pattern, name) is not None
    return any(re.fullmatch(one, name) is not None for one in pattern)


def _inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def _nothing(pattern: Pattern, modules: dict[str, nn.Module]) -> str:
    texts = [] if callable(pattern) else [pattern] if isinstance(pattern, str | re.Pattern) else list(pattern)
    near = []
    for text in texts:
        plain = text.pattern if isinstance(text, re.Pattern) else text
        near += nearest(re.sub(r"\\d[+*]?|\[0-9\][+*]?", "0", plain).replace("\\", ""), modules, 2)
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    kinds = sorted({re.sub(r"\.\d+(?=\.|$)", r".\\d+", name) for name, m in modules.items() if list(m.children())})
    return (
        f"pattern {told(pattern)} matches no module{hint} (it is matched against the whole name; "
        f"names: {', '.join(kinds[:12])}{', …' if len(kinds) > 12 else ''})"
    )


def width_of(target: Target) -> int:
    """The features that the module takes: those of its first linear layer. Raises ValueError if it has none."""
    for module in target.module.modules():
        if kind_of(module) in ("linear", "convolution"):
            return input_output(module)[0]
    raise ValueError(
        f"{target.name}: a {type(target.module).__name__} has no linear layer that says how many features it takes: "
        "give input_dim"
    )


def check_calls(target: Target, input_dim: int, images: bool) -> None:
    """Tries the module on random numbers. Raises ValueError if it does not take one tensor and give one like it."""
    module = target.module
    shapes = [(1, input_dim, SIDE, SIDE)] if images else [(1, 4, input_dim), (4, input_dim)]
    problem = ""
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with at_rest(module):
            try:
                made = module(x.to(device_of(module), _dtype(module)))
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
                reason = str(error).partition("\n")[0][:160]
                problem = problem or f"does not work on a tensor {list(shape)} alone: {reason}"
                continue
        if not isinstance(made, Tensor):
            problem = f"gives a {type(made).__name__}, not a tensor"
            break
        if made.shape[:1] != x.shape[:1] or (not images and made.shape[:-1] != x.shape[:-1]):
            problem = f"makes {list(made.shape)} of {list(x.shape)}: a row has to stay a row"
            break
        return
    inner = [name for name, m in module.named_modules() if name and kind_of(m) == "linear"]
    within = f"; inside it: {', '.join(f'{target.name}.{name}' for name in inner[:4])}" if inner else ""
    raise ValueError(f"{target.name}: a {type(module).__name__} cannot be an expert, as it {problem}{within}")


def _dtype(module: nn.Module) -> torch.dtype:
    floats = (p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(floats, torch.float32)


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and torch's random state put back afterwards."""
    training = [part for part in module.modules() if part.training]
    devices = list({p.device for p in module.parameters() if p.device.type == "cuda"})
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for part in training:
            part.training = True
