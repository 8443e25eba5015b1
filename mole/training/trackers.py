"""Where metrics go besides `metrics.jsonl`: the trackers of accelerate, each an extra."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mole.registry import TRACKERS, config_dataclass

Log = Callable[[dict[str, float], int], None]


@config_dataclass
class NoneConfig:
    """`metrics.jsonl` alone."""

    name: Literal["none"] = "none"


@config_dataclass
class TensorBoardConfig:
    """Event files for TensorBoard in the run folder."""

    name: Literal["tensorboard"] = "tensorboard"


@config_dataclass
class WandbConfig:
    """A run at Weights & Biases."""

    name: Literal["wandb"] = "wandb"
    project: str = "mole"
    mode: Literal["online", "offline"] = "online"


def _needs(package: str) -> None:
    if find_spec(package) is None:
        raise ValueError(
            f"tracker={package} needs the package {package}: install it with pip install 'mole-experts[{package}]', "
            f"or use tracker=none"
        )


@TRACKERS.register("none", NoneConfig)
def none(config: NoneConfig, folder: Path) -> None:
    """No tracker."""
    return


@TRACKERS.register("tensorboard", TensorBoardConfig)
def tensorboard(config: TensorBoardConfig, folder: Path) -> Any:
    """Writes to `<run>/tensorboard/`."""
    _needs("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(run_name="tensorboard", logging_dir=folder)


@TRACKERS.register("wandb", WandbConfig)
def wandb(config: WandbConfig, folder: Path) -> Any:
    """Writes to `<run>/wandb/` and to the project."""
    _needs("wandb")
    from accelerate.tracking import WandBTracker

    return WandBTracker(run_name=config.project, name=folder.name, dir=str(folder), mode=config.mode)


@contextmanager
def tracking(config: Any, folder: Path, active: bool) -> Iterator[Log]:
    """The chosen tracker's log function for the time of a run; closed however the run ends.

    Nothing is opened unless `active` (the main process). Raises ValueError if the package is missing.
    """
    tracker = TRACKERS.build(config, folder) if active else None
    if tracker is None:
        yield lambda values, step: None
        return
    tracker.start()
    try:
        yield lambda values, step: tracker.log(values, step=step)
    finally:
        tracker.finish()
