"""Task router: each example goes to the expert whose card lists its task. No parameters; the oracle of a comparison."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mole.registry import ROUTERS, config_dataclass, unknown
from mole.routers.base import Combining, MixtureShape, Router
from mole.routing import Frame, Routing


@config_dataclass
class TaskConfig(Combining):
    """One-hot weights by task name."""

    name: Literal["task"] = "task"
    unknown: Literal["error", "default", "uniform", "backbone"] = "error"
    default_expert: str | None = None
    ambiguous: Literal["error", "first", "mean"] = "error"

    def __post_init__(self):
        if (self.unknown == "default") != (self.default_expert is not None):
            raise ValueError("router.unknown=default and router.default_expert go together: give both or neither")


@ROUTERS.register("task", TaskConfig)
class TaskRouter(Router):
    """w one-hot [B, 1, E] at the expert of the example's task.

    Raises ValueError at build if two experts list one task (unless `ambiguous` says what to do) and at a forward
    if no expert lists the example's task (unless `unknown` says what to do).
    """

    needs = frozenset({"task_names"})
    _device: Tensor

    def __init__(self, config: TaskConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        self._rows: dict[str, list[float]] = {}
        for task in sorted({task for tasks in shape.expert_tasks for task in tasks}):
            owners = [i for i, tasks in enumerate(shape.expert_tasks) if task in tasks]
            if len(owners) > 1 and config.ambiguous == "error":
                names = ", ".join(shape.expert_names[i] for i in owners)
                raise ValueError(
                    f"router=task: the experts {names} all list the task {task!r}; "
                    "leave one in the mixture, or set router.ambiguous to first or mean"
                )
            owners = owners if config.ambiguous == "mean" else owners[:1]
            self._rows[task] = self._row(owners)
        if not self._rows and config.unknown == "error":
            raise ValueError("router=task: no expert of this mixture lists a task in its card; add tasks to the cards")
        if config.default_expert is not None and config.default_expert not in shape.expert_names:
            raise ValueError(f"router.default_expert: {unknown('expert', config.default_expert, shape.expert_names)}")
        self.register_buffer("_device", torch.zeros(()), persistent=False)

    def _row(self, experts: list[int]) -> list[float]:
        return [(1.0 / len(experts)) * (e in experts) for e in range(self.shape.num_experts)]

    def _weights(self, task: str) -> list[float]:
        if task in self._rows:
            return self._rows[task]
        policy = self.config.unknown
        if policy == "error":
            raise ValueError(
                f"router=task: {unknown('task', task, self._rows)}; add an expert for it, or set router.unknown to "
                "default, uniform or backbone"
            )
        if policy == "backbone":
            return [0.0] * self.shape.num_experts
        if policy == "uniform":
            return self._row(list(range(self.shape.num_experts)))
        return self._row([self.shape.expert_names.index(self.config.default_expert)])

    def check_tasks(self, tasks: Sequence[str], *, training: bool) -> None:
        for task in tasks:
            self._weights(task)

    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """→ weights per example [B, 1, E]."""
        names = frame.need("task_names", "task")
        weights = torch.tensor([self._weights(name) for name in names], device=self._device.device)
        return Routing(weights[:, None, :])
