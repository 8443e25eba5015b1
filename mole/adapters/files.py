"""The two files of an adapter, in PEFT's format where PEFT has the method, else in mole's own."""

from __future__ import annotations

from collections.abc import Mapping

from mole.adapters import own_format, peft_format
from mole.adapters.adapter import Adapter
from mole.adapters.peft_format import PeftFolder
from mole.adapters.places import symbolic

WEIGHTS = peft_format.WEIGHTS
CONFIGS = (peft_format.CONFIG, own_format.CONFIG)


def dump(adapter: Adapter, backbone_name: str | None) -> dict[str, bytes]:
    """The config and the weights, name of the file → bytes; equal adapters give equal bytes.

    Raises ValueError for what neither format has a place for.
    """
    adapter = symbolic(adapter)
    form = peft_format if peft_format.has_place_for(adapter.method) else own_format
    return form.dump(adapter, backbone_name)


def parse(files: Mapping[str, bytes], where: str) -> PeftFolder:
    """The adapter in the bytes of its files; `where` names them in errors. Raises Damaged or Refused."""
    if own_format.CONFIG in files:
        adapter, backbone = own_format.parse(files[own_format.CONFIG], files[WEIGHTS], where)
        return PeftFolder(adapter, backbone)
    return peft_format.parse(files[peft_format.CONFIG], files[WEIGHTS], where)


def config_name(config: bytes) -> str:
    """Which of the two configs these bytes are; both readers refuse what is neither."""
    return own_format.CONFIG if b'"peft_type"' not in config and b'"method"' in config else peft_format.CONFIG
