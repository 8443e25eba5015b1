"""Small experts out of random numbers: no model is needed to keep them."""

import pytest
import torch

from mole.adapters import Adapter, LoraWeights
from mole.experts import BackboneRef, Expert, ExpertLibrary, describe

torch.set_num_threads(1)
BACKBONE = BackboneRef("user/tiny-llama", None, "ab" * 32)
SCORE = {"metric": "accuracy", "task": "sums", "dataset": "sums", "split": "test", "examples": 9, "config": None}


def make_adapter(seed=0, rank=2):
    generator = torch.Generator().manual_seed(seed)
    modules = {
        f"model.layers.{n}.self_attn.{name}_proj": LoraWeights(
            A=torch.randn(rank, 6, generator=generator), B=torch.randn(4, rank, generator=generator), alpha=4.0
        )
        for n in range(2)
        for name in "qv"
    }
    return Adapter("lora", modules, targets=("q_proj", "v_proj"))


def make_expert(seed=0, **facts):
    adapter = make_adapter(seed)
    scores = [{**SCORE, "value": 0.5, "higher_is_better": True}]
    facts = {"tasks": ("sums",), "scores": scores, "training": {"steps": 3, "learning_rate": 1e-3}, **facts}
    return Expert(describe(adapter, BACKBONE, **facts), adapter)


@pytest.fixture
def expert():
    return make_expert()


@pytest.fixture
def make():
    """Makes an expert of a seed and of facts."""
    return make_expert


@pytest.fixture
def library(tmp_path):
    return ExpertLibrary.open(str(tmp_path / "lib"))
