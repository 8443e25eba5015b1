"""Training: one loop on Accelerate for a model with logits and batches with labels."""

from mole.training import optimizers, schedules, trackers
from mole.training.batches import TrainingData, plan_layout, total_steps
from mole.training.checkpoints import CheckpointError
from mole.training.devices import make_accelerator, peak_memory
from mole.training.fit import FitResult, fit
from mole.training.isolation import check_isolation
from mole.training.memory import OutOfMemory
from mole.training.rehearsal import Rehearsal, rehearse
from mole.training.schedules import summed_factors
from mole.training.settings import AnyTraining, Recipe, RouterTrainingConfig, TrainingConfig
from mole.training.step import TrainingFailed

__all__ = [
    "AnyTraining",
    "CheckpointError",
    "FitResult",
    "OutOfMemory",
    "Recipe",
    "Rehearsal",
    "RouterTrainingConfig",
    "TrainingConfig",
    "TrainingData",
    "TrainingFailed",
    "check_isolation",
    "fit",
    "make_accelerator",
    "optimizers",
    "peak_memory",
    "plan_layout",
    "rehearse",
    "schedules",
    "summed_factors",
    "total_steps",
    "trackers",
]
