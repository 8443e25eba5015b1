"""The dtype that experts are computed in: autocast's where it is on, the input's otherwise."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast `x` to; None where it is off, or would leave x alone as it does float64.

    A kernel casts its tensors to that dtype itself, and then runs without autocast.
    """
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast off for the body, on the device of `x`."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
