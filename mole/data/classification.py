"""Texts or pairs with labels from records of one's own: JSON Lines, CSV, TSV, or a task file that names such files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mole.data.csv import read_csv
from mole.data.encode import Encoded, assemble, longest
from mole.data.jsonl import read_jsonl, read_text
from mole.data.records import Count, HeldOut, Record, existing_file, rename, split_records, text_field
from mole.data.samples import DataSplits
from mole.data.whole_texts import LabelledText, Metric, default_metric, encode_texts, label_index, label_number
from mole.head import Head
from mole.registry import DATASETS, config_dataclass, unknown

# The columns with text.
LAYOUTS = (("text_a", "text_b"), ("premise", "hypothesis"), ("sentence1", "sentence2"), ("sentence",), ("text",))
COLUMNS = (*(column for layout in LAYOUTS for column in layout), "label")
ALL_LABELS = "name all labels with dataset.labels=[…]"


@config_dataclass
class ClassificationConfig:
    """Records with a text or two and a label."""

    name: Literal["classification"] = "classification"
    path: str
    task: str | None = None
    columns: dict[str, str] | None = None
    labels: tuple[str | bool | int | float, ...] | None = None
    regression: bool = False
    metric: Metric | None = None
    quoting: bool | None = None
    validation: HeldOut = 0.1
    test: HeldOut = 0.1
    limit: Count | None = None
    max_length: int = Field(default=128, ge=8)

    def __post_init__(self) -> None:
        problems = [f"columns: {unknown('key', key, COLUMNS)}" for key in self.columns or {} if key not in COLUMNS]
        if self.regression and self.labels is not None:
            problems.append("regression=true has no labels: leave labels=null, or regression=false")
        if self.metric is not None and self.regression != (self.metric == "pearson_spearman"):
            problems.append(f"metric={self.metric} does not go with regression={str(self.regression).lower()}")
        if self.labels is not None:
            try:
                named_labels(self.labels)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))

    def head(self) -> Head:
        """What the data asks of a model: the labels given, or those of the training file in order."""
        if self.regression:
            return Head("regression")
        if self.labels is not None:
            return named_labels(self.labels)
        return self.head_for(training_records(self, self.files().train))

    def head_for(self, records: list[Record]) -> Head:
        """The labels of these training records."""
        return head_of_records(self, records)

    def files(self) -> "Files":
        """The training records and what is held out."""
        return files_of(self)

    def read(self, path: str) -> list[Record]:
        """The records of one file."""
        return read_file(self, path)


@dataclass(frozen=True)
class Files:
    """The training file, what is held out, and the name that a task file gives its task."""

    train: str
    held_out: dict[str, HeldOut]
    task: str | None = None


@DATASETS.register("classification", ClassificationConfig)
def load_classification(
    config: ClassificationConfig, tokenizer: Any, *, seed: int, context_length: int | None
) -> DataSplits:
    """The splits of the file at `config.path`, or of the files that a task file there names.

    Raises ValueError, with the row, for an empty text, a label that is not known, and one that the training split
    lacks.
    """
    files = config.files()
    records = training_records(config, files.train)
    head = Head("regression") if config.regression else config.head_for(records)
    drawn = split_records(records, files.held_out, config.read, seed=seed, path=files.train)
    rows = {split: None if part is None else labelled(part, config, head) for split, part in drawn.items()}
    if config.labels is None and not config.regression:
        check_labels(rows)
    name = files.task or Path(config.path.rstrip("/")).stem
    max_length = longest(config.max_length, context_length)

    def encode(part: list[LabelledText]) -> list[Encoded]:
        return list(encode_texts(tokenizer, part, task=config.task or name, max_length=max_length))

    splits = {split: None if part is None else encode(part) for split, part in rows.items()}
    return assemble(name, splits, max_unsupervised=0.0, head=head, metric=config.metric or default_metric(head))


def files_of(config: ClassificationConfig) -> Files:
    """`config.path` with its held-out shares; or, where it is a task file, what that names, relative to itself.

    A task file is that of nlpr: {"task": name, "paths": {"train": file, "val": file}}. Its "val" is validated and
    tested on, as its test files have no labels. Raises ValueError for one without training data, and for shares of the
    config that could not act beside it.
    """
    given: dict[str, HeldOut] = {"test": config.test, "validation": config.validation}
    path = existing_file(config.path)
    content = _json(path) if path.suffix == ".json" else None
    if not isinstance(content, dict) or "paths" not in content:
        return Files(config.path, given)
    paths = content["paths"]
    if not isinstance(paths, dict) or not all(isinstance(file, str) for file in paths.values()) or "train" not in paths:
        raise ValueError(f'{path}: "paths" names a file for "train" and, if there is one, "val"; got {paths!r}')
    here = {split: str(path.parent / file) for split, file in paths.items()}
    task = str(content["task"]) if "task" in content else None
    if "val" not in here:
        return Files(here["train"], given, task)
    default = {split: ClassificationConfig.__pydantic_fields__[split].default for split in given}  # type: ignore[attr-defined]
    if given != default:
        raise ValueError(f"{path}: the task file names its validation data: leave dataset.validation and dataset.test")
    return Files(here["train"], {"test": here["val"], "validation": here["val"]}, task)


def _json(path: Path) -> Any:
    """The one value in a JSON file; None if it is not that, but lines, of which the reader tells what is wrong."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError:
        return None


def read_file(config: ClassificationConfig, path: str) -> list[Record]:
    """The records of a file by its suffix: .csv, .tsv, or else JSON."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".tsv"):
        return read_jsonl(path)
    quoting = suffix == ".csv" if config.quoting is None else config.quoting
    return read_csv(path, delimiter="," if suffix == ".csv" else "\t", quoting=quoting)


def training_records(config: ClassificationConfig, path: str) -> list[Record]:
    """The records that are trained on and, by shares, held out."""
    return config.read(path)[: config.limit]


def head_of_records(config: ClassificationConfig, records: list[Record]) -> Head:
    """The labels that the config gives, or all that the records have: numbers by size, others by the alphabet."""
    if config.labels is not None:
        return named_labels(config.labels)
    found = {label_of(rename(record, config.columns)) for record in records}
    if len(found) < 2:
        raise ValueError(f"{config.path}: all labels are {', '.join(found)}: two are wanted at least; {ALL_LABELS}")
    return Head("classification", in_order(found))


def named_labels(labels: Sequence[str | bool | int | float]) -> Head:
    """The head whose labels are written out; ValueError for fewer than two, or one twice."""
    return Head("classification", tuple(label_name(label) for label in labels))


def in_order(labels: set[str]) -> tuple[str, ...]:
    """Sorted: as numbers if all are."""
    try:
        return tuple(sorted(labels, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def label_name(label: str | bool | int | float) -> str:
    """A label as the head has it: a whole float as its integer, so that 1 and 1.0 are one."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def label_of(record: Record) -> str:
    """The record's label; ValueError, naming the row, if it has none."""
    label = record.fields.get("label")
    if isinstance(label, float):
        return label_name(label)
    if "label" not in record.fields:
        hint = "dataset.columns can name another, as in dataset.columns={label: class}"
        raise ValueError(f"{record.where}: {unknown('column', 'label', record.fields)}; {hint}")
    name = text_field(record, "label")
    if not name.strip():
        raise ValueError(f"{record.where}: label is empty")
    return name


def labelled(records: list[Record], config: ClassificationConfig, head: Head) -> list[LabelledText]:
    """The records as texts with targets."""
    rows: list[LabelledText] = []
    for found in records:
        record = rename(found, config.columns)
        text, second = texts_of(record)
        label, where = label_of(record), record.where
        target = label_number(label, where) if config.regression else label_index(label, head, where, f"; {ALL_LABELS}")
        rows.append(LabelledText(text, second, target, label, where))
    return rows


def texts_of(record: Record) -> tuple[str, str | None]:
    """The record's text, or its two; ValueError, naming the row, if there is none or it is empty."""
    layout = next((layout for layout in LAYOUTS if layout[0] in record.fields), None)
    if layout is None:
        known = "; ".join(", ".join((*layout, "label")) for layout in LAYOUTS)
        raise ValueError(
            f"{record.where}: the keys {', '.join(map(str, record.fields)) or '(none)'} are those of no known format "
            f"({known}); dataset.columns can name others, as in dataset.columns={{text_a: question, label: answer}}"
        )
    chosen = [text_field(record, layout[0])]
    if len(layout) > 1 and (layout[0] != "text_a" or record.fields.get("text_b") is not None):
        chosen.append(text_field(record, layout[1]))
    for column, text in zip(layout, chosen, strict=False):
        if not text.strip():
            raise ValueError(f"{record.where}: {column} is empty")
    return chosen[0], chosen[1] if len(chosen) > 1 else None


def check_labels(rows: dict[str, list[LabelledText] | None]) -> None:
    """ValueError, naming the row, for a held-out label that no training row has."""
    trained = {row.label for row in rows["train"] or ()}
    for split, part in rows.items():
        for row in part or ():
            if row.label not in trained:
                raise ValueError(
                    f"{row.where}: the label {row.label!r} is in the {split} split alone, and training has "
                    f"{', '.join(in_order(trained))}; {ALL_LABELS}"
                )
