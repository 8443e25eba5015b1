"""Experts → folders for other programs: PEFT's, one for servers, AdapterHub's; a map of pinned addresses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole.experts.card import Card, bytes_facts
from mole.experts.errors import LibraryError
from mole.experts.expert import Expert, summary
from mole.experts.folder import write_card
from mole.experts.readme import readme
from mole.experts.schema import README_FILE
from mole.registry import unknown
from mole.run_folder import write_atomically, write_folder_atomically

if TYPE_CHECKING:
    from mole.adapters import Adapter

FORMATS = ("peft", "normalised", "adapterhub", "adapter-weights")
DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Form:
    """How an expert leaves: `dtype` of the tensors (None: as they are), with its `card` or not, and what it calls its
    `backbone` (None: as the card does).

    `model_type`, `width` (features of hidden states) and `num_layers` (None: up to the last block with a bottleneck) of
    the backbone, and `allow_partial` (leave out what has no place there) are for AdapterHub's folders.
    """

    format: str = "peft"
    dtype: str | None = None
    card: bool = False
    backbone: str | None = None
    model_type: str | None = None
    width: int | None = None
    num_layers: int | None = None
    allow_partial: bool = False


def export(expert: Expert, name: str, dest: str | Path, form: Form) -> None:
    """Write the expert `name` to the new folder `dest`, whole or not at all.

    Raises FileExistsError for a folder with content, LibraryError for what the format has no place for.
    """
    dest = Path(dest)
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise FileExistsError(f"{dest} is there already and not empty; choose a new folder")
    files = files_of(expert, name, form)

    def fill(folder: Path) -> None:
        for file, data in files.items():
            (folder / file).write_bytes(data)

    write_folder_atomically(dest, fill, replace=True)


def files_of(expert: Expert, name: str, form: Form) -> dict[str, bytes]:
    """The files of the exported expert, name → bytes. Raises LibraryError."""
    from mole.adapters import own_format, peft_format
    from mole.adapters.normalised import normalised

    if form.format not in FORMATS[:-1]:
        raise LibraryError(unknown("format", form.format, FORMATS))
    adapter = expert.adapter if form.dtype is None else converted(expert.adapter, form.dtype)
    backbone = form.backbone or expert.card.backbone.name
    try:
        if form.format == "adapterhub":
            files = _adapterhub(adapter, name, expert.card, form)
        else:
            if not peft_format.has_place_for(adapter.method):
                raise LibraryError(
                    f"PEFT has no {adapter.method}: get {name} as it is (mole library get), in {own_format.CONFIG}"
                    + (", or use format=adapterhub" if adapter.method == "bottleneck" else "")
                )
            if form.format == "normalised":
                adapter = normalised(adapter)
            files = peft_format.dump(adapter, backbone)
    except LibraryError:
        raise
    except ValueError as error:
        raise LibraryError(f"{name}: {error}") from None
    return {**files, **_about(expert.card, adapter, files, form)}


def _adapterhub(adapter: Adapter, name: str, card: Card, form: Form) -> dict[str, bytes]:
    """The files of the bottlenecks, and those of a head. Raises LibraryError, and ValueError for what has no place."""
    from mole.adapters import adapterhub_format, adapterhub_heads

    if form.model_type is None or form.width is None:
        raise LibraryError("format=adapterhub wants the backbone's model_type and width: model_type=… width=…")
    if (lost := _without_place(adapter, form.model_type)) and not form.allow_partial:
        raise ValueError(f"format=adapterhub has no place for {', '.join(lost)}: allow_partial=true leaves them out")
    target = adapterhub_format.Target(form.model_type, form.width, form.num_layers)
    backbone = form.backbone or card.backbone.name
    files = adapterhub_format.dump(adapterhub_format.holdable(adapter)[0], name, backbone, target)
    head, _ = adapterhub_heads.has_place(adapter.full_modules, form.model_type)
    if head:
        labels = tuple(card.head["labels"]) if card.head else None
        files |= adapterhub_heads.dump(head, name, backbone, target, labels)
    return files


def _without_place(adapter: Adapter, model_type: str) -> tuple[str, ...]:
    from mole.adapters import adapterhub_format, adapterhub_heads

    others = adapterhub_heads.has_place(adapter.full_modules, model_type)[1]
    return (*adapterhub_format.holdable(adapter)[1], *others)


def left_out(expert: Expert, form: Form) -> tuple[str, ...]:
    """What of an expert is not in its files in that form, with allow_partial."""
    if form.format != "adapterhub" or form.model_type is None:
        return ()
    return _without_place(expert.adapter, form.model_type)


def _about(card: Card, adapter: Adapter, files: Mapping[str, bytes], form: Form) -> dict[str, bytes]:
    """README.md, and the card, of these files."""
    if form.format == "adapterhub":
        if form.card:
            raise LibraryError("card=true: an expert's folder has PEFT's files or mole's own, not AdapterHub's")
        return {README_FILE: readme(card).encode()}
    rows: dict[str, Any] = {name: bytes_facts(data) for name, data in files.items()}
    own = card if rows == card.files else card.edited(files=rows, adapter=summary(adapter))
    if not form.card:
        return {README_FILE: readme(own).encode()}
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mole-export-") as place:
        write_card(own, place)
        return {entry.name: entry.read_bytes() for entry in Path(place).iterdir()}


def converted(adapter: Adapter, dtype: str) -> Adapter:
    """The adapter with all tensors of this dtype. Raises LibraryError for values that it cannot hold."""
    import torch
    from torch import Tensor

    if dtype not in DTYPES:
        raise LibraryError(unknown("dtype", dtype, DTYPES))
    wanted = getattr(torch, dtype)

    def cast(tensor: Tensor) -> Tensor:
        made = tensor.to(wanted)
        if not torch.isfinite(made).all():
            raise LibraryError(f"a value of {float(tensor.abs().max()):.3g} is too large for {dtype}: use bfloat16")
        return made

    def cast_all(weights: Any) -> Any:
        found = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
        return dataclasses.replace(weights, **{n: cast(v) for n, v in found.items() if isinstance(v, Tensor)})

    return dataclasses.replace(
        adapter,
        modules={path: cast_all(weights) for path, weights in adapter.modules.items()},
        biases={path: cast(tensor) for path, tensor in adapter.biases.items()},
        full_modules={p: {n: cast(t) for n, t in part.items()} for p, part in adapter.full_modules.items()},
        base_weights={path: cast(tensor) for path, tensor in adapter.base_weights.items()},
    )


def adapter_weights(address: str, cards: Mapping[str, Card]) -> dict[str, str]:
    """Name → address with its revision, of the experts of the library at `address`; of a folder the whole path."""
    home = address if "://" in address else str(Path(address).expanduser().resolve())
    return {name: f"{home.rstrip('/')}/{name}@{card.revision}" for name, card in sorted(cards.items())}


def export_map(address: str, cards: Mapping[str, Card], dest: str | Path) -> None:
    """Write `adapter_weights` as the new JSON file `dest`. Raises FileExistsError."""
    dest = Path(dest)
    if dest.exists():
        raise FileExistsError(f"{dest} is there already; choose a new file")
    write_atomically(dest, json.dumps(adapter_weights(address, cards), indent=1) + "\n")
