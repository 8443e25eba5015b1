"""What each of two processes does in `test_two_processes.py`; importable, so that a spawned process finds it."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from training_toy import VOCABULARY, ToyModel, fit_toy, mean_loss, recipe, toy_data, weight_bytes

from mole.cli import launch
from mole.run_folder import RunStopped
from mole.training.optimizers import AdamWConfig


class TopOne(ToyModel):
    """Three experts after the mix; the first input id chooses one, and no sample ever chooses the third."""

    def __init__(self):
        super().__init__(dtype=torch.float64)
        generator = torch.Generator().manual_seed(7)
        weights = torch.randn(3, VOCABULARY, 8, generator=generator, dtype=torch.float64)
        self.experts = nn.ParameterList([nn.Parameter(weight) for weight in weights])

    def forward(self, input_ids, attention_mask=None):
        x = torch.tanh(self.embedding[input_ids] @ self.mix)
        chosen = input_ids[:, :1, None] % 2
        logits = x.new_zeros(*input_ids.shape, VOCABULARY)
        for number in chosen.unique().tolist():  # an expert that nobody chose is not touched
            logits = logits + (chosen == number) * (x @ self.experts[number].T)
        return SimpleNamespace(
            logits=logits, auxiliary_loss=(x.pow(2).mean(-1) * attention_mask).sum() / attention_mask.sum()
        )


MODELS = {
    "plain": lambda: ToyModel(dtype=torch.float64),
    "top_one": TopOne,
}


def train(name: str, folder: Path, steps: int = 4, **more) -> nn.Module:
    """Adam with accumulation, an evaluation that only the main process can get right."""
    model, data = MODELS[name](), toy_data()
    config = recipe(
        max_steps=steps,
        micro_batch_size=2,
        learning_rate=0.05,
        clip_norm=0.5,
        optimizer=AdamWConfig(),
        evaluate_every=2,
        best_metric="score",
        best_direction="min",
    )

    def evaluate(step: int) -> dict[str, float]:
        return {"score": mean_loss(model, data.train[:3]) if os.environ.get("RANK", "0") == "0" else float(step)}

    fit_toy(model, folder, config, data, evaluate=evaluate if name == "plain" else None, **more)
    return model


def worker(root: str) -> dict:
    """Runs every scenario in one launch (a launch takes seconds); returns what this process ended with."""
    try:
        return scenarios(root)
    finally:
        launch.leave_group()  # its threads would meet the end of the interpreter


def scenarios(root: str) -> dict:
    """What `worker` runs, in the group that the first of them joins."""
    torch.set_num_threads(1)
    rank, folder, found = int(os.environ["RANK"]), Path(root), {}
    for name in MODELS:
        model = train(name, folder / name)
        torch.save(model.state_dict(), folder / f"{name}-{rank}.pt")
        found[name] = weight_bytes(model).hex()
    found["dropout"] = dropout_drawn(folder)
    found["stopped"] = stopped_by_a_signal_to_rank_1(folder, rank)
    watched = found["watched"] = []
    train("plain", folder / "continued", steps=2, watch=lambda step, epoch: watched.append(step))
    return found


def dropout_drawn(folder: Path) -> list[bool]:
    """Which of eight ones dropout lets through in the first step of this process."""
    model, seen = ToyModel(dropout=0.5), []
    model.dropout.register_forward_hook(lambda module, given, out: seen.append((out.flatten()[:8] != 0).tolist()))
    fit_toy(model, folder / "dropout", recipe(max_steps=1))
    return seen[0]


def stopped_by_a_signal_to_rank_1(folder: Path, rank: int) -> list:
    """The signal reaches one process only, in step 3."""
    model, steps = ToyModel(), []

    def signal_in_step_3(*_: object) -> None:
        steps.append(0)
        if len(steps) == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    model.dropout.register_forward_hook(signal_in_step_3)
    try:
        fit_toy(model, folder / "stopped", recipe(max_steps=9))
    except RunStopped as stopped:
        return [stopped.signal_number, str(stopped.checkpoint)]
    return []
