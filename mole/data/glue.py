"""The tasks of GLUE, and SNLI, from the folders of their official files: train.tsv and dev.tsv.

The official test files have no labels, so dev.tsv is the validation split and the test split; of MNLI the matched file
is the one and the mismatched the other. GLUE: Wang et al. 2019, arXiv:1804.07461; SNLI: Bowman et al. 2015.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mole.data.encode import Encoded, assemble, longest
from mole.data.jsonl import read_text
from mole.data.records import Count, Record, existing_file
from mole.data.samples import DataSplits
from mole.data.whole_texts import LabelledText, Metric, encode_texts, label_index, label_number
from mole.head import Head
from mole.registry import DATASETS, config_dataclass, unknown

NO_LABEL = "-"  # what MNLI and SNLI write where the annotators did not agree
SCORES = (0.0, 5.0)  # least and greatest similarity of STS-B


@dataclass(frozen=True)
class GlueTask:
    """How a task's files look. `header`: the columns of files that do not name them; `rows`: the official counts."""

    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metric: Metric
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    header: tuple[str, ...] | None = None
    validation: str = "dev.tsv"
    test: str = "dev.tsv"

    @property
    def head(self) -> Head:
        """Classification among the labels; regression where there are none."""
        return Head("classification" if self.labels else "regression", self.labels)


PAIR, BINARY = ("sentence1", "sentence2"), ("0", "1")
THREE, TWO = ("entailment", "neutral", "contradiction"), ("entailment", "not_entailment")


def _counts(train: int, dev: int) -> dict[str, tuple[int, ...]]:
    return {"train.tsv": (train,), "dev.tsv": (dev,)}


TASKS = {
    "cola": GlueTask(
        ("sentence",), "label", BINARY, "mcc", _counts(8551, 1043), header=("source", "label", "star", "sentence")
    ),
    "sst2": GlueTask(("sentence",), "label", BINARY, "accuracy", _counts(67349, 872)),
    "mrpc": GlueTask(("#1 String", "#2 String"), "Quality", BINARY, "accuracy_f1", _counts(3668, 408)),
    "qqp": GlueTask(  # with and without the three pairs of which a question is empty
        ("question1", "question2"),
        "is_duplicate",
        BINARY,
        "accuracy_f1",
        {"train.tsv": (363846, 363849), "dev.tsv": (40430,)},
    ),
    "stsb": GlueTask(PAIR, "score", (), "pearson_spearman", _counts(5749, 1500)),
    "mnli": GlueTask(
        PAIR,
        "gold_label",
        THREE,
        "accuracy",
        {"train.tsv": (392702,), "dev_matched.tsv": (9815,), "dev_mismatched.tsv": (9832,)},
        validation="dev_matched.tsv",
        test="dev_mismatched.tsv",
    ),
    "snli": GlueTask(PAIR, "gold_label", THREE, "accuracy", _counts(549367, 9842)),
    "qnli": GlueTask(("question", "sentence"), "label", TWO, "accuracy", _counts(104743, 5463)),
    "rte": GlueTask(PAIR, "label", TWO, "accuracy", _counts(2490, 277)),
    "wnli": GlueTask(PAIR, "label", BINARY, "accuracy", _counts(635, 71)),
}


@config_dataclass
class GlueConfig:
    """Fields that every task has; `path` is the folder with its files."""

    name: str
    path: str
    task: str | None = None
    max_length: int = Field(default=128, ge=8)
    limit: Count | None = None
    validation_examples: Count | None = None
    test_examples: Count | None = None
    check_counts: bool = True

    def head(self) -> Head:
        """What the task asks of a model."""
        return TASKS[self.name].head


@config_dataclass
class ColaConfig(GlueConfig):
    name: Literal["cola"] = "cola"


@config_dataclass
class Sst2Config(GlueConfig):
    name: Literal["sst2"] = "sst2"


@config_dataclass
class MrpcConfig(GlueConfig):
    name: Literal["mrpc"] = "mrpc"


@config_dataclass
class QqpConfig(GlueConfig):
    name: Literal["qqp"] = "qqp"


@config_dataclass
class StsbConfig(GlueConfig):
    name: Literal["stsb"] = "stsb"


@config_dataclass
class MnliConfig(GlueConfig):
    name: Literal["mnli"] = "mnli"


@config_dataclass
class SnliConfig(GlueConfig):
    name: Literal["snli"] = "snli"


@config_dataclass
class QnliConfig(GlueConfig):
    name: Literal["qnli"] = "qnli"


@config_dataclass
class RteConfig(GlueConfig):
    name: Literal["rte"] = "rte"


@config_dataclass
class WnliConfig(GlueConfig):
    name: Literal["wnli"] = "wnli"


def load_glue(config: GlueConfig, tokenizer: Any, *, seed: int, context_length: int | None) -> DataSplits:
    """The splits of the task in the folder `config.path`; nothing is drawn, so `seed` changes nothing.

    Rows whose label is "-" are left out and counted as dropped. Raises ValueError, with file and line, for a file that
    is missing or not as it should be.
    """
    task, max_length = TASKS[config.name], longest(config.max_length, context_length)
    name = config.task or config.name

    def encode(file: str, count: int | None) -> list[Encoded]:
        path = str(Path(config.path) / file)
        rows, dropped = labelled(read_tsv(path, task.header), task)
        if config.check_counts:
            check_count(path, len(rows), task.rows.get(file, ()))
        return [*encode_texts(tokenizer, rows[:count], task=name, max_length=max_length), *dropped]

    splits = {
        "train": encode("train.tsv", config.limit),
        "validation": encode(task.validation, config.validation_examples),
        "test": encode(task.test, config.test_examples),
    }
    return assemble(config.name, splits, max_unsupervised=1.0, head=task.head, metric=task.metric)


def read_tsv(path: str, names: Sequence[str] | None = None) -> list[Record]:
    """The rows of a TSV file: one to a line, no quoting, every row as wide as the first; a byte order mark is skipped.

    The first line names the columns, unless `names` does. ValueError with file and line for another width.
    """
    lines = read_text(existing_file(path)).removesuffix("\n").split("\n")
    rows = [line.removesuffix("\r").split("\t") for line in lines]
    columns, first = (rows[0], 1) if names is None else (list(names), 0)
    records: list[Record] = []
    for number, row in enumerate(rows[first:], start=first + 1):
        if len(row) != len(columns):
            raise ValueError(
                f"{path}:{number}: {len(row)} fields, but there are {len(columns)} columns ({', '.join(columns)}): "
                "one record per line, parted by tabs, without quoting"
            )
        records.append(Record(dict(zip(columns, row, strict=True)), f"{path}:{number}"))
    return records


def check_count(path: str, count: int, official: tuple[int, ...]) -> None:
    """ValueError if a file has not as many labelled rows as the official one."""
    if official and count not in official:
        known = " or ".join(f"{number:,}" for number in official)
        raise ValueError(
            f"{path}: {count:,} rows with a label, but the official file has {known}: get it anew, or set "
            "dataset.check_counts=false for a file of your own"
        )


def labelled(records: list[Record], task: GlueTask) -> tuple[list[LabelledText], list[Encoded]]:
    """The rows with their labels' indices, or numbers; and apart from them those that have no label."""
    rows: list[LabelledText] = []
    dropped: list[Encoded] = []
    for record in records:
        for column in (*task.texts, task.label):
            if column not in record.fields:
                raise ValueError(f"{record.where}: {unknown('column', column, record.fields)}: is it the task's file?")
        texts, label = [record.fields[column] for column in task.texts], record.fields[task.label]
        if not any(text.strip() for text in texts):  # QQP has pairs of which one is empty
            raise ValueError(f"{record.where}: {' and '.join(task.texts)}: empty")
        if label == NO_LABEL and task.labels == THREE:
            dropped.append(Encoded(None, False, f"its label is {NO_LABEL}", record.where, "\n".join(texts)))
            continue
        target = label_index(label, task.head, record.where) if task.labels else _score(label, record.where)
        rows.append(LabelledText(texts[0], texts[1] if len(texts) > 1 else None, target, label, record.where))
    return rows, dropped


def _score(label: str, where: str) -> float:
    number = label_number(label, where)
    if not SCORES[0] <= number <= SCORES[1]:
        raise ValueError(f"{where}: the score is {number:g}, but {SCORES[0]:g} to {SCORES[1]:g} are the limits")
    return number


for _config in (
    *(ColaConfig, Sst2Config, MrpcConfig, QqpConfig, StsbConfig),
    *(MnliConfig, SnliConfig, QnliConfig, RteConfig, WnliConfig),
):
    DATASETS.register(_config.name, _config)(load_glue)
