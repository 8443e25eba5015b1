"""Statistics of routings over a window of training forwards: how sharp, how balanced, who does the work, who none.

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
    p_correct          mean_t p_t,e* for tokens whose task one expert names; accuracy: that e* has the largest weight

Sums stay on the device of the routing, in float32, until they are read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
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


@dataclass
class Sums:
    """What one site's routings came to so far: tensors on its device. `counts` [E] choices, `p` [E] summed weights;
    `scalars` [4]: tokens, Σ H(p_t), Σ margin, Σ Σ_e w; `labelled` [3]: tokens with a label, Σ p_t,e*, hits; `pairs`
    [E, E] tokens that chose both, `angles` [E + 1] Σ max_e cos, Σ cos of each: empty [0] where there is no such thing.
    """

    counts: Tensor
    p: Tensor
    scalars: Tensor
    labelled: Tensor
    pairs: Tensor
    angles: Tensor

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
        if self.pairs.numel():
            found["co_activation"] = self._together(names, count)
        return found

    def _together(self, names: Sequence[str], count: float) -> dict[str, float]:
        """`one + other` → share of the tokens, the most frequent first."""
        shares = torch.triu(self.pairs / count, diagonal=1)
        most = shares.flatten().topk(min(PAIRS, len(names) * (len(names) - 1) // 2))
        pairs = [
            (divmod(place, len(names)), share) for place, share in zip(*map(Tensor.tolist, most[::-1]), strict=True)
        ]
        return {f"{names[one]} + {names[other]}": share for (one, other), share in pairs if share > 0}


def measured(routing: Routing, num_experts: int, mask: Tensor | None, labels: Tensor | None) -> Sums:
    """One routing over its valid tokens. `mask` [B, T], 1 at valid tokens; `labels` int64 [B], an expert or -100."""
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
        flat = (marks > 0).float().flatten(0, 1)
        return Sums(
            counts=marks.flatten(0, 1).sum(0),
            p=(by_expert * valid[..., None]).flatten(0, 1).sum(0),
            scalars=(per_token * valid).flatten(1).sum(1),
            labelled=labelled,
            pairs=flat.T @ flat if chosen.shape[-1] > 1 else flat.new_zeros(0),
            angles=_angles(routing, valid),
        )


def _angles(routing: Routing, valid: Tensor) -> Tensor:
    if routing.angles is None:
        return valid.new_zeros(0)
    angles = routing.angles.float()
    told = torch.cat([angles.amax(-1, keepdim=True), angles], dim=-1)
    return (told * valid[..., None]).flatten(0, 1).sum(0)


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

    `sites`, `expert_names` as of the mixture; `expert_tasks` the tasks that each expert names. Training forwards only,
    every `every`-th of them; a recomputation is none. `warns` of routers that collapse: not where one expert for all is
    what is looked for.
    """

    sites: Sequence[str]
    expert_names: Sequence[str]
    expert_tasks: Sequence[Sequence[str]] = ()
    every: int = 1
    warns: bool = True
    _seen: int = 0
    _sums: dict[str, Sums] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)

    def observe(self, frame: Frame, phase: str) -> None:
        """One forward: its routings as spent."""
        if phase != "train":
            return
        self._seen += 1
        if (self._seen - 1) % self.every:
            return
        mask = frame.inputs.attention_mask
        labels = labels_of(frame.inputs.task_names, self.expert_tasks)
        distinct = {id(routing): (site, routing) for site, routing in reversed(frame.seen.items())}
        for site, routing in distinct.values():  # modules that share a routing count once, under the first one's name
            self._count(site, measured(routing, len(self.expert_names), mask, labels))

    def _count(self, site: str, sums: Sums) -> None:
        if site in self._sums:
            self._sums[site].add(sums)
        else:
            self._sums[site] = sums

    def read(self) -> dict[str, Any]:
        """`router/<statistic>`, the mean over the routers, `router/<site>/<statistic>` of each; a fresh window begins.

        Warns of a router that sends nearly everything to one expert, and of experts that get nearly nothing.
        """
        sums, self._sums = self._sums, {}
        by_site = {site: found.values(self.expert_names) for site, found in sums.items()}
        by_site = {site: values for site, values in by_site.items() if values}
        if not by_site:
            return {}
        for site, values in by_site.items():
            self._warn(site if len(by_site) > 1 else "", values)
        found: dict[str, Any] = {f"router/{name}": _mean(by_site, name) for name in next(iter(by_site.values()))}
        if len(by_site) > 1:
            found |= {f"router/{site}/{name}": v for site, values in by_site.items() for name, v in values.items()}
        return found

    def _warn(self, site: str, values: Mapping[str, Any]) -> None:
        where = f" at {site}" if site else ""
        even = 1 / len(self.expert_names)
        if not self.warns or len(self.expert_names) < 2 or site in self._warned:
            return
        if values["effective_experts"] < COLLAPSED:
            best = max(values["importance"], key=values["importance"].get)
            self._warned.add(site)
            logger.warning(
                "the router%s gives %.0f %% of its weight to %s: it may have collapsed; a loss such as "
                "losses={load_balance: 0.01} spreads it",
                where,
                100 * values["importance"][best],
                best,
            )
            return
        dead = [name for name, share in values["importance"].items() if share < DEAD * even]
        if dead:
            self._warned.add(site)
            logger.warning("the router%s gives nearly nothing to %s", where, ", ".join(dead))


def _mean(by_site: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    values = [row[name] for row in by_site.values() if name in row]
    if isinstance(values[0], dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: sum(value.get(key, 0.0) for value in values) / len(values) for key in keys}
    return sum(values) / len(values)
