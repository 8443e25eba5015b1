"""Poly router: every task has learned which skills (experts) it needs, per module; MHR: and per block of the features.

    z = Z[task, q, :];   u = σ((z + ln v − ln(1 − v)) / T) in training, v uniform;  σ(z) in eval
    w_q = u / (Σ_e u + 1e-12);   h = Σ_q x_[q] (Σ_e w_qe A_qe);   y_[q] = h (Σ_e w_qe s_e B_qe)

x_[q], y_[q]: the q-th of Q blocks. Q = 1 is Poly: Ponti et al. 2022, arXiv 2202.13914; Q > 1 multi-head routing (MHR):
Caccia et al. 2022, arXiv 2211.03831.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mole.registry import ROUTERS, config_dataclass, unknown
from mole.routers.base import Combining, Learning, MixtureShape, Placing, Router, dropped
from mole.routers.float32 import at_least_float32
from mole.routers.text_encoders import tfidf
from mole.routing import Frame, Routing

SMALLEST_SUM = 1e-12
HEAD_START = 4.0  # logit of the skill that a new task starts near; that of the others is −4
TEXT_WIDTH = 512


@config_dataclass
class PolyConfig(Placing, Combining, Learning):
    """Tasks, blocks, the noise of training, and what tasks get that it never saw."""

    name: Literal["poly"] = "poly"
    combine: Literal["outputs", "parameters"] = "parameters"
    task_names: tuple[str, ...] | None = None
    num_splits: Annotated[int, Field(ge=1)] = 1
    relaxed_bernoulli: bool = True
    bernoulli_temperature: Annotated[float, Field(gt=0)] = 1.0
    init: Annotated[float, Field(ge=0)] = 1e-3
    init_task: Mapping[str, str] = field(default_factory=dict)
    unknown: Literal["error", "uniform", "nearest"] = "error"
    lr: Annotated[float, Field(gt=0)] | None = 0.1

    def __post_init__(self):
        problems = self.placing_problems()
        if self.task_names is not None and len(set(self.task_names)) != len(self.task_names):
            problems.append("router.task_names names a task twice")
        if self.task_names is not None and not self.task_names:
            problems.append("router.task_names is empty: name the tasks, or set it to null for those of the experts")
        if self.num_splits > 1 and self.combine != "parameters":
            problems.append("router.num_splits above 1 mixes blocks of the factors: set router.combine=parameters")
        if problems:
            raise ValueError("\n".join(problems))


@ROUTERS.register("poly", PolyConfig)
class PolyRouter(Router):
    """Learned weights by task, one table Z [tasks, Q, E] per mixed module or group.

    `task_names` null: the tasks that the experts list. Raises ValueError for unknown names in the config, without any
    task, and at a forward for a task that has no row: always in training, else unless `unknown` says what to do.
    `nearest` takes the row of the task whose texts in training were most like the example's.
    """

    scope = "layer"
    learned = True
    needs = frozenset({"task_names"})
    config: PolyConfig
    text_sums: Tensor

    def __init__(self, config: PolyConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        listed = tuple(dict.fromkeys(task for tasks in shape.expert_tasks for task in tasks))
        self.tasks = listed if config.task_names is None else config.task_names
        if not self.tasks:
            raise ValueError("router=poly: no expert of this mixture lists a task: name the tasks in router.task_names")
        self.num_splits = config.num_splits
        start = torch.empty(len(self.tasks), config.num_splits, shape.num_experts).uniform_(-config.init, config.init)
        for task, expert in config.init_task.items():
            if task not in self.tasks:
                raise ValueError(f"router.init_task: {unknown('task', task, self.tasks)}")
            if expert not in shape.expert_names:
                raise ValueError(f"router.init_task: {unknown('expert', expert, shape.expert_names)}")
            start[self.tasks.index(task)] = -HEAD_START
            start[self.tasks.index(task), :, shape.expert_names.index(expert)] = HEAD_START
        self.table = nn.Parameter(start)
        if config.unknown == "nearest":
            self.needs = frozenset({"task_names", "texts"})  # type: ignore[misc]
            self.register_buffer("text_sums", torch.zeros(len(self.tasks), TEXT_WIDTH))

    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """`x` [B, T, d_in] tells no more than the batch → weights [B, 1, E], or [B, 1, Q, E] in blocks."""
        config = self.config
        logits = self._rows(frame)
        if self.training and config.relaxed_bernoulli:
            info = torch.finfo(logits.dtype)
            v = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device).clamp(info.eps, 1 - info.eps)
            logits = (logits + v.log() - torch.log1p(-v)) / config.bernoulli_temperature
        kept = torch.sigmoid(dropped(logits, config.expert_dropout, self.training))
        weights = kept / (kept.sum(-1, keepdim=True) + SMALLEST_SUM)
        logits = F.logsigmoid(logits)  # whose softmax is u / Σ u
        if config.num_splits == 1:
            weights, logits = weights[:, 0], logits[:, 0]
        routing = Routing(weights[:, None], logits=logits[:, None])
        return routing if x is None or x.shape[0] < len(weights) else routing.for_rows(x.shape[0])

    def _rows(self, frame: Frame) -> Tensor:
        """z of the batch's tasks, float32 [B, Q, E]; 0 for unknown=uniform."""
        names, nearest = frame.need("task_names", "poly"), self.config.unknown == "nearest"
        texts = frame.need("texts", "poly") if nearest else None
        places = {task: row for row, task in enumerate(self.tasks)}
        rows = [places.get(name, -1) for name in names]
        self.check_tasks(names, training=self.training)
        if nearest:
            rows = self._with_nearest(rows, texts, frame)
        known = torch.tensor(rows, device=self.table.device)
        table = at_least_float32(self.table)
        return table[known.clamp_min(0)] * (known >= 0)[:, None, None]

    def check_tasks(self, tasks: Sequence[str], *, training: bool) -> None:
        strange = list(dict.fromkeys(task for task in tasks if task not in self.tasks))
        if not strange or not (training or self.config.unknown == "error"):
            return
        raise ValueError(
            f"router=poly: {unknown('task', strange[0], self.tasks)}; each task that trains has a row: set "
            f"router.task_names=[{','.join([*self.tasks, *strange])}]"
            + ("" if training else ", or router.unknown to uniform or nearest")
        )

    def _with_nearest(self, rows: list[int], texts: Any, frame: Frame) -> list[int]:
        """`rows`, with the row of the most similar task where it is −1; training remembers what its tasks read."""
        place = (id(self), "texts")
        if (not self.training and min(rows) >= 0) or place in frame.notes:
            return rows
        vectors = tfidf(texts, torch.ones(TEXT_WIDTH))
        if self.training:
            frame.notes[place] = True
            seen = torch.tensor(rows, device=self.text_sums.device)
            self.text_sums.index_add_(0, seen, vectors.to(self.text_sums))
            return rows
        likeness = F.normalize(at_least_float32(self.text_sums), dim=-1) @ vectors.to(self.text_sums.device).T
        best = likeness.argmax(0).tolist()
        return [row if row >= 0 else best[example] for example, row in enumerate(rows)]

    def carry(self, old: Any) -> None:
        """Takes over the entries of the tasks and experts that both have, by name; others stay as they were built."""
        experts = [e for e in self.shape.expert_names if e in old.shape.expert_names]
        to, source = ([r.shape.expert_names.index(e) for e in experts] for r in (self, old))
        with torch.no_grad():
            for task in (task for task in self.tasks if task in old.tasks):
                row, before = self.tasks.index(task), old.tasks.index(task)
                if self.num_splits == old.num_splits:
                    self.table[row][:, to] = old.table[before][:, source].to(self.table)
                if "text_sums" in self.state_dict() and "text_sums" in old.state_dict():
                    self.text_sums[row] = old.text_sums[before]

    def own_statistics(self) -> dict[str, Any]:
        """How far tasks have made up their minds, by task, and over all: means, effective skills of the mean u."""
        found: dict[str, Any] = {}
        for name, values in self.skills().items():
            found[name] = float(values.mean())
            found[f"tasks/{name}"] = dict(zip(self.tasks, values.tolist(), strict=True))
        found["effective_skills"] = float(_effective(self._u().mean((0, 1))))
        return found

    def _u(self) -> Tensor:
        return torch.sigmoid(at_least_float32(self.table.detach()))

    def skills(self) -> dict[str, Tensor]:
        """How far tasks have made up their minds, each [tasks]: means over blocks, of the u without noise.

        discreteness: mean entropy of u as a coin, 0 (decided) … 1 in units of ln 2; sparsity: share of u above ½;
        effective_skills: exp of the entropy of the mean u, as shares.
        """
        u = self._u()
        entropy = -(torch.xlogy(u, u) + torch.xlogy(1 - u, 1 - u)).mean((1, 2)) / math.log(2)
        effective = _effective(u.mean(1))
        return {"discreteness": entropy, "sparsity": (u > 0.5).float().mean((1, 2)), "effective_skills": effective}


def _effective(u: Tensor) -> Tensor:
    """`u` [.., E] → how many experts share it: exp of its entropy as shares."""
    w = u / (u.sum(-1, keepdim=True) + SMALLEST_SUM)
    return (-torch.xlogy(w, w).sum(-1)).exp()
