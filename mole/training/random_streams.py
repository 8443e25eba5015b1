"""The random generators of this process: seeded by name and rank, captured whole, put back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mole.config.seeds import seed_for

State = dict[str, Any]


def seed_streams(seed: int, rank: int) -> None:
    """Starts python's, numpy's and torch's generators where training's dropout begins on this rank."""
    start = seed_for("dropout", seed, rank)
    random.seed(start)
    np.random.seed(start % 2**32)  # noqa: NPY002  (the generator that other packages draw from)
    torch.manual_seed(start % 2**63)


def capture_streams() -> State:
    """The state of every generator, as data that JSON takes; the tensors' bytes as hex."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, words, next_gauss = random.getstate()
    state: State = {
        "python": [version, list(words), next_gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": _hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _hex(torch.cuda.get_rng_state())  # of the current device: the one this process trains on
    if torch.backends.mps.is_available():
        state["mps"] = _hex(torch.mps.get_rng_state())
    return state


def restore_streams(state: State) -> None:
    """Puts every generator where `capture_streams` found it."""
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_tensor(state["mps"]))


@contextmanager
def streams_kept() -> Iterator[None]:
    """Whatever the body draws, afterwards the generators are where they were."""
    before = capture_streams()
    try:
        yield
    finally:
        restore_streams(before)


def _hex(state: torch.Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()
