"""The nodes of a configuration that all commands share."""

from typing import Any, Literal

from pydantic import Field

from mole.registry import DATASETS, config_dataclass


@config_dataclass
class RunConfig:
    """Where a run lands and how it goes on."""

    folder: str = Field(min_length=1)
    resume: Literal["never", "auto"] = "never"
    deterministic: bool = False


@config_dataclass
class LauncherConfig:
    """How many processes on this machine share one run; None: one for each GPU that is seen, one without a GPU."""

    name: Literal["auto"] = "auto"
    num_processes: int | None = Field(default=None, ge=1, le=1024)


def chosen_datasets(config: Any) -> dict[str, Any]:
    """The datasets of a command with the fields `dataset` (one or None) and `datasets` (by name), by name.

    Raises ValueError unless exactly one of the two is given.
    """
    if config.dataset is None and not config.datasets:
        raise ValueError(not_chosen("dataset", DATASETS.names()))
    if config.dataset is not None and config.datasets:
        raise ValueError(
            "dataset and datasets are both given; choose one with dataset=<name>, or several with dataset=[<a>,<b>]"
        )
    if config.dataset is None:
        return dict(config.datasets)
    return {getattr(config.dataset, "task", None) or config.dataset.name: config.dataset}


def not_chosen(group: str, options: list[str]) -> str:
    return f"{group}: not chosen; choose one: {', '.join(f'{group}={o}' for o in options)}"
