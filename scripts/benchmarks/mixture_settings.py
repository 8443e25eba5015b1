"""What scripts/benchmarks/mixture.py measures: one linear module, its experts, tokens and their routing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from measuring import timed
from torch import Tensor, nn

from mole.adapters import LoraWeights
from mole.kernels import KERNELS, LoraStack, over_all, pick


@dataclass(frozen=True)
class Setting:
    """One module of d → d features with `experts` of one rank, and tokens that choose `chosen` of them; 0: all."""

    tokens: int = 2048
    d: int = 1024
    rank: int = 8
    experts: int = 8
    chosen: int = 2
    batch: int = 1
    by_example: bool = False

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.tokens // self.batch}" if self.by_example else str(self.tokens)
        return f"{shape} tokens, d={self.d}, r={self.rank}, E={self.experts}, K={self.chosen or self.experts}"


class Case:
    """The numbers of a setting; `run(kernel)` is a forward and backward."""

    def __init__(self, setting: Setting, device: str, trains: bool = False):
        generator = torch.Generator().manual_seed(0)
        random = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
        s, rows = setting, setting.tokens // setting.batch
        total = s.experts * s.rank
        A, B = (random(total, s.d) / s.d**0.5, random(total, s.d) / s.d**0.5)
        self.stack = LoraStack(
            A.to(device).requires_grad_(trains),
            B.to(device).requires_grad_(trains).t(),
            torch.ones(s.experts, device=device),
            (s.rank,) * s.experts,
        )
        # As a bank has them.
        self.stack = self.stack._replace(columns=self.stack.column_experts(), spread=self.stack.spread_scales())
        self.x = random(s.batch, rows, s.d).to(device).requires_grad_()
        self.base_out, self.direction = (random(s.batch, rows, s.d).to(device) for _ in range(2))
        scores = random(s.batch, 1 if s.by_example else rows, s.experts).softmax(-1).to(device)
        self.ids = None
        if s.chosen:
            scores, self.ids = scores.topk(s.chosen, dim=-1)
        self.weights = scores.requires_grad_()

    def forward(self, name: str) -> Tensor:
        """By the kernel of that name; auto: the one that the bank would take."""
        name = pick(self.x, self.stack, self.weights, self.ids) if name == "auto" else name
        return KERNELS[name](self.x, self.stack, self.weights, self.base_out, self.ids)

    def dense(self) -> Tensor:
        """The weights over all experts."""
        return over_all(self.weights, self.ids, self.stack.num_experts)

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """Forward and backward."""

        def run() -> None:
            for leaf in (self.x, self.weights, self.stack.A):
                leaf.grad = None
            forward().backward(self.direction)
            if self.device == "cuda":
                torch.cuda.synchronize()

        return run

    @property
    def device(self) -> str:
        return self.x.device.type

    def steps(self, *names: str) -> dict[str, Callable[[], None]]:
        return {name: self.step(lambda name=name: self.forward(name)) for name in names}


@dataclass(frozen=True)
class Run:
    """How the benchmark was asked to run."""

    quick: bool
    rounds: int
    device: str

    def time(self, cases: dict[str, Callable[[], object]]) -> dict[str, float]:
        return timed(cases, self.rounds, min)

    @property
    def start(self) -> Setting:
        return Setting(tokens=256, d=256) if self.quick else Setting()


def linear(d: int, device: str) -> nn.Linear:
    """The module itself."""
    return nn.Linear(d, d, bias=False, device=device).requires_grad_(False)


def several(step: Callable[[], object], times: int) -> Callable[[], None]:
    """The step that often."""

    def run() -> None:
        for _ in range(times):
            step()

    return run


def lora_weights(stack: LoraStack) -> dict[int, LoraWeights]:
    """The experts of a stack, each with scale 1."""
    A, B = stack.blocks()
    return {e: LoraWeights(A=A[e].cpu(), B=B[e].t().cpu(), alpha=float(stack.ranks[0])) for e in range(len(A))}
