"""The card of an X-LoRA checkpoint, mole_xlora.json: closed, and what mole trusts before any other file beside it."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel

from mole.registry import config_dataclass
from mole.untrusted import MAX_JSON_BYTES, Damaged, strict_json

CARD = "mole_xlora.json"
FORMAT, VERSION = "mole.xlora", 1


@config_dataclass
class BaseFacts:
    """The base model: `id` a Hub id or a folder, `revision` its Hub commit; null where not known."""

    id: str | None
    revision: str | None
    architecture: str
    hidden_size: int
    vocab_size: int | None


@config_dataclass
class ExpertRow:
    """One expert: in `folder` of the checkpoint, or at `source`; `sha256` is the digest over its two files."""

    index: int
    name: str
    folder: str | None
    source: str | None
    sha256: str
    trainable: bool


@config_dataclass
class RouterRow:
    """The router's file and the shapes of its tensors, by name."""

    file: str
    sha256: str
    dtype: str
    shapes: dict[str, tuple[int, ...]]


@config_dataclass
class ModulesRow:
    """The file of the modules that were trained with the router (modules_to_save=train)."""

    file: str
    sha256: str


@config_dataclass
class PeftLayout:
    """Whether the folder has PEFT's layout too; if not, why."""

    written: bool
    reason: str | None


@config_dataclass
class CheckpointCard:
    """Everything about a checkpoint. `layers` are the mixed modules, in the order of the gates."""

    format: str
    version: int
    config: dict[str, Any]
    base: BaseFacts
    experts: tuple[ExpertRow, ...]
    layers: tuple[str, ...]
    router: RouterRow
    peft_layout: PeftLayout
    modules: ModulesRow | None = None

    def to_bytes(self) -> bytes:
        """The card's file. Raises ValueError if it is larger than a reader takes."""
        data = TypeAdapter(CheckpointCard).dump_json(self, indent=1) + b"\n"
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"{CARD}: {len(data):,} bytes; at most {MAX_JSON_BYTES:,} are read again")
        return data


def parse_card(data: bytes, what: str) -> CheckpointCard:
    """The card in the bytes of its file. Raises Damaged."""
    plain = strict_json(data, what)
    try:
        card = TypeAdapter(CheckpointCard).validate_json(json.dumps(plain))
    except ValidationError as error:
        one = error.errors(include_url=False)[0]
        raise Damaged(f"{what}: {'.'.join(map(str, one['loc']))}: {one['msg']}") from None
    if (card.format, card.version) != (FORMAT, VERSION):
        raise Damaged(
            f"{what}: expected {FORMAT} version {VERSION}, got {card.format!r} version {card.version}; another version "
            "of mole wrote it"
        )
    if [row.index for row in card.experts] != list(range(len(card.experts))):
        raise Damaged(f"{what}: expected experts 0 … {len(card.experts) - 1} in order")
    return card


def base_facts(model: PreTrainedModel, base_id: str | None) -> BaseFacts:
    """What a card says of a base model."""
    text = model.config.get_text_config()
    return BaseFacts(
        id=base_id or model.config.name_or_path or None,
        revision=getattr(model.config, "_commit_hash", None),
        architecture=type(model).__name__,
        hidden_size=text.hidden_size,
        vocab_size=getattr(text, "vocab_size", None),
    )
