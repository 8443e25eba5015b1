"""The one training loop: every command that trains calls `fit`."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from mole.run_folder import RunFolder
from mole.training.batches import Layout, SampleStream, TrainingData, plan_layout, total_steps
from mole.training.devices import peak_memory
from mole.training.learner import Learner, build_learner, gradient_checkpointing
from mole.training.memory import largest_micro_batch
from mole.training.metrics import MetricsFile
from mole.training.progress import TrainingProgress
from mole.training.random_streams import seed_streams, streams_kept
from mole.training.saving import Saver
from mole.training.session import Session
from mole.training.settings import TrainingConfig, TrainingSettings
from mole.training.signals import StopRequest
from mole.training.trackers import tracking

logger = logging.getLogger(__name__)
Evaluate = Callable[[int], dict[str, float]]


@dataclass(frozen=True)
class FitResult:
    """What training came to. The model holds the weights of the best step if there was one to choose, else the last.

    `metrics` are those of the weights kept; `tokens` are the real ones seen, `supervised_tokens` those the loss
    counted; `seconds` spans all starts of the run, `tokens_per_second` the steps alone; `peak_memory` is in bytes.
    """

    steps: int
    best_step: int | None
    best_score: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    tokens: int = 0
    supervised_tokens: int = 0
    skipped_steps: int = 0
    stopped_early: bool = False
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory: int = 0
    checkpoint: Path | None = None


def fit(
    model: nn.Module,
    data: TrainingData,
    config: TrainingSettings,
    run: RunFolder,
    *,
    accelerator: Accelerator,
    seed: int,
    evaluate: Evaluate | None = None,
    extras: Callable[[], dict[str, Any]] | None = None,
    after_step: Callable[[], None] | None = None,
    watch: Callable[[int, float], None] | None = None,
    resume: bool = False,
) -> FitResult:
    """Trains what `model` leaves trainable and leaves it with the best weights, in eval mode.

    `model(**batch)` returns an object with `logits` [B, T, V] (and `auxiliary_loss`, a mean over tokens, if it has
    one); `config` is a command's config, of which the groups training, optimizer, schedule and tracker are read.
    `evaluate(step)` gives metrics by name; it is called on every process, in eval mode, before step 1, as often as
    `training.evaluate_every` says, and at the end. `extras()` gives what else a logged step has to say; `after_step()`
    follows each update of the weights, on every process. `watch(step, epoch)` sees the weights on the main process
    before the first step (0; after a resume the restored one) and after each. With `resume`, goes on from the newest
    whole checkpoint.

    Raises ValueError for settings that do not fit, before the first step; TrainingFailed where training cannot go
    on, OutOfMemory among them; RunStopped after SIGINT or SIGTERM, the step finished and a checkpoint written;
    CheckpointError if the end state could not be written.
    """
    settings, main = config.training, accelerator.is_main_process
    layout, total = plan_layout(settings, accelerator.num_processes), total_steps(settings, len(data.train))
    learner = build_learner(model, config, accelerator, total)
    with ExitStack() as stack:
        if accelerator.device.type != "cpu":  # there it would only collect garbage, for half a second
            stack.callback(accelerator.free_memory)
        stack.callback(model.eval)
        stack.enter_context(streams_kept())
        stack.enter_context(gradient_checkpointing(model, settings.gradient_checkpointing))
        stop = stack.enter_context(StopRequest())
        layout = _fitting(layout, learner, data, settings, run if resume else None)
        session = Session(
            learner=learner,
            stream=SampleStream(data, layout),
            settings=settings,
            evaluate=evaluate,
            metrics=MetricsFile(run.metrics, main),
            saver=Saver(run, learner, settings.keep_checkpoints),
            track=stack.enter_context(tracking(config.tracker, run.path, main)),
            progress=stack.enter_context(TrainingProgress(total, main)),
            total=total,
            extras=extras,
            after_step=after_step,
            watch=watch,
        )
        seed_streams(seed, accelerator.process_index)
        session.start(resume)
        if main:
            run.update(status="running", micro_batch_size=layout.micro_batch_size)
        session.train(stop)
        session.finish(stop)
        return _result(session)


def _fitting(
    layout: Layout, learner: Learner, data: TrainingData, settings: TrainingConfig, begun: RunFolder | None
) -> Layout:
    """The layout with the largest micro-batch that fits, where that is asked for; `begun` keeps what it had."""
    if settings.micro_batch_size != "auto":
        return layout
    known = begun.facts().get("micro_batch_size") if begun else None
    is_known = isinstance(known, int) and known > 0 and layout.micro_batch_size % known == 0
    found = known if is_known else largest_micro_batch(learner, data, settings)
    logger.info("micro-batches of %d samples", found)
    return replace(layout, micro_batch_size=found)


def _result(session: Session) -> FitResult:
    counters, selection = session.counters, session.selection
    chosen: Any = selection.best_step is not None
    return FitResult(
        steps=counters.step,
        best_step=selection.best_step,
        best_score=selection.best_score,
        metrics=dict(selection.best_metrics if chosen else session.last_metrics),
        loss=counters.loss,
        tokens=counters.tokens,
        supervised_tokens=counters.supervised_tokens,
        skipped_steps=counters.skipped_steps,
        stopped_early=counters.step < session.total,
        seconds=counters.seconds,
        tokens_per_second=counters.tokens_per_second,
        peak_memory=peak_memory(session.learner.accelerator.device),
        checkpoint=session.saver.last_good,
    )
