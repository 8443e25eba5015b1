"""The dtype that experts are computed in: autocast's where it is on, the input's otherwise."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast `x` to; None where it is off, or would leave x alone as it does float64.

    A kernel that gets a dtype casts its tensors to it and runs under `torch.autocast(x.device.type, enabled=False)`.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)
