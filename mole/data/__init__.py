"""Datasets: one file per kind of source; prompts, labels, splits, batches, task names."""

from mole.data import classification, classification_hub, csv, generated, glue, hub, jsonl, majority, parquet, text
from mole.data.batches import by_length, collate, epoch_order, targets_of
from mole.data.heads import head_of, metric_of
from mole.data.joined import joined
from mole.data.load import load, load_many
from mole.data.packing import collate_packed, first_fit
from mole.data.samples import IGNORED, DataSplits, Sample, Split, spread
from mole.data.whole_texts import LabelledText, Metric, default_metric, encode_texts
from mole.head import Head

__all__ = [
    "IGNORED",
    "DataSplits",
    "Head",
    "LabelledText",
    "Metric",
    "Sample",
    "Split",
    "by_length",
    "classification",
    "classification_hub",
    "collate",
    "collate_packed",
    "csv",
    "default_metric",
    "encode_texts",
    "epoch_order",
    "first_fit",
    "generated",
    "glue",
    "head_of",
    "hub",
    "joined",
    "jsonl",
    "load",
    "load_many",
    "majority",
    "metric_of",
    "parquet",
    "spread",
    "targets_of",
    "text",
]
