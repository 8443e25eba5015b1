"""Statistics of routings over a window of forwards: how sharp, how balanced, who does the work, who none.

With p_t a token's weights over its experts scaled to sum 1, N valid tokens, P_e = Σ_t p_te / N, f_e the share of
choices that fell on expert e (Σ f = 1; a dense routing chooses its largest weight) and H the entropy in nats:

    entropy            mean_t H(p_t)             normalised_entropy  that / ln E
    entropy_average    H(P)                      mutual_information  H(P) − mean_t H(p_t)
    load               f                         importance          P
    max_violation      E max_e f_e − 1           usage               share of experts with f_e > 0
    effective_experts  exp H(P)                  weight_sum          mean_t Σ_e w_te
    margin             mean_t of the largest minus the second largest p_te
    angle              mean_t max_e cos(x_t, v_e), angles mean_t of each, where routers have prototypes v_e
    co_activation      share of the tokens for which two experts were chosen together, of the most frequent pairs
    score_norm         mean_t ‖z_t‖ over the experts, where routers tell their scores z before the choice
    p_correct          mean_t p_t,e* for tokens whose task one expert names; accuracy: that e* has the largest weight

Sums stay on the device of the routing, in float32, until they are read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from mole.routing.context import Frame
from mole.routing.losses import UNLABELLED, labels_of
from mole.routing.routing import Routing

logger = logging.getLogger(__name__)
SCALARS = (
    "entropy",
    "normalised_entropy",
    "entropy_average",
    "mutual_information",
    "max_violation",
    "usage",
    "effective_experts",
    "weight_sum",
    "margin",
)
# An expert is dead with less than this part of its even share, a router collapsed below this many effective experts.
DEAD, COLLAPSED = 0.01, 1.2
PAIRS = 20  # of experts chosen together that are told: E² of them would fill the log
TASKS = 16  # that are told of apart: the first ones that come
NAMED = 3  # modules that a warning names
ABSENT = -1e20  # scores below are of experts that are not there


@dataclass
class Sums:
    """What one site's routings came to so far: tensors on its device. `counts` [E] choices, `p` [E] summed weights;
    `scalars` [4]: tokens, Σ H(p_t), Σ margin, Σ Σ_e w; `labelled` [3]: tokens with a label, Σ p_t,e*, hits; `pairs`
    [E, E] tokens that chose both, `angles` [E + 1] Σ max_e cos, Σ cos of each, `norms` [1] Σ ‖z_t‖, `tasks` [TASKS,
    E + 2] of each task tokens, Σ H(p_t), choices: empty [0] where there is no such thing.
    """

    counts: Tensor
    p: Tensor
    scalars: Tensor
    labelled: Tensor
    pairs: Tensor
    angles: Tensor
    norms: Tensor
    tasks: Tensor

    def add(self, other: Sums) -> None:
        """Counts `other`, of the same device, in."""
        for name in (one.name for one in fields(self)):
            getattr(self, name).add_(getattr(other, name))

    def values(self, names: Sequence[str]) -> dict[str, Any]:
        """The statistics, of the experts `names`, as plain numbers."""
        count, entropy, margin, weight = self.scalars.tolist()
        found: dict[str, Any] = {}
        if not count:
            return found
        experts = len(names)
        load = self.counts / self.counts.sum().clamp_min(1)
        importance = self.p / count
        average = float(-torch.xlogy(importance, importance).sum())
        most = math.log(experts) if experts > 1 else 1.0
        found |= {
            "entropy": entropy / count,
            "normalised_entropy": entropy / count / most,
            "entropy_average": average,
            "mutual_information": average - entropy / count,
            "max_violation": experts * float(load.max()) - 1,
            "usage": float((load > 0).float().mean()),
            "effective_experts": math.exp(average),
            "weight_sum": weight / count,
            "margin": margin / count,
            "load": dict(zip(names, load.tolist(), strict=True)),
            "importance": dict(zip(names, importance.tolist(), strict=True)),
        }
        labelled, correct, hits = self.labelled.tolist()
        if labelled:
            found |= {"p_correct": correct / labelled, "accuracy": hits / labelled}
        if self.angles.numel():
            nearest, *each = (self.angles / count).tolist()
            found |= {"angle": nearest, "angles": dict(zip(names, each, strict=True))}
        if self.norms.numel():
            found["score_norm"] = self.norms.item() / count
        if self.pairs.numel():
            found["co_activation"] = self._together(names, count)
        return found

    def of_task(self, slot: int, names: Sequence[str]) -> dict[str, Any]:
        """Load, entropy and usage of one task; nothing where no token was of it."""
        count, entropy, *counts = self.tasks[slot].tolist() if self.tasks.numel() else (0.0, 0.0)
        if not count:
            return {}
        load = [one / max(sum(counts), 1.0) for one in counts]
        usage = sum(one > 0 for one in load) / len(load)
        return {"load": dict(zip(names, load, strict=True)), "entropy": entropy / count, "usage": usage}

    def _together(self, names: Sequence[str], count: float) -> dict[str, float]:
        """`one + other` → share of the tokens, the most frequent first."""
        shares = torch.triu(self.pairs / count, diagonal=1)
        most = shares.flatten().topk(min(PAIRS, len(names) * (len(names) - 1) // 2))
        pairs = [
            (divmod(place, len(names)), share) for place, share in zip(*map(Tensor.tolist, most[::-1]), strict=True)
        ]
        return {f"{names[one]} + {names[other]}": share for (one, other), share in pairs if share > 0}


def measured(
    routing: Routing, num_experts: int, mask: Tensor | None, labels: Tensor | None, tasks: Tensor | None = None
) -> Sums:
    """One routing over its valid tokens. `mask` [B, T], 1 at valid tokens; `labels` int64 [B], an expert or -100;
    `tasks` int64 [B], the slot of each example's task, or -1.
    """
    with torch.no_grad():
        weights, ids = routing.weights.detach().float(), routing.expert_ids
        rows, length = weights.shape[:2]
        if mask is not None and mask.shape[0] % rows == 0 and length in (1, mask.shape[1]):
            rows, length = mask.shape
        valid = torch.ones(rows, length, device=weights.device)
        if mask is not None and mask.shape == valid.shape:
            valid = (mask != 0).to(weights)
        if weights.dim() == 4:  # a routing of feature blocks: their mean
            dense = routing.dense(num_experts).detach().float().mean(2)
            weights, ids = dense, None
        total = weights.sum(-1, keepdim=True)
        p = weights / torch.where(total == 0, torch.ones_like(total), total)
        top = p.topk(min(2, p.shape[-1]), dim=-1).values
        margin = top[..., 0] - top[..., 1] if top.shape[-1] > 1 else top[..., 0]
        per_token = torch.stack([torch.ones_like(margin), _entropy(p), margin, total[..., 0]])
        chosen = p.argmax(-1, keepdim=True) if ids is None else ids.expand_as(p)
        by_expert = _spread(p, ids, num_experts)
        share = valid[..., None].expand(rows, length, chosen.shape[-1])
        used = chosen.expand(rows, length, -1)
        marks = torch.zeros(rows, length, num_experts, device=weights.device)
        marks.scatter_add_(-1, used.clamp(0, num_experts - 1), share * ((used >= 0) & (used < num_experts)))
        labelled = torch.zeros(3, device=weights.device)
        if labels is not None and rows % len(labels) == 0:
            labels = labels.to(weights.device).repeat_interleave(rows // len(labels))
            labelled = _labelled(by_expert, valid, labels)
        by_task = weights.new_zeros(0)
        if tasks is not None and rows % len(tasks) == 0:
            by_task = _by_task(per_token[1] * valid, marks, valid, tasks.repeat_interleave(rows // len(tasks)))
        flat = (marks > 0).float().flatten(0, 1)
        return Sums(
            counts=marks.flatten(0, 1).sum(0),
            p=(by_expert * valid[..., None]).flatten(0, 1).sum(0),
            scalars=(per_token * valid).flatten(1).sum(1),
            labelled=labelled,
            pairs=flat.T @ flat if chosen.shape[-1] > 1 else flat.new_zeros(0),
            angles=_angles(routing, valid),
            norms=_norms(routing, valid),
            tasks=by_task,
        )


def _angles(routing: Routing, valid: Tensor) -> Tensor:
    if routing.angles is None:
        return valid.new_zeros(0)
    angles = routing.angles.float()
    told = torch.cat([angles.amax(-1, keepdim=True), angles], dim=-1)
    return (told * valid[..., None]).flatten(0, 1).sum(0)


def _norms(routing: Routing, valid: Tensor) -> Tensor:
    if routing.logits is None:
        return valid.new_zeros(0)
    z = routing.logits.detach().float()
    norms = z.masked_fill(z < ABSENT, 0.0).norm(dim=-1)
    norms = norms.mean(2) if norms.dim() == 3 else norms
    return (norms * valid).sum().view(1)


def _by_task(entropies: Tensor, marks: Tensor, valid: Tensor, tasks: Tensor) -> Tensor:
    """Tokens, summed entropy and choices of each example → of each task."""
    rows = torch.cat([valid.sum(1, keepdim=True), entropies.sum(1, keepdim=True), marks.sum(1)], dim=1)
    tasks = tasks.to(rows.device)
    known = (tasks >= 0).to(rows)[:, None]
    return rows.new_zeros(TASKS, rows.shape[1]).index_add_(0, tasks.clamp_min(0), rows * known)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p.clamp_min(0)).sum(-1)


def _spread(p: Tensor, ids: Tensor | None, num_experts: int) -> Tensor:
    return p if ids is None else Routing(p, ids).dense(num_experts)


def _labelled(p: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
    known = (labels != UNLABELLED)[:, None] * valid
    p = p.expand(*known.shape, -1)
    right = labels.clamp_min(0)[:, None, None].expand(*known.shape, 1)
    correct = p.gather(-1, right)[..., 0]
    hits = (p.argmax(-1) == right[..., 0]).to(p)
    return torch.stack([known.sum(), (correct * known).sum(), (hits * known).sum()])


@dataclass
class RoutingStatistics:
    """Listens to a mixture's forwards (`MultiExpertModel.observers`) and tells what they came to since it last did.

    `sites`, `expert_names` as of the mixture; `expert_tasks` the tasks that each expert names. Forwards of `phases`
    only, every `every`-th of them; a recomputation is none. `warns` of routers that collapse: not where one expert for
    all is what is looked for.
    """

    sites: Sequence[str]
    expert_names: Sequence[str]
    expert_tasks: Sequence[Sequence[str]] = ()
    every: int = 1
    warns: bool = True
    phases: Collection[str] = ("train",)
    _seen: int = 0
    _sums: dict[str, Sums] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)
    _tasks: dict[str, int] = field(default_factory=dict)  # task → its slot

    def observe(self, frame: Frame, phase: str) -> None:
        """One forward: its routings as spent."""
        if phase not in self.phases:
            return
        self._seen += 1
        if (self._seen - 1) % self.every:
            return
        mask, names = frame.inputs.attention_mask, frame.inputs.task_names
        labels, tasks = labels_of(names, self.expert_tasks), self._slots(names)
        distinct = {id(routing): (site, routing) for site, routing in reversed(frame.seen.items())}
        for site, routing in distinct.values():  # modules that share a routing count once, under the first one's name
            self._count(site, measured(routing, len(self.expert_names), mask, labels, tasks))

    def _slots(self, names: Sequence[str] | None) -> Tensor:
        """The slot of each example's task, -1 without one: all have slots until there are as many as are told of."""
        for name in names or ():
            if name not in self._tasks and len(self._tasks) < TASKS:
                self._tasks[name] = len(self._tasks)
        return torch.tensor([self._tasks.get(name, -1) for name in names or ("",)])

    def _count(self, site: str, sums: Sums) -> None:
        if site in self._sums:
            self._sums[site].add(sums)
        else:
            self._sums[site] = sums

    def read(self) -> dict[str, Any]:
        """`router/<statistic>`, the mean over the routers; a fresh window begins.

        `router/<site>/<statistic>` of each router, and of several tasks `router/<task>/<statistic>`, as means over the
        routers. Warns once of routers that send nearly all to one expert, and of experts that get nearly nothing.
        """
        sums, self._sums = self._sums, {}
        by_site = {site: found.values(self.expert_names) for site, found in sums.items()}
        by_site = {site: values for site, values in by_site.items() if values}
        if not by_site:
            return {}
        if self.warns and len(self.expert_names) > 1:
            self._warn(by_site)
        found: dict[str, Any] = {f"router/{name}": _mean(by_site, name) for name in next(iter(by_site.values()))}
        if len(by_site) > 1:
            found |= {f"router/{site}/{name}": v for site, values in by_site.items() for name, v in values.items()}
        for task, slot in self._tasks.items() if len(self._tasks) > 1 else ():
            own = {site: row for site, one in sums.items() if (row := one.of_task(slot, self.expert_names))}
            for name in next(iter(own.values()), {}):
                found[f"router/{task}/{name}"] = _mean(own, name)
        return found

    def _warn(self, by_site: Mapping[str, Mapping[str, Any]]) -> None:
        """One line for all routers that have collapsed, and one for all others that leave experts out."""
        even, collapsed, dead = 1 / len(self.expert_names), {}, {}
        for site in (one for one in self.sites if one in by_site):
            values = by_site[site]
            shares = values["importance"]
            if values["effective_experts"] < COLLAPSED:
                collapsed[site] = max(shares, key=shares.get)
            elif left := [name for name, share in shares.items() if share < DEAD * even]:
                dead[site] = left
        if collapsed and "collapsed" not in self._warned:
            self._warned.add("collapsed")
            best = list(dict.fromkeys(collapsed.values()))
            least = min(by_site[site]["importance"][name] for site, name in collapsed.items())
            logger.warning(
                "%s at least %.0f %% of its weight to %s: it may have collapsed; a loss such as "
                "losses={load_balance: 0.01} spreads it",
                _who(collapsed, len(by_site)),
                100 * least,
                best[0] if len(best) == 1 else f"one expert ({', '.join(best)})",
            )
        if dead and "dead" not in self._warned:
            self._warned.add("dead")
            names = dict.fromkeys(name for left in dead.values() for name in left)
            logger.warning("%s nearly nothing to %s", _who(dead, len(by_site)), ", ".join(names))


def _who(sites: Collection[str], of: int) -> str:
    """Whose routing is meant, as the beginning of a sentence."""
    if of == 1:
        return "the router gives"
    shown = ", ".join(list(sites)[:NAMED])
    if len(sites) == 1:
        return f"the router at {shown} gives"
    more = f" and {len(sites) - NAMED} more" if len(sites) > NAMED else ""
    return f"each of {len(sites)} routers of {of} ({shown}{more}) gives"


def _mean(by_site: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    values = [row[name] for row in by_site.values() if name in row]
    if isinstance(values[0], dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: sum(value.get(key, 0.0) for value in values) / len(values) for key in keys}
    return sum(values) / len(values)
