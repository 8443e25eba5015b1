"""Fixtures of X-LoRA's tests."""

import pytest
from xlora_cases import build, write_experts

from mole import xlora


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, str]:
    """Three expert folders: law, code, bio."""
    return write_experts(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def model(folders) -> xlora.XLoraModel:
    """Layerwise, depth 2."""
    return build(folders, layerwise_scalings=True, xlora_depth=2, xlora_size=16)
