"""Datasets: one file per kind of source; prompts, labels, splits, batches, task names."""

from mole.data import generated
from mole.data.batches import collate, epoch_order
from mole.data.load import load, load_many
from mole.data.samples import IGNORED, DataSplits, Sample, Split

__all__ = ["IGNORED", "DataSplits", "Sample", "Split", "collate", "epoch_order", "generated", "load", "load_many"]
