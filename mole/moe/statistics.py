"""What blocks routed, counted: loads, mean probabilities, drops, entropy, which experts work together.

With p_t the router's probabilities of a token over E' experts (the null ones last), N real tokens, f_e the slots that
fell on expert e:

    loads            f_e, of the null experts too           loads_at         the same by position, [E', T]
    probability      Σ_t p_te / N                           entropy          Σ_t H(p_t) / N, in nats
    max_violation    max f / mean f − 1, real experts only  null_share       slots of null experts / all filled slots
    co_activation    tokens that chose both, [E', E']       drops            slots that were taken from tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole.moe.block import MoEBlock
from mole.registry import unknown
from mole.routing import Routing

SLOTTED = ("top_k", "hash", "round_robin")  # routers that give every token k slots, of which some may be dropped
KEEPS = ("counts", "ids", "weights")
Labels = Tensor | Sequence[Any]


@dataclass
class BlockStats:
    """What one block routed. Tensors are on the CPU, without graph; counts are exact whole numbers.

    `ids` and `weights` have one tensor [B, T, K] for each forward, as far as they are kept: -1 is an empty slot.
    """

    names: list[str]
    num_experts: int
    tokens: int = 0
    slots: int = 0
    drops: int = 0
    loads_at: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    probability_sum: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    entropy_sum: float = 0.0
    co_activation: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    by_class: dict[Any, Tensor] = field(default_factory=dict)
    ids: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        columns = len(self.names)
        if not self.loads_at.numel():
            self.loads_at = torch.zeros(columns, 0, dtype=torch.int64)
            self.probability_sum = torch.zeros(columns, dtype=torch.float64)
            self.co_activation = torch.zeros(columns, columns, dtype=torch.int64)

    @property
    def loads(self) -> Tensor:
        """Slots of each expert, int64 [E']."""
        return self.loads_at.sum(1)

    @property
    def probability(self) -> Tensor:
        """Mean probability of each expert, float64 [E']."""
        return self.probability_sum / max(self.tokens, 1)

    @property
    def entropy(self) -> float:
        """Of the router's decision on a token, in nats, the mean over tokens."""
        return self.entropy_sum / max(self.tokens, 1)

    @property
    def null_share(self) -> float:
        """The part of the filled slots that null experts got."""
        loads = self.loads
        return float(loads[self.num_experts :].sum()) / max(int(loads.sum()), 1)

    @property
    def max_violation(self) -> float:
        """How much more than the mean the busiest real expert got: 0 at balance."""
        loads = self.loads[: self.num_experts].double()
        return float(loads.max() / loads.mean() - 1) if loads.sum() else 0.0

    def add(self, other: BlockStats) -> None:
        """Counts what another batch brought; the result is that of both batches seen as one."""
        length = max(self.loads_at.shape[1], other.loads_at.shape[1])
        mine, theirs = (functional.pad(s.loads_at, (0, length - s.loads_at.shape[1])) for s in (self, other))
        self.loads_at = mine + theirs
        self.tokens += other.tokens
        self.slots += other.slots
        self.drops += other.drops
        self.entropy_sum += other.entropy_sum
        self.probability_sum = self.probability_sum + other.probability_sum
        self.co_activation = self.co_activation + other.co_activation
        for label, loads in other.by_class.items():
            self.by_class[label] = self.by_class.get(label, torch.zeros_like(loads)) + loads
        self.ids += other.ids
        self.weights += other.weights

    def row(self) -> dict[str, Any]:
        """The figures as plain numbers, for a table or a file."""
        loads, total = self.loads, max(int(self.loads.sum()), 1)
        return {
            "tokens": self.tokens,
            "loads": dict(zip(self.names, loads.tolist(), strict=True)),
            "share": {name: count / total for name, count in zip(self.names, loads.tolist(), strict=True)},
            "probability": dict(zip(self.names, self.probability.tolist(), strict=True)),
            "drops": self.drops,
            "null_share": self.null_share,
            "entropy": self.entropy,
            "max_violation": self.max_violation,
        }


class RoutingStats(dict[str, BlockStats]):
    """Name of a block → its statistics. `labels` counts the following forwards by class as well."""

    def __init__(self, keep: str = "counts", labels: Labels | None = None):
        super().__init__()
        self.keep, self.labels = keep, labels

    def table(self) -> str:
        """One line per block: share of every expert in per cent, MaxVio, drops."""
        lines = []
        for name, stats in self.items():
            shares = "  ".join(f"{expert} {share:.1%}" for expert, share in stats.row()["share"].items())
            lines.append(f"{name or 'block'}: {shares}  (MaxVio {stats.max_violation:.2f}, drops {stats.drops})")
        return "\n".join(lines)


@contextmanager
def record_routing(
    model: nn.Module, keep: Literal["counts", "ids", "weights"] = "counts", labels: Labels | None = None
) -> Iterator[RoutingStats]:
    """Statistics of every block of `model` over the forwards in the body; outputs and gradients stay as they are.

    `keep`: also the chosen ids of every token, or ids and weights. `labels`: classes of the rows [B] or of the tokens
    [B, T]; the next batch's are set with `stats.labels = …`. Raises ValueError if the model has no block.
    """
    if keep not in KEEPS:
        raise ValueError(unknown("keep", keep, KEEPS))
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, MoEBlock)}
    if not blocks:
        raise ValueError(f"this {type(model).__name__} has no MoE block whose routing could be recorded")
    stats = RoutingStats(keep, labels)
    titles: dict[int, str] = {}
    for name, block in blocks.items():
        titles[id(block)] = name
        stats[name] = BlockStats(block.choice_names, len(block.experts))

    def observe(block: MoEBlock, routing: Routing, mask: Tensor | None) -> None:
        stats[titles[id(block)]].add(counted(block, routing, mask, stats.keep, stats.labels))

    for block in blocks.values():
        block.observers.append(observe)
    try:
        yield stats
    finally:
        for block in blocks.values():
            block.observers.remove(observe)


@torch.no_grad()
def counted(
    block: MoEBlock, routing: Routing, mask: Tensor | None, keep: str = "counts", labels: Labels | None = None
) -> BlockStats:
    """One forward of one block. `mask` [B, T] is true at real tokens."""
    stats = BlockStats(block.choice_names, len(block.experts))
    columns = len(stats.names)
    weights, ids = routing.weights.detach().float().cpu(), chosen_ids(routing).cpu()
    valid = torch.ones(ids.shape[:2], dtype=torch.bool)
    if mask is not None and mask.shape == ids.shape[:2]:
        valid = mask.detach().bool().cpu()
    ids = torch.where(valid[..., None], ids, -1)
    marks = functional.one_hot(ids + 1, columns + 1)[..., 1:].sum(2)  # [B, T, E'], how often each was chosen
    stats.tokens = int(valid.sum())
    stats.loads_at = marks.sum(0).T.contiguous()
    if block.config.router.name in SLOTTED:
        stats.slots = stats.tokens * ids.shape[-1]
        stats.drops = stats.slots - int(marks.sum())
    else:
        stats.slots = int(marks.sum())
    p = _probabilities(block, routing, columns)
    if p is not None:
        p = p.cpu().double().expand(*valid.shape, columns)[valid]
        stats.probability_sum = p.sum(0)
        stats.entropy_sum = float(-torch.xlogy(p, p).sum())
    chosen = (marks > 0).flatten(0, 1).double()
    stats.co_activation = (chosen.T @ chosen).long()
    if labels is not None:
        stats.by_class = _by_class(marks, labels)
    if keep != "counts":
        stats.ids.append(ids)
    if keep == "weights":
        stats.weights.append(weights * (ids >= 0) if routing.expert_ids is not None else weights)
    return stats


def chosen_ids(routing: Routing) -> Tensor:
    """The experts of every slot, int64 [B, T, K], -1 where it is empty; of a dense routing the largest weight's."""
    if routing.expert_ids is None:
        return routing.weights.argmax(-1, keepdim=True)
    return routing.expert_ids.expand_as(routing.weights)


def _probabilities(block: MoEBlock, routing: Routing, columns: int) -> Tensor | None:
    """p [B, T, E'] of the router; the weights, scaled to sum 1, where it has no logits."""
    if routing.logits is not None and routing.logits.shape[-1] == columns:
        logits = routing.logits.detach().float()
        if block.config.router.score == "sigmoid":
            p = logits.sigmoid()
            return p / p.sum(-1, keepdim=True)
        return logits.softmax(-1)
    dense = routing.dense(columns).detach().float()
    return dense / dense.sum(-1, keepdim=True).clamp_min(1e-30)


def _by_class(marks: Tensor, labels: Labels) -> dict[Any, Tensor]:
    """Class → loads [E']. Raises ValueError if there are not as many labels as rows or tokens."""
    rows = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if len(rows) != len(marks):
        raise ValueError(f"labels: {len(rows)} for a batch of {len(marks)} rows")
    found: dict[Any, Tensor] = {}
    for row, label in zip(marks, rows, strict=True):
        each = label if isinstance(label, list | tuple) else None
        if each is not None and len(each) != len(row):
            raise ValueError(f"labels: {len(each)} for a row of {len(row)} tokens")
        for one, loads in zip(each, row, strict=True) if each is not None else [(label, row.sum(0))]:
            found[one] = found.get(one, torch.zeros_like(loads)) + loads
    return found
