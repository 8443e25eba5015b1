"""The flex adapter of a multi-adapter: a new bottleneck after the mix of experts, trained with the weights.

y' = LN_flex(y + u(y) + x)          at a post-norm sub-layer
y' = y + u(y)                       elsewhere, and with norm=False
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mole.adapters import NormWeights
from mole.adapters.bottleneck import added
from mole.adapters.norm import normed
from mole.routing import Frame


class Flex(nn.Module):
    """A bottleneck of `size` features at width `width`, first D ~ N(0, 0.02²) and the rest 0.

    `norm` is the norm of the sub-layer that it has a copy of; None: it has none.
    """

    activation, scale, gain = "gelu", 1.0, None

    def __init__(self, width: int, size: int, norm: Any = None, *, device: torch.device | None = None):
        super().__init__()
        self.down = nn.Parameter(torch.randn(size, width, device=device) * 0.02)
        self.down_bias = nn.Parameter(torch.zeros(size, device=device))
        self.up = nn.Parameter(torch.zeros(width, size, device=device))
        self.up_bias = nn.Parameter(torch.zeros(width, device=device))
        self._norm = (norm,)  # in a tuple: the backbone owns the module
        if norm is not None:
            own = NormWeights.of(norm)
            self.norm_weight = nn.Parameter(own.weight.float())
            self.norm_bias = None if own.bias is None else nn.Parameter(own.bias.float())

    def forward(self, y: Tensor, x: Tensor | None, frame: Frame) -> Tensor:
        """`y` [B, T, d] the mix, `x` [B, T, d] the residual of a post-norm sub-layer → [B, T, d]."""
        if frame.fixed is not None:  # a routing that was given stands for the experts alone
            return y
        changed = y + added(self, y)
        if self._norm[0] is None or x is None:
            return changed
        return normed(self._norm[0], changed + x, self.norm_weight, self.norm_bias)
