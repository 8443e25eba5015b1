"""The check at the end of a training run: what was written gives, in a fresh model, what the trained model gives."""

from typing import Any

import torch
from torch import nn

from mole.evaluation.mode import device_of, evaluating, moved

TOLERANCE = {torch.float64: 0.0, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def check_reloaded(trained: nn.Module, reloaded: nn.Module, batch: dict[str, Any]) -> float:
    """Largest difference of the two models' logits on `batch`, relative to the largest logit.

    Raises ValueError if it is above rounding for the logits' dtype.
    """
    logits = []
    for model in (trained, reloaded):
        inputs = moved({key: value for key, value in batch.items() if key != "labels"}, device_of(model))
        with evaluating(model):
            logits.append(model(**inputs).logits)
    first, second = logits[0].double().cpu(), logits[1].double().cpu()
    difference = float((first - second).abs().max() / first.abs().max().clamp_min(1e-30))
    if not difference <= TOLERANCE.get(logits[0].dtype, 1e-2):
        raise ValueError(
            f"what was written does not give what was trained: logits differ by {difference:.3g} of the largest; "
            "it was kept beside, under the name *.rejected"
        )
    return difference
