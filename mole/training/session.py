"""The parts of the loop: begin or restore, train, evaluate, save, finish; and the counters that they share."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from accelerate.utils import broadcast_object_list

from mole.run_folder import RunStopped
from mole.training.batches import SampleStream
from mole.training.devices import peak_memory
from mole.training.learner import Learner
from mole.training.memory import memory_for
from mole.training.metrics import MetricsFile
from mole.training.origins import fingerprints, require_same
from mole.training.progress import TrainingProgress
from mole.training.random_streams import streams_kept
from mole.training.saving import Saver
from mole.training.selection import Selection
from mole.training.settings import TrainingConfig
from mole.training.signals import StopRequest
from mole.training.step import Batches, Census, StepReport, take_census, take_step
from mole.training.trackers import Log

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """How far the run is, over all its starts. Plain data: a checkpoint has it."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    loss: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Over the steps alone, without evaluations and checkpoints."""
        return self.tokens / self.step_seconds if self.step_seconds else 0.0


@dataclass
class Session:
    """One start of a run."""

    learner: Learner
    stream: SampleStream
    settings: TrainingConfig
    evaluate: Callable[[int], dict[str, float]] | None
    metrics: MetricsFile
    saver: Saver
    track: Log
    progress: TrainingProgress
    total: int
    extras: Callable[[], dict[str, Any]] | None = None
    after_step: Callable[[], None] | None = None
    watch: Callable[[int, float], None] | None = None
    counters: Counters = field(default_factory=Counters)
    selection: Selection = field(default_factory=Selection)
    last_metrics: dict[str, float] = field(default_factory=dict)
    evaluated_step: int = -1
    saved_step: int = -1

    def __post_init__(self) -> None:
        self._clock = time.monotonic()
        self.origins = fingerprints(self.learner.model, self.stream.data.train)

    def start(self, resume: bool) -> None:
        """Restores what there is to go on from, else begins."""
        if not resume:
            self.saver.require_unused()
        if not (resume and self.restore()):
            self.begin()
        self._watch()

    def restore(self) -> bool:
        """Goes on from the newest whole checkpoint; False if there is none."""
        found = self.saver.restore()
        if found is None:
            return False
        facts, self.selection = found
        require_same(facts["origins"], self.origins)
        self.counters = Counters(**facts["counters"])
        self.last_metrics, self.evaluated_step = facts["last_metrics"], facts["evaluated_step"]
        self.saved_step = self.counters.step
        self.metrics.start(facts["metrics_offset"])
        self.progress.say(f"continuing after step {self.counters.step} from {self.saver.last_good}")
        return True

    def begin(self) -> None:
        """Before step 1: a metrics file with what is known by then, and an evaluation, to see at once if it fails."""
        self.metrics.start()
        if self.extras is not None and (values := self.extras()):
            self.metrics.write(step=0, phase="start", **values)
        self._evaluate()

    def train(self, stop: StopRequest) -> None:
        """Step after step to the end, to early stopping, or to a signal. Raises RunStopped."""
        learner, stream = self.learner, self.stream
        rank, size = learner.accelerator.process_index, stream.layout.micro_batch_size
        while self.counters.step < self.total and not self.selection.exhausted(self.settings):
            started = time.monotonic()
            step = self.counters.step + 1
            batches = stream.micro_batches(step, rank)
            census = self._census(batches, stop)
            learner.model.train()
            with memory_for(f"step {step}, in a micro-batch", learner, self.settings, size, batches):
                report = take_step(learner, batches, census, self.settings.clip_norm, first=step == 1)
            if self.after_step is not None and not report.skipped:
                self.after_step()
            self._count(report, census, time.monotonic() - started)
            self._log(report)
            self._watch()
            if self._due(self.settings.evaluate_every):
                self._evaluate()
            if self._due(self.settings.checkpoint_every):
                self._save()
        self._census([], stop)

    def finish(self, stop: StopRequest) -> None:
        """The last evaluation and checkpoint; then the best weights, if there were some to choose from."""
        if self.evaluated_step != self.counters.step:
            self._evaluate()
        if self.saved_step != self.counters.step:
            self._save()
        self.saver.require_saved()
        if self.selection.best_step is not None:
            self.saver.load_best()
        self._census([], stop)

    # ---- the parts of a step
    def _due(self, every: int | None) -> bool:
        return every is not None and self.counters.step % every == 0

    def _count(self, report: StepReport, census: Census, seconds: float) -> None:
        counters = self.counters
        counters.step += 1
        counters.tokens += census.valid
        counters.supervised_tokens += census.supervised
        counters.skipped_steps += report.skipped
        counters.step_seconds += seconds
        counters.loss = report.loss
        self._tick()

    def _watch(self) -> None:
        if self.watch is not None and self.learner.accelerator.is_main_process:
            self.watch(self.counters.step, self.stream.epoch(self.counters.step))

    def _tick(self) -> None:
        now = time.monotonic()
        self.counters.seconds += now - self._clock
        self._clock = now

    def _log(self, report: StepReport) -> None:
        counters = self.counters
        memory = peak_memory(self.learner.accelerator.device)
        self.progress.step(counters.step, report.loss, report.learning_rate, counters.tokens_per_second, memory)
        if not (self._due(self.settings.log_every) or counters.step in (1, self.total)):
            return
        values: dict[str, Any] = {
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "gradient_norm": report.gradient_norm,
            "epoch": self.stream.epoch(counters.step),
            "tokens": counters.tokens,
            "supervised_tokens": counters.supervised_tokens,
        }
        values |= report.auxiliary
        values |= self.extras() if self.extras is not None else {}
        if self.learner.accelerator.scaler is not None:
            values["skipped_steps"] = counters.skipped_steps
        timing = {"seconds": counters.seconds, "tokens_per_second": counters.tokens_per_second}
        self.metrics.write(step=counters.step, phase="train", **values, **timing)
        tracked = {
            f"train/{name}": value for name, value in {**values, **timing}.items() if not isinstance(value, dict)
        }
        self.track(tracked, counters.step)

    def _evaluate(self) -> None:
        """Metrics of the weights as they are; a checkpoint where they are the best so far."""
        if self.evaluate is None:
            return
        step = self.counters.step
        self.learner.model.eval()
        rows = self.stream.layout.micro_batch_size
        # streams are kept so that how often one looks does not change what is learnt
        with streams_kept(), memory_for(f"the evaluation after step {step}", self.learner, self.settings, rows):
            metrics = {name: float(value) for name, value in self.evaluate(step).items()}
        if self.learner.accelerator.num_processes > 1:  # all processes choose and stop alike
            metrics = broadcast_object_list([metrics])[0]
        self.last_metrics, self.evaluated_step = metrics, step
        self._tick()
        if taken := {"step", "phase", "seconds"} & set(metrics):
            raise ValueError(f"a metric cannot be called {sorted(taken)[0]}: metrics.jsonl has that name already")
        best = self.selection.see(step, metrics, self.settings)
        self.metrics.write(step=step, phase="evaluation", **metrics, seconds=self.counters.seconds)
        self.track({f"evaluation/{name}": value for name, value in metrics.items()}, step)
        self.progress.evaluation(step, metrics, best)
        if best:
            self.saver.hold_best()
            self._save()

    def _save(self) -> None:
        step = self.counters.step
        if self.saved_step == step:
            return
        self._tick()
        facts = {
            "counters": asdict(self.counters),
            "last_metrics": self.last_metrics,
            "evaluated_step": self.evaluated_step,
            "origins": self.origins,
        }
        if self.saver.save(step, facts, self.selection, self.metrics) is not None:
            self.saved_step = step

    def _census(self, batches: Batches, stop: StopRequest) -> Census:
        """What the processes bring to a step. Where one was asked to stop, all do, after a checkpoint: RunStopped."""
        census = take_census(self.learner, batches, stop.signal_number)
        if census.signal_number:
            if self.counters.step:
                self._save()
            raise RunStopped(census.signal_number, self.saver.last_good)
        return census
