"""A mixture on disk: its description, its router's weights and its experts, whole, in one folder with a card.

    mixture.json             format, router config, names, tasks and origin of the experts, paths of the mixed modules,
                             how the mixture computes where that is not the default
    router.safetensors       parameters of routers that learn: `<name>` of scope model, `<site>.<name>` of scope layer;
                             of whole modules trained with them: `modules_to_save.<path>.<name>`; of flex adapters:
                             `flex.<site>.<name>`; of a backbone that was trained along: `backbone.<name>`
    expert-000.json          PEFT's adapter config of the first expert
    expert-000.safetensors   its weights, in the dtype that the mixture computes with
    expert.json, README.md   the card (kind mixture), with the digests of the others; and the same for people

Nothing in it names a class: the router is a registry name with fields, checked against its closed config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import field
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save

from mole.adapters import Adapter
from mole.adapters import files as adapter_files
from mole.backbones import Backbone
from mole.experts.card import Card, bytes_facts, check_backbone, new_card
from mole.experts.folder import check_entries, has_card, read_card, verified_files, write_card
from mole.mixtures.exploding import parent_of
from mole.mixtures.model import MultiExpertModel
from mole.mixtures.trainable import backbone_parameters
from mole.mixtures.wrapping import MixtureOptions
from mole.registry import ROUTERS, config_dataclass
from mole.run_folder import write_folder_atomically
from mole.untrusted import FLOATS, Damaged, safetensors_tensors, strict_json

FORMAT = 1
MIXTURE, ROUTER = "mixture.json", "router.safetensors"
STATE = {**FLOATS, "F64": 8, "I64": 8, "BOOL": 1}  # of a router: numbers, tables of ids, what is there


@config_dataclass
class Origin:
    """An expert of a mixture and where it comes from: null where that is not known."""

    name: str
    tasks: tuple[str, ...] = ()
    library: str | None = None
    revision: str | None = None
    content: str | None = None


@config_dataclass
class Description:
    """What mixture.json says."""

    format: int
    router: dict[str, Any]
    experts: tuple[Origin, ...]
    sites: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def save_mixture(
    model: MultiExpertModel,
    folder: str | Path,
    backbone: Backbone,
    *,
    origins: Mapping[str, Origin] | None = None,
    replace: bool = False,
    **facts: Any,
) -> Card:
    """Writes the mixture as the new folder `folder`, whole or not at all; returns its card.

    `origins` tells where experts come from, by name; `facts` go to the card (description, scores, data, training …).
    Raises FileExistsError if the folder exists, unless `replace` is set.
    """
    origins = dict(origins or {})
    experts = tuple(
        replaced(origins.get(parent_of(name), Origin(name=name, tasks=tasks)), name=name)
        for name, tasks in zip(model.expert_names, model.shape.expert_tasks, strict=True)
    )
    router = TypeAdapter(type(model.router_config)).dump_python(model.router_config, mode="json")
    described = Description(
        format=FORMAT, router=router, experts=experts, sites=model.sites, options=model.options.as_saved()
    )
    files = {
        MIXTURE: TypeAdapter(Description).dump_json(described, indent=1) + b"\n",
    }
    if state := {name: tensor for name, tensor in _trained_state(model).items() if tensor.numel()}:
        files[ROUTER] = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    for index, adapter in enumerate(model.adapters().values()):
        files |= _expert_files(index, adapter, backbone.name)
    copied = [
        {"relation": "copied", "source": e.library, "name": name, "revision": e.revision, "content": e.content}
        for name, e in {parent_of(e.name): e for e in experts}.items()
        if e.revision
    ]
    tasks = sorted({task for expert in experts for task in expert.tasks})[:64]
    made = {"tasks": tasks, "derived_from": copied, **facts}
    card = new_card({n: bytes_facts(d) for n, d in files.items()}, backbone, kind="mixture", **made)

    def fill(target: Path) -> None:
        for name, data in files.items():
            (target / name).write_bytes(data)
        write_card(card, target)

    write_folder_atomically(folder, fill, replace=replace)
    return card


def load_mixture(
    folder: str | Path,
    backbone: Backbone,
    *,
    kernel: str = "auto",
    allow_other_backbone: bool = False,
    find: Callable[[Origin], Adapter] | None = None,
) -> MultiExpertModel:
    """The mixture in `folder` on `backbone`, in eval mode, with nothing trainable.

    `find` gives the experts that the mixture only refers to.
    Each file is read once and checked against the card. Raises Damaged or Refused for what is not a mixture as
    written, ValueError if it was made for another backbone.
    """
    folder = Path(folder)
    card, files = read_checked(folder)
    check_backbone(card, backbone.name, backbone.shapes, allow_other_backbone=allow_other_backbone)
    description = _described(files.pop(MIXTURE), f"{folder / MIXTURE}")
    experts = {}
    for index, origin in enumerate(description.experts):
        stem = f"expert-{index:03d}"
        if find is not None and not {f"{stem}.json", f"{stem}.safetensors"} & set(files):
            experts[origin.name] = find(origin)
            continue
        if f"{stem}.json" not in files or f"{stem}.safetensors" not in files:
            raise Damaged(f"{folder}: the files of expert {origin.name!r} ({stem}.*) are missing")
        config = files[f"{stem}.json"]
        given = {adapter_files.config_name(config): config, adapter_files.WEIGHTS: files[f"{stem}.safetensors"]}
        parsed = adapter_files.parse(given, f"{folder / stem}")
        experts[origin.name] = parsed.adapter
    model = MultiExpertModel(
        backbone.model,
        experts,
        _router_config(description.router, folder),
        tasks={origin.name: origin.tasks for origin in description.experts},
        train="none",
        kernel=kernel,
        **_options(description.options, folder),
    )
    if model.sites != description.sites:
        model.unload()
        raise Damaged(f"{folder}: the mixed modules are not those that its experts adapt on this backbone")
    state = safetensors_tensors(files[ROUTER], f"{folder / ROUTER}", dtypes=STATE) if ROUTER in files else {}
    _load_router(model, state, folder)
    return model.eval()


def experts_in(folder: str | Path) -> dict[str, tuple[Origin, dict[str, bytes]]]:
    """Expert name → its origin and the bytes of its files under an expert's names; no files where it is only named."""
    folder = Path(folder)
    _, files = read_checked(folder)
    found = {}
    for index, origin in enumerate(_described(files[MIXTURE], f"{folder / MIXTURE}").experts):
        stem = f"expert-{index:03d}"
        if config := files.get(f"{stem}.json"):
            own = {adapter_files.config_name(config): config, adapter_files.WEIGHTS: files[f"{stem}.safetensors"]}
            found[origin.name] = origin, own
        else:
            found[origin.name] = origin, {}
    return found


def router_name(folder: str | Path) -> str:
    """The registry name of the router of the mixture in `folder`."""
    folder = Path(folder)
    _, files = read_checked(folder)
    return _router_config(_described(files[MIXTURE], f"{folder / MIXTURE}").router, folder).name


def origins_of(folder: str | Path) -> dict[str, Origin]:
    """Expert name → origin, of the mixture in `folder`."""
    folder = Path(folder)
    _, files = read_checked(folder)
    return {origin.name: origin for origin in _described(files[MIXTURE], f"{folder / MIXTURE}").experts}


def read_checked(folder: Path) -> tuple[Card, dict[str, bytes]]:
    """The card of a mixture and the bytes of its files, which are what the card says.

    Raises ValueError if there is no mixture, Damaged or Refused if a file is missing or another than the card's.
    """
    if not has_card(folder):
        raise ValueError(f"no mixture in {folder}: it has no expert.json")
    card = read_card(folder)
    if card.kind != "mixture":
        raise ValueError(f"{folder} holds an expert, not a mixture")
    check_entries(folder, card)
    return card, verified_files(folder, card)


def _expert_files(index: int, adapter: Adapter, backbone: str) -> dict[str, bytes]:
    files = adapter_files.dump(adapter, backbone)
    (config,) = (data for name, data in files.items() if name in adapter_files.CONFIGS)
    stem = f"expert-{index:03d}"
    return {f"{stem}.json": config, f"{stem}.safetensors": files[adapter_files.WEIGHTS]}


def _described(data: bytes, what: str) -> Description:
    try:
        description = TypeAdapter(Description).validate_json(json.dumps(strict_json(data, what)))
    except ValidationError as error:
        raise Damaged(f"{what}: {_first(error)}") from None
    if description.format != FORMAT:
        raise Damaged(f"{what}: format {description.format} needs another version of mole; this one reads {FORMAT}")
    return description


def _router_config(node: dict[str, Any], folder: Path) -> Any:
    name = node.get("name")
    if not isinstance(name, str) or name not in ROUTERS:
        raise Damaged(f"{folder / MIXTURE}: router {name!r} is not known here (known: {', '.join(ROUTERS.names())})")
    if node.get("from_folder") is not None:
        raise Damaged(f"{folder / MIXTURE}: router: from_folder: a mixture starts from no other folder")
    try:
        return TypeAdapter(ROUTERS[name].config).validate_json(json.dumps(node))
    except ValidationError as error:
        raise Damaged(f"{folder / MIXTURE}: router: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    one = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}"


def _options(node: dict[str, Any], folder: Path) -> dict[str, Any]:
    odd = sorted(node.keys() - vars(MixtureOptions()).keys())
    if odd:
        raise Damaged(f"{folder / MIXTURE}: options: {odd[0]!a} is not known here")
    try:
        checked = TypeAdapter(MixtureOptions).validate_python(node)
    except ValidationError as error:
        raise Damaged(f"{folder / MIXTURE}: options: {_first(error)}") from None
    return checked.as_saved()


def _trained_state(model: MultiExpertModel) -> dict[str, torch.Tensor]:
    """What was trained beside the experts."""
    state: dict[str, torch.Tensor] = {
        f"{site}.{name}" if site else name: tensor
        for site, router in model.routers().items()
        for name, tensor in router.state_dict(keep_vars=True).items()
    }
    for path, module in model.trained_modules().items():
        state |= {f"modules_to_save.{path}.{name}": parameter for name, parameter in module.named_parameters()}
    for site, layer in model.layers.items():
        if layer.flex is not None:
            state |= {f"flex.{site}.{name}": parameter for name, parameter in layer.flex.named_parameters()}
    return state | {f"backbone.{name}": parameter for name, parameter in backbone_parameters(model).items()}


def _load_router(model: MultiExpertModel, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    state = _trained_state(model)
    open_shapes = {
        f"{site}.{name}" if site else name for site, router in model.routers().items() for name in router.open_shapes
    }

    def shape(name: str, tensor: torch.Tensor) -> tuple:
        kind = "real" if tensor.is_floating_point() else str(tensor.dtype)
        return (kind, tensor.dim() if name in open_shapes else tuple(tensor.shape))

    left_out = {name for name in open_shapes - tensors.keys() if not state[name].numel()}  # files hold nothing empty
    wanted = {name: shape(name, parameter) for name, parameter in state.items() if name not in left_out}
    given = {name: shape(name, tensor) for name, tensor in tensors.items()}
    if wanted != given:
        odd = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
        shown = "; ".join(
            f"{name}: {given.get(name, 'absent')}, expected {wanted.get(name, 'none')}" for name in odd[:3]
        )
        raise Damaged(f"{folder / ROUTER}: the tensors are not this router's ({shown})")
    for name, tensor in tensors.items():
        state[name].data = tensor.to(state[name].device)
    for router in model.routers().values():
        try:
            router.check_state()
        except ValueError as error:
            raise Damaged(f"{folder / ROUTER}: {error}") from None
