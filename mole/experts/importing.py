"""Adapters that others made → experts: read once, checked, rewritten; nothing of them is trusted or run.

PEFT's folders, AdapterHub's, and files of tensors alone (loralib, nlpr), which say neither scale nor backbone. Pickles
are refused whatever they hold: scripts/pickle_to_safetensors.py is the way for who trusts one.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole.experts.card import BackboneRef, bytes_facts, digest_of
from mole.experts.errors import LibraryError, Refused
from mole.experts.expert import Expert, describe
from mole.experts.schema import CARD_FILE, looks_like_path
from mole.untrusted import (
    MAX_JSON_BYTES,
    MAX_WEIGHTS_BYTES,
    PICKLES,
    Damaged,
    read_file,
    refuse_pickles,
    safetensors_header,
    shown,
    strict_json,
)

if TYPE_CHECKING:
    from mole.adapters import Adapter

logger = logging.getLogger(__name__)
LAYOUTS = ("peft", "loralib", "adapterhub", "nlpr")
PEFT_WEIGHTS, HUB_WEIGHTS = "adapter_model.safetensors", ("adapter.safetensors", "pytorch_adapter.safetensors")
CONFIG, SOURCE, HEAD, HEAD_WEIGHTS = "adapter_config.json", "source.json", "head_config.json", "model_head.safetensors"
FUSIONS = ("adapter_fusion_config.json", "model_adapter_fusion.safetensors", "adapter_setup.json")
_MOST_ENTRIES = 1000


@dataclass(frozen=True)
class Hints:
    """What foreign files do not say.

    `backbone` is its name; `alpha` the `lora_alpha` of the training; `blocks` which blocks of a merged module's outputs
    are adapted; `transposed` whether the modules keep their matrix transposed (GPT-2); `heads` whether a head comes
    along.
    """

    backbone: str | None = None
    alpha: float | None = None
    blocks: tuple[bool, ...] | None = None
    transposed: bool = False
    heads: bool = False


@dataclass(frozen=True)
class Source:
    """Foreign files in memory: name → bytes, `where` for errors, and where they come from for the card."""

    files: Mapping[str, bytes]
    where: str
    name: str
    address: str | None = None
    commit: str | None = None
    named: frozenset[str] = field(default_factory=frozenset)  # all entries, read or not

    def digest(self) -> str:
        """The sha256 over sizes and sha256 of the files, as a card's content."""
        return digest_of({name: bytes_facts(data) for name, data in self.files.items()})


@dataclass(frozen=True)
class _Found:
    adapter: Adapter
    backbone: str | None = None
    notices: tuple[str, ...] = ()
    name: str | None = None
    head: dict[str, Any] | None = None  # as a card tells of it


def import_expert(source: str | Path, *, layout: str = "auto", hints: Hints | None = None, **facts: Any) -> Expert:
    """The expert in a foreign folder or file, or in `hf://user/repo[/folder][@revision]`.

    `layout` is one of LAYOUTS, or auto: by what lies there. `facts` as for `describe`. Raises LibraryError (nothing
    there, no backbone's name), Damaged, Refused.
    """
    return expert_of(read_source(source), layout=layout, hints=hints or Hints(), **facts)


def expert_of(source: Source, *, layout: str = "auto", hints: Hints, lenient: bool = False, **facts: Any) -> Expert:
    """The expert in foreign files. `lenient` makes a label of a backbone that is a path, or unknown."""
    kind = layout if layout != "auto" else layout_of(source)
    found = _PARSERS[kind](source, hints)
    for notice in found.notices:
        logger.info("%s: %s", source.where, notice)
    backbone = hints.backbone or _label(found.backbone, source, lenient)
    row = {
        "relation": "imported",
        "source": source.address or kind,
        "name": source.name[:200] or None,
        "revision": source.commit,
        "content": source.digest(),
    }
    facts["derived_from"] = [row, *facts.get("derived_from", [])]
    if found.head is not None:
        facts.setdefault("head", found.head)
    if (pickle := _pickle_digest(source)) is not None:
        facts["extra"] = {"pickle_sha256": pickle, **facts.get("extra", {})}
    return Expert(describe(found.adapter, BackboneRef(backbone), **facts), found.adapter)


def read_source(source: str | Path) -> Source:
    """The files at a path, or in a repository of the Hub. Raises LibraryError, Refused."""
    text = str(source)
    if text.startswith("hf://"):
        from mole.experts.repository import read_repository

        return read_repository(text, wanted)
    if "://" in text:
        scheme = shown(text.partition("://")[0])[1:-1]  # what stands behind it may hold a secret
        raise LibraryError(f"{scheme}://…: adapters are imported from a folder, a file, or hf://user/repo[/folder]")
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise LibraryError(f"{path} does not exist; give an adapter's folder, its .safetensors file, or hf://user/repo")
    if path.suffix.lower() in PICKLES:
        raise Refused(pickle_text(path.name, text))
    return Source({path.name: read_file(path, MAX_WEIGHTS_BYTES)}, str(path), path.stem)


def wanted(names: list[str], where: str) -> list[str]:
    """Which of a folder's files are read. Raises Refused where only pickles hold the weights, and for a fusion."""
    if CARD_FILE in names:
        raise LibraryError(f"{where} holds an expert with its card: mole library add takes it as it is")
    for name in FUSIONS:
        if name in names:
            raise Refused(
                f"{where}: {name}: a composition of several adapters is no expert; import each of them, and train "
                "router=adapter_fusion over them, from a fusion's folder with router.from_folder=…"
            )
    weights = [name for name in names if name.endswith(".safetensors") and name != HEAD_WEIGHTS]
    if not weights:
        pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
        if pickles:
            raise Refused(pickle_text(pickles[0], f"{where}/{pickles[0]}"))
        raise LibraryError(f"no adapter in {where}: it has no .safetensors file")
    known = [name for name in (PEFT_WEIGHTS, *HUB_WEIGHTS) if name in weights]
    if not known and len(weights) > 1:
        raise LibraryError(f"{where} has several files of tensors ({', '.join(weights[:4])}): give one of them")
    chosen = known[:1] or weights
    return chosen + [name for name in (CONFIG, SOURCE, HEAD, HEAD_WEIGHTS) if name in names]


def pickle_text(name: str, place: str) -> str:
    """Why a pickle is refused, and what somebody who trusts it can do."""
    beside = (
        " (and put its adapter_config.json beside)" if name.startswith(("adapter_model", "pytorch_adapter")) else ""
    )
    return (
        f"{shown(name)[1:-1]} is a pickle, or hides what it holds: reading it could run any program that its author "
        "put inside. mole reads safetensors only. If you trust this file, convert it yourself, in a container without "
        f"network and without your tokens: python scripts/pickle_to_safetensors.py {shown(place)[1:-1]} converted/"
        f"{beside}, then mole library import converted/ <library> name=… backbone=…"
    )


def _folder(path: Path) -> Source:
    names = []
    with os.scandir(path) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > _MOST_ENTRIES:
                raise Refused(f"{path}: more than {_MOST_ENTRIES:,} entries; an adapter's folder has a few")
    names.sort()
    chosen = wanted(names, str(path))
    refuse_pickles(names, str(path))
    most = {name: MAX_WEIGHTS_BYTES if name.endswith(".safetensors") else MAX_JSON_BYTES for name in chosen}
    files = {name: read_file(path / name, most[name]) for name in chosen}
    return Source(files, str(path), path.resolve().name, named=frozenset(names))


def layout_of(source: Source) -> str:
    """Which layout the files have. Raises LibraryError for none that is known."""
    from mole.adapters import adapterhub_format, loralib_format, nlpr_format

    if CONFIG in source.files:
        node = strict_json(source.files[CONFIG], f"{source.where}/{CONFIG}", max_depth=6)
        if isinstance(node, dict) and adapterhub_format.is_adapterhub(node):
            return "adapterhub"
        return "peft"
    rows, _ = safetensors_header(*_weights(source))
    if nlpr_format.is_nlpr(list(rows)):
        return "nlpr"
    if loralib_format.is_loralib(list(rows)):
        return "loralib"
    raise LibraryError(
        f"{source.where}: tensors such as {shown(min(rows, default=''))} are of no layout that is known "
        f"({', '.join(LAYOUTS)}); PEFT's and AdapterHub's have an {CONFIG} beside them"
    )


def _weights(source: Source) -> tuple[bytes, str]:
    name = next(name for name in source.files if name.endswith(".safetensors") and name != HEAD_WEIGHTS)
    return source.files[name], f"{source.where}/{name}" if name != Path(source.where).name else source.where


def _config(source: Source) -> bytes:
    if CONFIG not in source.files:
        raise LibraryError(f"no adapter in {source.where}: it has no {CONFIG}")
    return source.files[CONFIG]


def _peft(source: Source, hints: Hints) -> _Found:
    from mole.adapters import peft_format

    config = _config(source)
    if PEFT_WEIGHTS not in source.files:
        raise LibraryError(f"no weights in {source.where}: it has no {PEFT_WEIGHTS}")
    found = peft_format.parse(config, source.files[PEFT_WEIGHTS], source.where)
    return _Found(found.adapter, found.backbone, found.notices)


def _loralib(source: Source, hints: Hints) -> _Found:
    from mole.adapters import loralib_format

    if hints.alpha is None:
        raise LibraryError(
            f"{source.where} holds factors and no scale: say the lora_alpha of the training with alpha=… "
            "(the scale is alpha / r)"
        )
    weights, where = _weights(source)
    return _Found(
        loralib_format.parse(weights, where, alpha=hints.alpha, blocks=hints.blocks, transposed=hints.transposed)
    )


def _adapterhub(source: Source, hints: Hints) -> _Found:
    from mole.adapters import adapterhub_format

    weights, _ = _weights(source)
    found = adapterhub_format.parse(_config(source), weights, source.where, alpha=hints.alpha)
    adapter, notices, head = found.adapter, (), None
    if hints.heads:
        adapter, head = _with_head(adapter, source)
    elif HEAD_WEIGHTS in source.files:
        notices = ("its head is left out; heads=true takes it along",)
    return _Found(adapter, found.backbone, notices, found.name, head)


def _with_head(adapter: Adapter, source: Source) -> tuple[Adapter, dict[str, Any] | None]:
    """The adapter with the head beside it, as whole modules of the backbone, and what a card says of the head."""
    from mole.adapters import adapterhub_heads

    for name in (HEAD, HEAD_WEIGHTS):
        if name not in source.files:
            raise LibraryError(f"heads=true, and {source.where} has no {name}")
    found = adapterhub_heads.parse(source.files[HEAD], source.files[HEAD_WEIGHTS], source.where)
    names = tuple(dict.fromkeys(path.rpartition(".")[2] for path in found.modules))
    adapter = replace(adapter, task_type="SEQ_CLS", full_modules=found.modules, full_names=names)
    if found.labels is None:
        return adapter, None
    return adapter, {"type": "classification" if found.labels else "regression", "labels": list(found.labels)}


def _nlpr(source: Source, hints: Hints) -> _Found:
    from mole.adapters import nlpr_format

    weights, where = _weights(source)
    return _Found(nlpr_format.parse(weights, where))


_PARSERS: dict[str, Callable[[Source, Hints], _Found]] = {
    "peft": _peft,
    "loralib": _loralib,
    "adapterhub": _adapterhub,
    "nlpr": _nlpr,
}


def _label(name: str | None, source: Source, lenient: bool) -> str:
    """The backbone's name for the card, as text. Raises LibraryError where it has to be said."""
    if name and not looks_like_path(name):
        return name
    if lenient:
        return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if name else "unknown"
    what = f"names a folder as its backbone ({shown(name)})" if name else "does not say which backbone it is for"
    raise LibraryError(f"{source.where} {what}: say it with backbone=<name>, such as backbone=user/model")


def _pickle_digest(source: Source) -> str | None:
    """The sha256 of the pickle that the files were converted from, if the script's note tells it."""
    if SOURCE not in source.files:
        return None
    node = strict_json(source.files[SOURCE], f"{source.where}/{SOURCE}")
    digest = node.get("sha256") if isinstance(node, dict) else None
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest, re.ASCII):
        raise Damaged(f"{source.where}/{SOURCE}: sha256 is {shown(digest)}")
    return digest
