"""What a model with a head says of whole texts: logits in the texts' order, and the file that keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole.data import Sample
from mole.evaluation.mode import device_of, evaluating, moved, named
from mole.head import Head
from mole.run_folder import write_atomically


def predict(
    model: nn.Module,
    samples: Sequence[Sample],
    collate: Callable[[list[Sample]], dict[str, Any]],
    *,
    batch_size: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Logits [N, C] of N samples in their order, in float32 on the CPU; C is the number of labels, 1 of a regression.

    `collate` makes a batch of samples; of it `model` gets what it names, without the labels. `device` is where the
    tensors go (None: where the model is). Raises ValueError if there are no samples, or the model has no head for
    whole texts.
    """
    if not samples:
        raise ValueError("there is nothing to predict: no samples")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    where = device_of(model) if device is None else torch.device(device)
    # Samples of like length together: less padding; the longest first, so that too large a batch fails at once.
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index].input_ids))
    parts: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = collate([samples[index] for index in order[start : start + batch_size]])
            batch.pop("labels", None)
            logits = model(**moved(named(model, batch), where)).logits
            if logits.dim() != 2:
                raise ValueError(
                    f"the model gives logits {list(logits.shape)}, [texts, labels] are wanted: it has no head for "
                    "whole texts"
                )
            parts.append(logits.float().cpu())
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)


def write_predictions(path: str | Path, samples: Sequence[Sample], logits: Tensor, head: Head) -> None:
    """Writes a line of JSON for each sample, whole or not at all: {"row", "logits", "prediction", "label"}.

    `logits` [N, C] are those of `predict`. Labels go by their names; of a regression both are numbers. A value that is
    not finite is null, as JSON knows none.
    """
    lines = []
    for sample, values in zip(samples, logits.tolist(), strict=True):
        assert sample.target is not None
        finite = [value if math.isfinite(value) else None for value in values]
        if head.kind == "regression":
            prediction, label = finite[0], float(sample.target)
        else:
            best = max(range(len(values)), key=values.__getitem__)
            prediction, label = None if None in finite else head.labels[best], head.labels[int(sample.target)]
        line = {"row": sample.row, "logits": finite, "prediction": prediction, "label": label}
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomically(path, "".join(lines))
