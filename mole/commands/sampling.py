"""What a model writes while it trains: completions of the first validation prompts, at each evaluation."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from mole.data import Sample
from mole.evaluation import Validation, completions
from mole.mixtures import MultiExpertModel
from mole.run_folder import RunFolder, write_atomically
from mole.training import TrainingConfig

Evaluate = Callable[[int], dict[str, float]]


def sampled(
    validation: Validation | None, model: Any, tokenizer: Any, training: TrainingConfig, run: RunFolder, is_main: bool
) -> Evaluate | None:
    """`validation`, which with `training.samples` adds lines to samples.jsonl too, on the main process.

    Raises ValueError if none of the validation samples has a prompt to go on from.
    """
    if training.samples is None:
        return validation
    shown = [s for s in (validation.samples if validation else ()) if s.prompt and s.target is None]
    if validation is None or not shown:
        raise ValueError(
            f"training.samples={training.samples}: completions are written of the prompts of validation samples, and "
            "there are none: hold some out (dataset.validation…), or set training.samples=null"
        )
    chosen = shown[: training.samples]

    def evaluate(step: int) -> dict[str, float]:
        metrics = validation(step)
        if is_main:
            _add(run, step, chosen, _written(model, chosen, tokenizer, training.batch_size))
        return metrics

    return evaluate


def generated_lines(run: RunFolder) -> list[str]:
    """The lines of samples.jsonl that `sampled` has written, as far as they are whole."""
    lines = run.samples.read_text(encoding="utf-8").splitlines(keepends=True) if run.samples.is_file() else []
    return [line for line in lines if "step" in json.loads(line)]


def _written(model: Any, samples: Sequence[Sample], tokenizer: Any, batch_size: int) -> list[str]:
    """What the model writes after each prompt, greedily."""

    def inputs(chosen: list[Sample]) -> dict[str, Any]:
        return {"task_names": [sample.task for sample in chosen], "texts": [sample.prompt for sample in chosen]}

    asks = inputs if isinstance(model, MultiExpertModel) else None
    return completions(model, samples, tokenizer, batch_size=batch_size, inputs=asks)


def _add(run: RunFolder, step: int, samples: Sequence[Sample], texts: Sequence[str]) -> None:
    """The lines of this evaluation after those of earlier steps; later ones, of a run that goes on from before, go."""
    lines = run.samples.read_text(encoding="utf-8").splitlines(keepends=True) if run.samples.is_file() else []
    kept = [line for line in lines if json.loads(line).get("step", -1) < step]
    rows = [
        {"step": step, "task": s.task, "prompt": s.prompt, "completion": text, "target": s.completion}
        for s, text in zip(samples, texts, strict=True)
    ]
    new = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(run.samples, "".join([*kept, *new]))
