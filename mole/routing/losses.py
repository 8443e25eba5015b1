"""Losses on routings: balance, sharpness, supervision by known experts. All optional, each off by default.

With p the softmax of a routing's logits, N valid tokens, P_e = Σ_t p_te / N, f_e the share of choices that fell on
expert e (Σ f = 1) and H the entropy in nats:

    load_balance        E Σ_e f_e P_e                     1 at balance (Fedus et al. 2021, arXiv 2101.03961)
    z_loss              mean_t logsumexp_e(z_te)²         (Zoph et al. 2022, arXiv 2202.08906)
    importance_cv2      E Σ_e P_e² − 1                    0 at balance (Shazeer et al. 2017, arXiv 1701.06538)
    load_cv2            E Σ_e l_e² − 1                    0 at balance; l the share of Σ_t P(e is chosen) under the
                                                          noise of the router (Shazeer et al. 2017)
    balance_entropy     ln E − H(P)                       0 at balance
    token_entropy       mean_t H(p_t)                     0 for one-hot routing
    mutual_information  mean_t H(p_t) − H(P)              −ln E for sharp and balanced routing
    expert_label        mean_t −ln p_t,e*                 e*: the expert of the token's task

`over` says what N is: the tokens of a micro-batch, or of each sequence by itself, whose losses are then averaged with
the sequences' tokens as weights: a router that is balanced over a batch of unlike tasks need not be so in any of them.
`free_bits` stops mutual_information from pushing once it is −free_bits · ln E: tasks that share experts may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mole.registry import unknown
from mole.routing.routing import Routing

UNLABELLED = -100


@dataclass(frozen=True)
class Observed:
    """One routing over its N valid tokens: log p [N, E] and logits [N, E] with graph; chosen experts [N, K], -1: none.

    `sequences` [N]: the row each token is of; `labels` [N] or None; `chances` [N, E], with graph, where the router has
    noise. Each block of features counts as a token.
    """

    log_p: Tensor
    logits: Tensor
    chosen: Tensor
    sequences: Tensor
    labels: Tensor | None
    chances: Tensor | None = None

    @property
    def load(self) -> Tensor:
        """f [E], without graph."""
        counts = torch.bincount(self.chosen[self.chosen >= 0].flatten(), minlength=self.logits.shape[-1])
        return counts.to(self.logits.dtype) / counts.sum().clamp_min(1)

    def by_sequence(self) -> list[Observed]:
        """The same of each row by itself."""
        rows = [self.sequences == row for row in self.sequences.unique()]
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        present = {name: value for name, value in values.items() if value is not None}
        return [replace(self, **{name: value[row] for name, value in present.items()}) for row in rows]

    @property
    def importance(self) -> Tensor:
        """P [E]."""
        return self.log_p.exp().mean(0)

    @property
    def expected_load(self) -> Tensor:
        """Σ_t P(e is chosen) [E]."""
        assert self.chances is not None
        return self.chances.sum(0)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


def _load_balance(o: Observed) -> Tensor:
    return len(o.load) * (o.load * o.importance).sum()


def _z_loss(o: Observed) -> Tensor:
    return o.logits.logsumexp(-1).square().mean()


def _importance_cv2(o: Observed) -> Tensor:
    return len(o.load) * o.importance.square().sum() - 1


def _load_cv2(o: Observed) -> Tensor:
    if o.chances is None:
        raise ValueError(
            "the loss load_cv2 needs a router whose choice is noisy: router=top_k with router.noise=normal or learned, "
            "and router.top_k below the number of experts"
        )
    load = o.expected_load
    return len(load) * (load / load.sum().clamp_min(torch.finfo(load.dtype).tiny)).square().sum() - 1


def _balance_entropy(o: Observed) -> Tensor:
    return math.log(len(o.load)) - _entropy(o.importance)


def _token_entropy(o: Observed) -> Tensor:
    return -(o.log_p.exp() * o.log_p).sum(-1).mean()


def _mutual_information(o: Observed) -> Tensor:
    return _token_entropy(o) - _entropy(o.importance)


def _expert_label(o: Observed) -> Tensor:
    if o.labels is None:
        raise ValueError("the loss expert_label needs expert_labels, or task_names of tasks that the experts name")
    known = o.labels != UNLABELLED
    if not known.any():
        return o.log_p.sum() * 0.0
    return -o.log_p[known].gather(-1, o.labels[known, None]).mean()


Over = Literal["microbatch", "sequence"]
On = Literal["valid", "prompt", "target"]

LOSSES: dict[str, Callable[[Observed], Tensor]] = {
    "load_balance": _load_balance,
    "z_loss": _z_loss,
    "importance_cv2": _importance_cv2,
    "load_cv2": _load_cv2,
    "balance_entropy": _balance_entropy,
    "token_entropy": _token_entropy,
    "mutual_information": _mutual_information,
    "expert_label": _expert_label,
}


# Those of shares over tokens; the others are means over tokens, the same however the tokens are grouped.
OF_SHARES = ("load_balance", "importance_cv2", "load_cv2", "balance_entropy", "mutual_information")


def check_losses(coefficients: Mapping[str, Any]) -> None:
    """Raises ValueError for a loss that is not known."""
    for name in coefficients:
        if name not in LOSSES:
            raise ValueError(unknown("losses: loss", name, LOSSES))


def tokens_of(on: On, mask: Tensor | None, prompt: Tensor | None) -> Tensor | None:
    """Which tokens count, [B, T], 1 or true at them: the valid ones of `mask`, or those of the `prompt` or behind it.

    Raises ValueError where it is not known what the prompts are.
    """
    if on == "valid":
        return mask
    if prompt is None:
        raise ValueError(f"losses on the tokens of {on}s need the prompts: pass prompt_mask=… to the model")
    wanted = prompt.bool() if on == "prompt" else ~prompt.bool()
    return wanted if mask is None else wanted & mask.bool()


def routing_losses(
    names: Iterable[str],
    routings: Iterable[Routing],
    mask: Tensor | None,
    labels: Tensor | None = None,
    *,
    over: Over = "microbatch",
    free_bits: float = 0.0,
) -> dict[str, Tensor]:
    """Each loss by name, a scalar: the mean over the distinct routings of a forward.

    `mask` [B, T], 1 at valid tokens (None: all are); `labels` int64 [B] or [B, T], an expert's index or -100. Raises
    ValueError if a routing has no logits: its router learns nothing that these losses could move.
    """
    distinct = list({id(routing): routing for routing in routings}.values())
    seen = [_observed(routing, mask, labels) for routing in distinct]
    return {name: torch.stack([loss_value(name, one, over, free_bits) for one in seen]).mean() for name in names}


def loss_value(name: str, observed: Observed, over: Over, free_bits: float = 0.0) -> Tensor:
    """One loss over the whole micro-batch, or its mean over sequences, weighted by their tokens."""
    if not len(observed.log_p):
        return observed.logits.sum()  # of none: 0
    parts = observed.by_sequence() if over == "sequence" and name in OF_SHARES else [observed]
    values = [LOSSES[name](part) for part in parts]
    if name == "mutual_information" and free_bits:
        values = [value.clamp_min(-free_bits * math.log(len(observed.load))) for value in values]
    tokens = [len(part.log_p) for part in parts]
    return sum((v * n for v, n in zip(values, tokens, strict=True)), observed.log_p.new_zeros(())) / max(sum(tokens), 1)


def labels_of(tasks: Iterable[str] | None, expert_tasks: Sequence[Sequence[str]]) -> Tensor | None:
    """int64 [B]: for each example's task the one expert that names it, -100 where none or several do."""
    if tasks is None:
        return None
    naming = [[e for e, own in enumerate(expert_tasks) if task in own] for task in tasks]
    return torch.tensor([found[0] if len(found) == 1 else UNLABELLED for found in naming])


def _observed(routing: Routing, mask: Tensor | None, labels: Tensor | None) -> Observed:
    if routing.logits is None:
        raise ValueError("this router has no logits: losses on its routing move nothing; set losses={}")
    logits, chosen, chances = routing.logits, routing.expert_ids, routing.chances
    blocks = logits.shape[2] if logits.dim() == 4 else 1
    if logits.dim() == 4:
        logits = logits.flatten(1, 2)
        chosen = None if chosen is None else chosen.expand_as(routing.weights).flatten(1, 2)
    rows, length = logits.shape[:2]
    valid = torch.ones(rows, length, dtype=torch.bool, device=logits.device)
    if mask is not None and (rows, length) == (mask.shape[0], mask.shape[1] * blocks):
        valid = mask.to(logits.device).bool().repeat_interleave(blocks, dim=1)
    if labels is not None:
        labels = (labels[:, None] if labels.dim() == 1 else labels.repeat_interleave(blocks, dim=1)).to(logits.device)
        labels = labels.expand(rows, length)[valid]
    ids = logits.argmax(-1, keepdim=True) if chosen is None else chosen
    ids = ids.expand(rows, length, -1)[valid]
    sequences = torch.arange(rows, device=logits.device)[:, None].expand(rows, length)[valid]
    chances = None if chances is None else chances.expand(rows, length, logits.shape[-1])[valid]
    flat = logits[valid]
    return Observed(torch.log_softmax(flat, dim=-1), flat, ids, sequences, labels, chances)
