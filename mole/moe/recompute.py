"""Whether a forward is computed a second time: gradient checkpointing does so inside the backward pass."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """True inside a backward pass, where only gradient checkpointing runs a forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
