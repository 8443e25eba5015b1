"""Find modules of a model by what names them, tell what they are, and put others in their place."""

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mole.registry import nearest

ALL_LINEAR = "all-linear"


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by a matrix: Linear (quantised ones inherit from it), or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def kind_of(module: nn.Module) -> str | None:
    """linear, embedding or convolution; None for what is none of them.

    Linear is whatever says how many features it takes and gives, so quantised layers of any make are.
    """
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution"
    return "linear" if isinstance(module, Conv1D) or _widths(module) else None


def _widths(module: nn.Module) -> tuple[int, int] | None:
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):  # GPTQ's layers have the latter
        widths = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(width, int) for width in widths):
            return widths  # type: ignore[return-value]
    return None


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear module; ValueError for any other."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    widths = _widths(module)
    if widths is None:
        raise ValueError(f"a {type(module).__name__} has no input and output width; an adapter needs a linear module")
    return widths


def input_output(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear module, (vocabulary, d_out) of an embedding, channels of a convolution."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels, module.out_channels
    return in_out_features(module)


def reads_left_to_right(model: nn.Module) -> bool:
    """Whether no token sees later ones: the model can generate, or its attention says that it is causal."""
    if getattr(model, "can_generate", lambda: False)():
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def compute_dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: its weight's, or what a quantised layer says, or else float32."""
    said = getattr(module, "compute_dtype", None)
    weight = getattr(module, "weight", None)
    for tensor in [weight, said, *module.parameters()]:
        dtype = tensor.dtype if isinstance(tensor, Tensor) else tensor
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.float32


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first tensor is, or is brought to if offloaded; some quantised layers hold buffers only."""
    first = next(module.parameters(), None)
    first = next(module.buffers(), None) if first is None else first
    found = torch.device("cpu") if first is None else first.device
    return found if found.type != "meta" else _brought_to(module) or found


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's own weights only for the time of its forward."""
    offloaded = any(tensor.device.type == "meta" for tensor in module.parameters(recurse=False))
    return offloaded and _brought_to(module) is not None


def _brought_to(module: nn.Module) -> torch.device | None:
    """Where accelerate's hooks bring what is offloaded of the module, or of its parts."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):  # several hooks in a row
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


@torch.no_grad()
def dense_weight(module: nn.Module) -> Tensor:
    """W of a linear module or a convolution as float32 (float64 stays) [d_out, d_in, …], dequantised if need be.

    A layer that does not show its weight is asked for what it makes of the unit vectors.
    """
    weight = getattr(module, "weight", None)
    shape = input_output(module)[::-1]
    if isinstance(module, Conv1D):
        weight = module.weight.T
    if isinstance(weight, Tensor) and weight.dtype.is_floating_point and tuple(weight.shape[:2]) == shape:
        return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    units = torch.eye(shape[1], device=device_of(module), dtype=compute_dtype_of(module))
    made, bias = module(units), getattr(module, "bias", None)
    return (made.float() if bias is None else made.float() - bias.float()).T


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
