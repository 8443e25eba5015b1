"""Whether the samples of a packed row are as if each were alone: asked of the model itself, not of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mole.training.batches import to_device
from mole.training.loss import Objective
from mole.training.random_streams import streams_kept

EXACT, HALF = 1e-3, 0.15  # of the logits' standard deviation; what leaks from a neighbour is a good part of it


def check_isolation(model: nn.Module, packed: dict[str, Any], alone: Sequence[dict[str, Any]]) -> None:
    """Compares the logits of a batch of one packed row with those of batches of its samples, in the row's order.

    Raises ValueError if they differ: attention, positions, a convolution or a router reached over a border.
    """
    objective, was_training = Objective(model), model.training
    if "segment_ids" not in objective.takes and "position_ids" not in objective.takes:
        raise ValueError(
            f"training.packing: a {type(model).__name__} takes no position_ids, by which it would find where a sample "
            "begins; set training.packing=null (training.group_by_length=true saves padding too)"
        )
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), streams_kept():
            found = objective.output(to_device(packed, device)).logits[0]
            wanted = torch.cat([objective.output(to_device(batch, device)).logits[0] for batch in alone])
    finally:
        model.train(was_training)
    difference = float((found[: len(wanted)].float() - wanted.float()).abs().max() / wanted.float().std())
    if not difference <= (EXACT if wanted.dtype in (torch.float32, torch.float64) else HALF):
        raise ValueError(
            f"training.packing: in this model the samples of a row see each other (logits differ by {difference:.2g} "
            "standard deviations); set training.packing=null (training.group_by_length=true saves padding too)"
        )
