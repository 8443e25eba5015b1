"""How much of the work each expert gets: means over the tokens of a routing log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mole.routing.log_files import LoggedRouting, LoggedRun

PHASE_WORDS = {"eval": "evaluation", "prefill": "generation", "decode": "generation", "train": "training"}


@dataclass(frozen=True)
class Mean:
    """Mean weights over tokens. `is_share`: every token's weights are ≥ 0 and sum to 1, so these are shares."""

    values: np.ndarray
    tokens: int
    is_share: bool


def telling(run: LoggedRun) -> tuple[list[LoggedRouting], str]:
    """The forwards that show the router at its best knowledge, and words that say which they are.

    Evaluation where the log has some, else generation; of training only the last quarter, when it has learnt.
    """
    for phases in (("eval",), ("prefill", "decode")):
        chosen = [entry for entry in run.entries if entry.phase in phases]
        if chosen:
            return chosen, PHASE_WORDS[phases[0]]
    count = max(1, len(run.entries) // 4)
    return run.entries[-count:], f"last {count} of {len(run.entries)} logged training forwards"


def mean_by_layer(entries: Sequence[LoggedRouting]) -> Mean:
    """Mean weights [L, E] over all tokens that are no padding."""
    return _mean([(entry.weights, entry.mask) for entry in entries])


def mean_by_task(entries: Sequence[LoggedRouting]) -> dict[str, Mean]:
    """Task name → mean weights [E] over its tokens and over all layers; entries without task names do not count."""
    rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for entry in entries:
        for row, task in enumerate(entry.task_names or ()):
            rows.setdefault(task, []).append((entry.weights[row : row + 1], entry.mask[row : row + 1]))
    means = {task: _mean(parts) for task, parts in rows.items()}
    return {
        task: Mean(mean.values.mean(0), mean.tokens, mean.is_share) for task, mean in means.items() if mean.tokens > 0
    }


def _mean(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Mean:
    total, tokens, is_share = np.zeros(parts[0][0].shape[2:]), 0, True
    for weights, mask in parts:
        valid = weights[mask]
        total += valid.sum(axis=0, dtype=np.float64)
        tokens += len(valid)
        is_share = is_share and are_shares(valid)
    return Mean(total / max(tokens, 1), tokens, is_share)


def are_shares(weights: np.ndarray) -> bool:
    """Whether weights [..., E] are nowhere below 0 and sum to 1 (to 1 %)."""
    return bool(weights.size == 0 or (weights.min() >= -1e-6 and np.abs(weights.sum(-1) - 1).max() <= 0.01))
