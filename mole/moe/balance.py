"""Losses of a block: those of mole.routing.losses over its real experts; over tokens where experts choose; over ranks.

Null experts take no part: a token counts with the mass that it gives to real experts, and if nobody chose any, the
losses of balance are 0. Under expert choice, loads are equal by construction, and importance_cv2 and balance_entropy
are about tokens: how evenly weight covers them, in each sequence.

`global`: f and P are of all ranks. Every rank then has the same value, and gradients that average over ranks (as DDP
does) to those of the whole batch. Under gradient accumulation f is of the step's micro-batches so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mole.moe.config import NULL_RATE, MoEConfig
from mole.moe.routers import Choice
from mole.routing.losses import OF_SHARES, Observed, loss_value

TINY = 1e-20


@dataclass(frozen=True)
class BlockObserved(Observed):
    """`mass` [N]: the share of a token's probability that real experts have. `counts` [E]: of all ranks and
    micro-batches, in the place of this forward's own.
    """

    mass: Tensor | None = None
    counts: Tensor | None = None

    @property
    def load(self) -> Tensor:
        counts = slot_counts(self.chosen, self.logits.shape[-1]) if self.counts is None else self.counts
        return counts.to(self.logits.dtype) / counts.sum().clamp_min(1)

    @property
    def importance(self) -> Tensor:
        shares = self.log_p.exp()
        if self.mass is not None:
            shares = shares * self.mass[:, None]
        total = shares.sum(0) if self.counts is None else over_ranks(shares.sum(0))
        return total / total.sum().clamp_min(TINY)

    @property
    def expected_load(self) -> Tensor:
        assert self.chances is not None
        total = self.chances.sum(0)
        return total if self.counts is None else over_ranks(total)


def over_ranks(value: Tensor) -> Tensor:
    """The sum over ranks; the gradient is the own part's, times the ranks, over which DDP divides."""
    if not distributed():
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total + torch.distributed.get_world_size() * (value - value.detach())


def distributed() -> bool:
    """Whether there are other ranks."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def summed_over_ranks(counts: Tensor) -> Tensor:
    """The sum of counts over ranks."""
    if distributed():
        counts = counts.clone()
        torch.distributed.all_reduce(counts)
    return counts


def slot_counts(ids: Tensor, num_choices: int) -> Tensor:
    """int64 [E']: how many slots each choice has."""
    flat = ids.reshape(-1)
    keys = torch.where((flat >= 0) & (flat < num_choices), flat, num_choices)
    return torch.zeros(num_choices + 1, dtype=torch.long, device=ids.device).scatter_add(
        0, keys, torch.ones_like(keys)
    )[:-1]


def block_losses(
    names: list[str], choice: Choice, valid: Tensor | None, config: MoEConfig, num_experts: int, counts: Tensor | None
) -> dict[str, Tensor]:
    """Each loss by name, a scalar with graph. `counts` [E] of all ranks, for losses_over=global."""
    if not names:
        return {}
    routing = choice.routing
    assert routing.logits is not None
    if not routing.logits.numel() or (valid is not None and not torch.compiler.is_compiling() and not valid.any()):
        return {name: routing.logits.sum() * 0.0 for name in names}
    observed = _observed(choice, valid, num_experts, counts)
    over = "sequence" if config.losses_over == "sequence" else "microbatch"
    found = {}
    for name in names:
        if name == NULL_RATE:
            found[name] = _null_rate(choice, valid, config, num_experts)
        elif choice.coverage is not None and name in _COVERAGE:
            found[name] = _COVERAGE[name](choice.coverage, valid)
        else:
            value = loss_value(name, observed, over)
            if name in OF_SHARES:
                value = torch.where(observed.load.sum() > 0, value, value * 0.0)
            elif counts is not None:
                value = _mean_over_ranks(value, len(observed.log_p))
            found[name] = value
    return found


def _observed(choice: Choice, valid: Tensor | None, num_experts: int, counts: Tensor | None) -> BlockObserved:
    routing = choice.routing
    assert routing.logits is not None
    assert choice.log_p is not None
    rows, length = routing.logits.shape[:2]
    sequences = torch.arange(rows, device=routing.logits.device)[:, None].expand(rows, length)

    def flat(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1) if valid is None else tensor[valid]

    log_p, logits = flat(choice.log_p), flat(routing.logits)
    mass = None
    if log_p.shape[-1] > num_experts:
        mass = torch.exp(log_p[:, :num_experts].logsumexp(-1) - log_p.logsumexp(-1))
    if routing.expert_ids is None:
        ids = logits[:, :num_experts].argmax(-1, keepdim=True)
    else:
        ids = flat(routing.expert_ids)
        ids = torch.where(ids < num_experts, ids, -1)
    return BlockObserved(
        log_p=torch.log_softmax(log_p[:, :num_experts], dim=-1),
        logits=logits[:, :num_experts],
        chosen=ids,
        sequences=flat(sequences),
        labels=None,
        chances=None if routing.chances is None else flat(routing.chances)[:, :num_experts],
        mass=mass,
        counts=counts,
    )


def _null_rate(choice: Choice, valid: Tensor | None, config: MoEConfig, num_experts: int) -> Tensor:
    """(share − target)²: the share of filled slots, with the gradient of the mean probability."""
    routing = choice.routing
    assert choice.log_p is not None
    assert routing.expert_ids is not None
    assert config.null_target is not None
    chance = torch.exp(choice.log_p[..., num_experts:].logsumexp(-1) - choice.log_p.logsumexp(-1))
    kept = torch.ones_like(chance) if valid is None else valid.to(chance.dtype)
    soft = (chance * kept).sum() / kept.sum().clamp_min(1)
    filled = (routing.expert_ids >= 0).sum().clamp_min(1)
    share = (routing.expert_ids >= num_experts).sum() / filled
    return (share + soft - soft.detach() - config.null_target).square()


def _mean_over_ranks(value: Tensor, tokens: int) -> Tensor:
    """The mean over the tokens of all ranks."""
    if not distributed():
        return value
    whole = over_ranks(value.new_tensor(float(tokens)))
    return over_ranks(value * tokens) / whole.clamp_min(1)


def _shares(coverage: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each token's share of its sequence's weight [B, T], and the sequences' numbers of tokens [B]."""
    kept = torch.ones_like(coverage) if valid is None else valid.to(coverage.dtype)
    coverage = coverage * kept
    return coverage / coverage.sum(1, keepdim=True).clamp_min(TINY), kept.sum(1)


def _coverage_cv2(coverage: Tensor, valid: Tensor | None) -> Tensor:
    shares, tokens = _shares(coverage, valid)
    each = tokens * shares.square().sum(1) - 1
    return (each * tokens).sum() / tokens.sum().clamp_min(1)


def _coverage_entropy(coverage: Tensor, valid: Tensor | None) -> Tensor:
    shares, tokens = _shares(coverage, valid)
    entropy = -(shares * shares.clamp_min(TINY).log()).sum(1)
    each = tokens.clamp_min(1).log() - entropy
    return (each * tokens).sum() / tokens.sum().clamp_min(1)


_COVERAGE: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "importance_cv2": _coverage_cv2,
    "balance_entropy": _coverage_entropy,
}
