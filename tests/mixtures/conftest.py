"""Fixtures of the mixtures' tests."""

import pytest
import torch
from mixture_cases import CONFIGS, mixture

from mole.mixtures import MultiExpertModel


@pytest.fixture(params=list(CONFIGS))
def any_mixture(request) -> MultiExpertModel:
    return mixture(request.param)


@pytest.fixture
def batch() -> dict:
    """Two rows of nine tokens, the second padded on the right."""
    ids = torch.randint(3, 101, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "task_names": ["add", "date"]}
