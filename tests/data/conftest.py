"""A tokenizer of one token per byte, and datasets from configs given as JSON, as a command gives them."""

import json

import pytest
from pydantic import TypeAdapter

import mole.data
from mole.registry import DATASETS


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    from mole.backbones.tiny_backbone import FOLDER

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture
def load(tokenizer):
    """load(name=…, fields…) → DataSplits."""

    def load(seed=0, context_length=None, tokenizer=tokenizer, **fields):
        config = TypeAdapter(DATASETS.union()).validate_json(json.dumps(fields))
        return mole.data.load(config, tokenizer, seed=seed, context_length=context_length)

    return load


@pytest.fixture
def jsonl(tmp_path):
    """Write records as JSON Lines and give the path."""

    def write(records, name="facts.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write
