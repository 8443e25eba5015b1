"""One small walk through the main job, shared by the tests that look at what it left."""

from pathlib import Path

import pytest
from walk import SHORT, SMALL, data, mole, train


@pytest.fixture(scope="session")
def walk(tmp_path_factory) -> Path:
    """A folder with two experts in `library/`, their runs, and an X-LoRA mixture over them in `mixture/`."""
    root = tmp_path_factory.mktemp("walk")
    for task in ("reverse", "shouting"):
        train(task, root / "library", root / task)
    mole(
        "xlora-train",
        *SMALL,
        *SHORT,
        *data("reverse", "shouting"),
        f"library={root / 'library'}",
        "router.depth=2",
        "router.size=16",
        "log_every=2",
        "log_examples=2",
        f"run.folder={root / 'mixture'}",
    )
    return root
