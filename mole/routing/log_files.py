"""The files of a routing log: arrays that X-LoRA's tools read as well, and an index with which plots need no model.

`<path>.npy` holds [n, B, S, L, E] float32, n forwards of one shape. Forwards of several shapes go to one
`<path>-<B>x<S>.npy` each, and `<path>-mapping.json` says which forward each row is. `index.json` beside them, written
last, has the names of layers and experts and, per forward, its phase, task names and tokens.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mole.run_folder import write_atomically

INDEX = "index.json"
FORMAT = "mole routing log 1"
MASKED = -1  # token id of a position that is padding
PHASES = ("train", "eval", "prefill", "decode")


@dataclass(frozen=True)
class LoggedRouting:
    """The routing of one forward, or of several joined along S.

    `weights`    float32 [B, S, L, E], broadcast where layers share them.
    `mask`       bool [B, S], false at padding.
    `tokens`     int64 [B, S], -1 at padding; None where the log was given no ids.
    `texts`      per row the text of each token; None where nothing could decode them.
    `phases`     the phase of each of the S positions: train, eval, prefill or decode.
    `rows`       which rows of the forward before these rows continue, if beams changed places; None: the same.
    `continues`  this forward goes on where the one before it in the log stopped.
    """

    weights: np.ndarray
    mask: np.ndarray
    tokens: np.ndarray | None = None
    texts: tuple[tuple[str, ...], ...] | None = None
    task_names: tuple[str, ...] | None = None
    phases: tuple[str, ...] = ()
    rows: tuple[int, ...] | None = None
    continues: bool = False

    @property
    def phase(self) -> str:
        """The phase of the first position."""
        return self.phases[0]

    def pick(self, rows: Sequence[int]) -> LoggedRouting:
        """The same forward with these rows in this order; a row may repeat."""
        order = list(rows)
        return replace(
            self,
            weights=self.weights[order],
            mask=self.mask[order],
            tokens=None if self.tokens is None else self.tokens[order],
            texts=None if self.texts is None else tuple(self.texts[row] for row in order),
            task_names=None if self.task_names is None else tuple(self.task_names[row] for row in order),
            rows=None,
        )


@dataclass(frozen=True)
class LoggedRun:
    """A routing log as read back: names, and the forwards in the order in which they ran.

    `dropped` forwards were left out because the log had reached its limit.
    """

    layer_names: tuple[str, ...]
    expert_names: tuple[str, ...]
    entries: list[LoggedRouting] = field(default_factory=list)
    dropped: int = 0

    def sequences(self) -> list[LoggedRouting]:
        """One element per forward, but each `generate` call joined into one."""
        return join_sequences(self.entries)


def join_sequences(entries: Iterable[LoggedRouting]) -> list[LoggedRouting]:
    """Joins every forward that continues the one before it along S; beams are followed back through reorders."""
    groups: list[list[LoggedRouting]] = []
    for entry in entries:
        fits = groups and (entry.rows is not None or len(entry.mask) == len(groups[-1][-1].mask))
        if entry.continues and fits:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return [_joined(group) if len(group) > 1 else group[0] for group in groups]


def _joined(group: list[LoggedRouting]) -> LoggedRouting:
    rows = list(range(len(group[-1].mask)))
    parts: list[LoggedRouting] = []
    for entry in reversed(group):
        parts.insert(0, entry.pick(rows))
        if entry.rows is not None:
            rows = [entry.rows[row] for row in rows]
    tokens = [part.tokens for part in parts if part.tokens is not None]
    texts = [part.texts for part in parts if part.texts is not None]
    return LoggedRouting(
        weights=np.concatenate([part.weights for part in parts], axis=1),
        mask=np.concatenate([part.mask for part in parts], axis=1),
        tokens=np.concatenate(tokens, axis=1) if len(tokens) == len(parts) else None,
        texts=tuple(tuple(word for text in texts for word in text[row]) for row in range(len(rows)))
        if len(texts) == len(parts)
        else None,
        task_names=parts[0].task_names,
        phases=tuple(phase for part in parts for phase in part.phases),
    )


# ---- arrays
def base_path(path: str | os.PathLike[str]) -> str:
    """`path` as text without a trailing `.npy`; other dots belong to the name."""
    text = os.fspath(path)
    return text.removesuffix(".npy")


def mapping_path(base: str) -> Path:
    """Where the order of the forwards stands if they are spread over several files."""
    return Path(f"{base}-mapping.json")


def existing_files(base: str) -> list[Path]:
    """The files of an older log under this path: its single file, its mapping and the files that this names."""
    mapping, found = mapping_path(base), [Path(f"{base}.npy")]
    if mapping.is_file():
        found.append(mapping)
        found += [mapping.parent / Path(key).name for key in _read_mapping(mapping) if key.endswith(".npy")]
    return [path for path in dict.fromkeys(found) if path.exists()]


def write_arrays(
    base: str,
    shapes: Sequence[tuple[int, ...]],
    read: Callable[[int], np.ndarray],
    *,
    index: Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes forwards 0 … n-1 of the given full shapes, each fetched by `read` when its turn comes.

    Returns the files written. Raises FileExistsError if a log or its `index` is there and `overwrite` is false;
    nothing is then touched. All new files are complete before the first old one goes, and the old index goes first:
    while files change, nothing must say that they fit together.
    """
    buckets: dict[tuple[int, ...], list[int]] = {}
    for number, shape in enumerate(shapes):
        buckets.setdefault(tuple(shape), []).append(number)
    if len(buckets) == 1:
        files = {f"{base}.npy": next(iter(buckets.values()))}
    else:
        files = {f"{base}-{shape[0]}x{shape[1]}.npy": rows for shape, rows in buckets.items()}
    old = ([index] if index is not None and index.exists() else []) + existing_files(base)
    there = list(dict.fromkeys([*old, *(Path(name) for name in files if Path(name).exists())]))
    if there and not overwrite:
        raise FileExistsError(
            f"a scalings log is there already: {', '.join(map(str, there))}; give another path or overwrite=True"
        )
    Path(base).parent.mkdir(parents=True, exist_ok=True)
    fresh: dict[Path, Path] = {}
    try:
        for name, rows in files.items():
            target = Path(name)
            fresh[target] = target.parent / f".{target.name}.partial-{uuid.uuid4().hex}"
            _write_rows(fresh[target], (len(rows), *shapes[rows[0]]), (read(row) for row in rows))
        for path in old:
            path.unlink()
        for target, temporary in fresh.items():
            temporary.replace(target)
    finally:
        for temporary in fresh.values():
            temporary.unlink(missing_ok=True)
    written = list(fresh)
    if len(files) > 1:
        write_atomically(mapping_path(base), json.dumps(files))
        written.append(mapping_path(base))
    return written


def _write_rows(path: Path, shape: tuple[int, ...], rows: Iterable[np.ndarray]) -> None:
    """Row by row, so that a log larger than memory can be written."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f4")), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for row in rows:
            file.write(np.ascontiguousarray(row, dtype="<f4").data)
        file.flush()
        os.fsync(file.fileno())


def _read_mapping(path: Path) -> dict[str, list[int]]:
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a scalings log's mapping: {error}") from None
    if not isinstance(mapping, dict) or not all(
        isinstance(rows, list) and all(type(row) is int for row in rows) for rows in mapping.values()
    ):
        raise ValueError(f"{path}: a scalings log's mapping is an object from file name to a list of row numbers")
    return mapping


def read_arrays(path: str | os.PathLike[str], *, verbose: bool = False, mmap: bool = False) -> list[np.ndarray]:
    """The forwards under `path` in the order of the log, each float32 [B, S, L, E].

    With `mmap` they stay on disk until they are looked at. Raises FileNotFoundError if there is no log, ValueError if
    its files do not fit together or hold something else than numbers.
    """
    base = base_path(path)
    mapping = mapping_path(base)
    if not mapping.is_file():
        single = Path(f"{base}.npy")
        if not single.is_file():
            raise FileNotFoundError(f"no scalings log at {base}: neither {single} nor {mapping} is there")
        return list(_read_array(single, mmap, verbose))
    rows = _read_mapping(mapping)
    indices = sorted(index for file_rows in rows.values() for index in file_rows)
    if indices != list(range(len(indices))):
        raise ValueError(f"{mapping}: the row numbers of all files together must be 0 … n-1, each once; got {indices}")
    found: dict[int, np.ndarray] = {}
    for key, file_rows in rows.items():
        beside = mapping.parent / Path(key).name
        array = _read_array(beside if beside.is_file() else Path(key), mmap, verbose)
        if len(array) != len(file_rows):
            raise ValueError(f"{mapping} names {len(file_rows)} rows of {key}, and that file has {len(array)}")
        found.update(zip(file_rows, array, strict=True))
    return [found[index] for index in range(len(found))]


def _read_array(path: Path, mmap: bool, verbose: bool) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"a scalings log's mapping names {path}, which is not there")
    try:
        # Copy on write: pages come from the file, and what a caller changes never goes back into it.
        array = np.load(path, mmap_mode="c" if mmap else None, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a scalings log, or cut short: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 5:
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{path}: a scalings log is an array of floats [n, B, S, L, E], this is {what}")
    if verbose:
        print(f"{path}: {len(array)} forwards of {'x'.join(map(str, array.shape[1:]))}")
    return array if array.dtype == np.float32 else array.astype(np.float32)


# ---- index
def index_text(run: LoggedRun, base: str, decode: Callable[[list[int]], list[str]] | None = None) -> str:
    """What `index.json` says of the log under `base`; entries' weights are not looked at.

    `decode` gives the text of each of its token ids.
    """
    entries: list[dict[str, Any]] = []
    for entry in run.entries:
        item: dict[str, Any] = {"phase": entry.phase, "continues": entry.continues}
        item["task_names"] = None if entry.task_names is None else list(entry.task_names)
        item["tokens"] = None if entry.tokens is None else entry.tokens.tolist()
        if entry.tokens is None and not entry.mask.all():
            item["mask"] = entry.mask.astype(int).tolist()
        if entry.tokens is not None and decode is not None:
            item["texts"] = [_decoded(ids, decode) for ids in entry.tokens.tolist()]
        if entry.rows is not None:
            item["rows"] = list(entry.rows)
        entries.append(item)
    index = {
        "format": FORMAT,
        "log": Path(base).name,
        "layer_names": list(run.layer_names),
        "expert_names": list(run.expert_names),
        "dropped": run.dropped,
        "entries": entries,
    }
    return json.dumps(index, separators=(",", ":"))


def _decoded(ids: list[int], decode: Callable[[list[int]], list[str]]) -> list[str]:
    valid = [token for token in ids if token != MASKED]
    texts = list(decode(valid))
    if len(texts) != len(valid):
        raise ValueError(f"decode gave {len(texts)} texts for {len(valid)} token ids; one each is needed")
    each = iter(texts)
    return ["" if token == MASKED else next(each) for token in ids]


def load_routing_log(folder: str | os.PathLike[str], *, mmap: bool = True) -> LoggedRun:
    """The routing log in `folder` (a run's `scalings/`), without model, tokenizer or torch.

    Raises FileNotFoundError if there is no `index.json`, ValueError if it does not fit its arrays.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"no routing log in {folder}: {INDEX} is not there (it is written last)")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}, this version reads {FORMAT!r}")
        names = tuple(index["layer_names"]), tuple(index["expert_names"])
        items, dropped = list(index["entries"]), int(index["dropped"])
        arrays = read_arrays(path.parent / Path(index["log"]).name, mmap=mmap)
        if len(arrays) != len(items):
            raise ValueError(f"it lists {len(items)} forwards, the arrays hold {len(arrays)}")
        entries = [_entry(item, array, names) for item, array in zip(items, arrays, strict=True)]
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: not a routing log that can be read: {reason}") from None
    return LoggedRun(*names, entries=entries, dropped=dropped)


def _entry(item: dict[str, Any], weights: np.ndarray, names: tuple[tuple[str, ...], tuple[str, ...]]) -> LoggedRouting:
    batch, length, layers, experts = weights.shape
    if (layers, experts) != (len(names[0]), len(names[1])):
        raise ValueError(
            f"it names {len(names[0])} layers and {len(names[1])} experts, an array is {layers} x {experts}"
        )
    if item["phase"] not in PHASES:
        raise ValueError(f"phase {item['phase']!r} is none of {', '.join(PHASES)}")
    tokens = None if item["tokens"] is None else np.array(item["tokens"], dtype=np.int64).reshape(batch, length)
    if tokens is not None:
        mask = tokens != MASKED
    elif "mask" in item:
        mask = np.array(item["mask"], dtype=bool).reshape(batch, length)
    else:
        mask = np.ones((batch, length), dtype=bool)
    texts, tasks, rows = item.get("texts"), item["task_names"], item.get("rows")
    for what, per_row in (("texts", texts), ("task_names", tasks), ("rows", rows)):
        if per_row is not None and len(per_row) != batch:
            raise ValueError(f"a forward of {batch} rows has {len(per_row)} {what}")
    return LoggedRouting(
        weights=weights,
        mask=mask,
        tokens=tokens,
        texts=None if texts is None else tuple(tuple(row) for row in texts),
        task_names=None if tasks is None else tuple(tasks),
        phases=(item["phase"],) * length,
        rows=None if rows is None else tuple(rows),
        continues=bool(item["continues"]),
    )
