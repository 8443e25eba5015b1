"""Datasets: one file per kind of source; prompts, labels, splits, batches, task names."""

from mole.data import csv, generated, hub, jsonl, parquet, text
from mole.data.batches import by_length, collate, epoch_order
from mole.data.joined import joined
from mole.data.load import load, load_many
from mole.data.samples import IGNORED, DataSplits, Sample, Split, spread

__all__ = [
    "IGNORED",
    "DataSplits",
    "Sample",
    "Split",
    "by_length",
    "collate",
    "csv",
    "epoch_order",
    "generated",
    "hub",
    "joined",
    "jsonl",
    "load",
    "load_many",
    "parquet",
    "spread",
    "text",
]
