"""Find modules of a model by what names them, and put others in their place."""

from fnmatch import fnmatchcase

from torch import nn
from transformers.pytorch_utils import Conv1D

from mole.registry import nearest

ALL_LINEAR = "all-linear"


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by a matrix: Linear (quantised ones inherit from it), or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear module; ValueError for any other."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(d_in, int) or not isinstance(d_out, int):
        raise ValueError(f"a {type(module).__name__} has no input and output width; an adapter needs a linear module")
    return d_in, d_out


def find_modules(model: nn.Module, targets: str | tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules that `targets` name, as path → module in the order of `model.named_modules()`.

    A target is `all-linear` (every linear module but the output head), the end of a path in whole components
    (`q_proj`, `self_attn.q_proj`), a whole path, or a pattern with `*`, `?`, `[…]` over whole paths
    (`model.layers.*.mlp.*`; of what a pattern finds, only linear modules are taken). Raises ValueError for a target
    that matches nothing; it lists near names.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    if not wanted:
        raise ValueError(f"no target modules given; use {ALL_LINEAR} or names such as q_proj")
    found: set[str] = set()
    for target in wanted:
        matches = _matches(model, modules, target)
        if not matches:
            raise ValueError(_matches_nothing(target, modules))
        found |= matches
    return {path: module for path, module in modules.items() if path in found}


def _matches(model: nn.Module, modules: dict[str, nn.Module], target: str) -> set[str]:
    if target == ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return {path for path, module in modules.items() if is_linear(module) and module is not head}
    if any(sign in target for sign in "*?["):
        return {path for path, module in modules.items() if fnmatchcase(path, target) and is_linear(module)}
    return {path for path in modules if path == target or path.endswith(f".{target}")}


def _matches_nothing(target: str, modules: dict[str, nn.Module]) -> str:
    linear = [path for path, module in modules.items() if is_linear(module)]
    names = sorted({path.rsplit(".", 1)[-1] for path in linear})
    near = nearest(target.rsplit(".", 1)[-1], names) + nearest(target, linear, 2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"target {target!r} matches no module{hint} (linear modules: {', '.join(names) or 'none'})"


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at `path` (dots between attribute names)."""
    return model.get_submodule(path)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, where another module stands now."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(path)
    setattr(model.get_submodule(parent), name, module)
