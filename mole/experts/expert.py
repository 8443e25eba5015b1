"""An expert: a trained adapter and its card. Its folder is one that PEFT can load as it stands."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole.experts import folder as folders
from mole.experts.card import BackboneFacts, Card, bytes_facts, new_card
from mole.experts.errors import Damaged, LibraryError
from mole.experts.names import is_name
from mole.run_folder import write_folder_atomically

if TYPE_CHECKING:
    from mole.adapters import Adapter


class Expert:
    """A card, at once, and an adapter, when it is asked for.

    Made either of an `adapter` in memory (`describe` makes the card of it), or with `fetch`, which puts the expert's
    verified files into an empty folder. `where` is its address, for messages.
    """

    def __init__(
        self,
        card: Card,
        adapter: Adapter | None = None,
        *,
        fetch: Callable[[Path], object] | None = None,
        where: str | None = None,
    ) -> None:
        if adapter is None and fetch is None:
            raise TypeError("an expert has an adapter in memory, or a place to fetch it from")
        self.card = card
        self._adapter = adapter
        self._fetch = fetch
        self._where = where

    def __repr__(self) -> str:
        return f"Expert({', '.join(self.card.tasks) or self.card.kind}, revision {self.revision[:8]})"

    @property
    def revision(self) -> str:
        """The digest of the whole card."""
        return self.card.revision

    @property
    def adapter(self) -> Adapter:
        """The adapter, read and checked at the first use. Raises Damaged, Refused."""
        if self._adapter is None:
            assert self._fetch is not None
            with tempfile.TemporaryDirectory(prefix="mole-expert-") as place:
                self._fetch(Path(place))
                self._adapter = read_adapter(place, self.card, self._where)
        return self._adapter

    def with_card(self, card: Card) -> Expert:
        """The same adapter under another card of the same content."""
        assert card.content == self.card.content
        return Expert(card, self._adapter, fetch=self._fetch, where=self._where)

    def save(self, folder: str | Path) -> None:
        """Write the expert's folder, whole or not at all; it may be there only if it is empty.

        Raises FileExistsError for a folder with content, LibraryError if the adapter is no longer what the card says.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} is there already and not empty; choose a new folder")
        write_folder_atomically(folder, self.write_into, replace=True)

    def write_into(self, folder: Path) -> None:
        """Write the files, then the card, into an empty folder."""
        if self._fetch is not None:
            self._fetch(folder)
        elif self._adapter is not None:
            files = _files(self._adapter, self.card.backbone.name)
            if {name: bytes_facts(data) for name, data in files.items()} != self.card.files:
                raise LibraryError(
                    "the adapter has changed since its card was made: make the card anew with describe()"
                )
            for name, data in files.items():
                (folder / name).write_bytes(data)
        folders.write_card(self.card, folder)


def describe(adapter: Adapter, backbone: BackboneFacts, **facts: Any) -> Card:
    """The card of an adapter in memory.

    `backbone` is what it was trained on (name, revision, shapes); `facts` as for `new_card`: tasks, tags, description,
    license, author, data, training, scores, message, derived_from, extra.
    """
    files = _files(adapter, backbone.name)
    rows = {name: bytes_facts(data) for name, data in files.items()}
    return new_card(rows, backbone, adapter=summary(adapter), **facts)


def summary(adapter: Adapter) -> dict[str, Any]:
    """What a card tells of an adapter: the largest rank, the commonest alpha, the last parts of its modules' paths.

    Rank and alpha are None for methods that have none.
    """
    parts = list(adapter.modules.values())
    ranks = [part.rank for part in parts if part.rank is not None]
    alphas = Counter(float(part.alpha) for part in parts if part.alpha is not None)
    return {
        "method": adapter.method,
        "rank": max(ranks, default=None),
        "alpha": min(alphas, key=lambda alpha: (-alphas[alpha], alpha), default=None),
        "targets": sorted({path.rsplit(".", 1)[-1] for path in adapter.modules}),
        "full_modules": sorted(adapter.full_modules),
        "parameters": adapter.parameters(),
        "dtype": str(adapter.dtype).removeprefix("torch."),
    }


def read_adapter(folder: str | Path, card: Card, where: str | None = None) -> Adapter:
    """The adapter in an expert's folder, as its card says; `where` is what messages call that folder.

    Raises Damaged, Refused, LibraryError for a mixture.
    """
    from mole.adapters import files as adapter_files

    if card.kind != "adapter":
        raise LibraryError(
            f"{where or folder} is a {card.kind}, not an adapter: open it with mole.from_library, or as the model "
            "of mole evaluate or generate"
        )
    files = folders.verified_files(folder, card)
    adapter = adapter_files.parse(files, where or str(folder)).adapter
    if summary(adapter) != card.adapter:
        wrong = [key for key, value in summary(adapter).items() if value != card.adapter[key]]  # type: ignore[index]
        raise Damaged(f"{where or folder}: the card's summary does not fit the files (adapter.{wrong[0]})")
    return adapter


def load_expert(place: str | Path) -> Expert:
    """An expert from its folder, a run folder, an address `<library>/<name>[@<revision>]`, or a plain PEFT folder.

    The files are verified when the adapter is asked for. Raises LibraryError: nothing there, damaged, no adapter.
    """
    path = Path(place).expanduser()
    in_library = is_name(path.name) and (path.parent / ".mole").is_dir()
    if "://" not in str(place) and path.is_dir() and not in_library:
        return _load_folder(path)
    from mole.experts.address import split_expert
    from mole.experts.library import ExpertLibrary

    library, name, revision = split_expert(str(place))
    return ExpertLibrary.open(library).get_expert(name, revision)


def _load_folder(path: Path) -> Expert:
    inner = path / "expert"
    home = inner if folders.has_card(inner) and not folders.has_card(path) else path
    if folders.has_card(home):
        card = folders.read_card(home)
        if card.kind != "adapter":
            raise LibraryError(f"{home} is a {card.kind}, not an expert: use it as the model of evaluate or generate")
        folders.check_entries(home, card)
        return Expert(card, fetch=lambda target: folders.copy_files(home, target, card))
    if (path / "adapter_config.json").is_file():
        return _import(path)
    raise LibraryError(
        f"no expert in {path}: it has neither expert.json nor adapter_config.json, and no expert/ folder that has; "
        "name an expert's folder, a run of train-expert, a PEFT folder or <library>/<name>"
    )


def _import(path: Path) -> Expert:
    """A plain PEFT or AdapterHub folder as an expert: checked and rewritten in memory, never trusted, never run."""
    from mole.experts.importing import Hints, expert_of, read_source

    return expert_of(read_source(path), hints=Hints(), lenient=True)


def _files(adapter: Adapter, backbone_name: str) -> dict[str, bytes]:
    from mole.adapters import files

    return files.dump(adapter, backbone_name)
