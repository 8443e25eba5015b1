"""A toy language model and toy data: what `fit` needs to know of the real ones."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from mole.run_folder import RunFolder
from mole.training import Recipe, TrainingConfig, TrainingData, fit, make_accelerator
from mole.training.optimizers import SGDConfig
from mole.training.schedules import ConstantConfig

VOCABULARY = 13


class ToyModel(nn.Module):
    """Embedding (frozen), a mix of neighbours, an output layer; dropout in between."""

    def __init__(self, width: int = 8, dropout: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype) * 0.3)

        self.embedding = matrix(VOCABULARY, width).requires_grad_(False)
        self.mix, self.out = matrix(width, width), matrix(VOCABULARY, width)
        self.bias = nn.Parameter(torch.zeros(VOCABULARY, dtype=dtype))
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, task_names: list[str] | None = None):
        x = self.embedding[input_ids]
        before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        hidden = self.dropout(torch.tanh(x @ self.mix + before))
        self.saw_task_names = task_names
        return SimpleNamespace(logits=hidden @ self.out.T + self.bias)


def samples(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of uneven length, unevenly supervised; each follows a learnable rule."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        length = draw.randint(3, 12)
        ids = [draw.randrange(VOCABULARY)]
        while len(ids) < length:
            ids.append((ids[-1] * 2 + 1) % VOCABULARY)
        prompt = draw.randint(1, length - 1)
        found.append((ids, [-100] * prompt + ids[prompt:]))
    return found


def collate(rows: list[tuple[list[int], list[int]]]) -> dict:
    """Right-padded batch."""
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
        "task_names": ["toy"] * len(rows),
        "unknown_to_the_model": object(),
    }


def toy_data(count: int = 24, seed: int = 0) -> TrainingData:
    rows = samples(count, seed)

    def order(epoch: int) -> list[int]:
        found = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(found)
        return found

    return TrainingData(train=rows, collate=collate, order=order)


def mean_loss(model: nn.Module, rows: list) -> float:
    """Loss per supervised token, computed naively, token by token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in rows:
            logits = model(torch.tensor([ids])).logits[0].double()
            for place in range(1, len(ids)):
                if labels[place] != -100:
                    total -= float(torch.log_softmax(logits[place - 1], -1)[labels[place]])
                    count += 1
    return total / count


def recipe(**training) -> Recipe:
    """A short run of SGD at a constant rate, uncut; `training` changes its fields, groups by their own names."""
    groups = {name: training.pop(name) for name in ("optimizer", "schedule", "tracker") if name in training}
    settings = {
        "max_steps": 4,
        "epochs": None,
        "batch_size": 12,
        "learning_rate": 0.5,
        "clip_norm": None,
        "evaluate_every": None,
        "checkpoint_every": None,
        "best_metric": None,
    }
    chosen = TrainingConfig(**{**settings, **training})
    return Recipe(training=chosen, **{"optimizer": SGDConfig(), "schedule": ConstantConfig(), **groups})


def fit_toy(model: nn.Module, folder: Path, config: Recipe | None = None, data: TrainingData | None = None, **more):
    """`fit` on the CPU with the toy's defaults."""
    config = config or recipe()
    accelerator = make_accelerator(config.training, torch.device("cpu"))
    data = data or toy_data()
    return fit(model, data, config, RunFolder(folder), accelerator=accelerator, **{"seed": 0, **more})


def lines(folder: Path, phase: str | None = None) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if phase in (None, row["phase"])]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in kept]


def weight_bytes(model: nn.Module) -> bytes:
    """All parameters, bit for bit."""
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
