"""Problems for kernels, the naive sum that they must equal, and which routings each kernel serves."""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mole.kernels import KERNELS, LoraStack

RANKS = [(1,), (4, 4, 4), (1, 5, 17, 2), tuple(range(1, 18))]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


class Served(NamedTuple):
    """A routing of two examples and five tokens: the leading axes of its weights, and how many experts it chooses."""

    kernel: str
    shape: tuple[int, int]
    chosen: int | None  # None: weights of all, without ids

    def __str__(self) -> str:
        return f"{self.kernel}-{self.shape[0]}x{self.shape[1]}-{self.chosen or 'all'}"


EVERY_SHAPE = [(2, 5), (1, 1), (2, 1), (1, 5)]
SERVED = [Served(*case) for case in product(("loop", "stacked", "grouped"), EVERY_SHAPE, (None, 1, 2))]
SERVED += [Served("segments", shape, 1) for shape in ((2, 1), (1, 1))]
SERVED += [Served("folded", (1, 1), chosen) for chosen in (None, 1, 2)]
assert {case.kernel for case in SERVED} == set(KERNELS), "a kernel is not tested"


class Problem(NamedTuple):
    """Arguments of a kernel."""

    x: Tensor
    stack: LoraStack
    weights: Tensor
    base_out: Tensor
    ids: Tensor | None

    def tensors(self) -> list[Tensor]:
        """Those that may have a gradient."""
        return [self.x, self.stack.A, self.stack.B, self.weights, self.base_out]

    def of(self, x: Tensor, A: Tensor, B: Tensor, weights: Tensor, base_out: Tensor) -> "Problem":
        """The same with other tensors."""
        return Problem(x, self.stack._replace(A=A, B=B), weights, base_out, self.ids)

    def leaves(self) -> "Problem":
        """Copies with gradients."""
        return self.of(
            *[t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in self.tensors()]
        )

    def to(self, dtype: torch.dtype) -> "Problem":
        """In another dtype; weights and scales in at least float32."""
        x, A, B, _, base_out = (t.detach().to(dtype) for t in self.tensors())
        high = torch.promote_types(dtype, torch.float32)
        stack = self.stack._replace(A=A, B=B, scales=self.stack.scales.to(high))
        return Problem(x, stack, self.weights.detach().to(high), base_out, self.ids)

    def run(self, kernel) -> Tensor:
        return kernel(*self)


def problem(ranks, shape=(2, 5), chosen=None, *, batch=2, length=5, d_in=7, d_out=6, nobody=True) -> Problem:
    """Random, in float64. With `nobody` some ids are of no expert, and some are chosen twice."""
    generator = torch.Generator().manual_seed(len(ranks))
    random = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    scales = torch.rand(len(ranks), generator=generator, dtype=torch.float64)
    stack = LoraStack(random(sum(ranks), d_in), random(sum(ranks), d_out).t(), scales, tuple(ranks))
    ids = None
    if chosen is not None:
        low, high = (-1, len(ranks) + 1) if nobody else (0, len(ranks))
        ids = torch.randint(low, high, (*shape, chosen), generator=generator)
        ids.flatten()[0] = 0
    weights = random(*shape, chosen or len(ranks))
    return Problem(random(batch, length, d_in), stack, weights, random(batch, length, d_out), ids)


def naive(p: Problem) -> Tensor:
    """Each output vector by itself, in float64, without the base."""
    x, stack = p.x.double(), p.stack
    out = torch.zeros(*x.shape[:-1], stack.B.shape[0], dtype=torch.float64)
    count = p.weights.shape[-1]
    weights = p.weights.double().expand(*x.shape[:-1], count)
    ids = torch.arange(count).expand_as(weights) if p.ids is None else p.ids.expand_as(weights)
    slices = stack.slices()
    for b, t, k in product(*map(range, weights.shape)):
        expert = int(ids[b, t, k])
        if 0 <= expert < stack.num_experts:
            part = slices[expert]
            delta = stack.B[:, part].double() @ (stack.A[part].double() @ x[b, t])
            out[b, t] += weights[b, t, k] * stack.scales[expert].double() * delta
    return out


def gradients(p: Problem, kernel, wanted=(True,) * 5) -> list[Tensor | None]:
    """Gradients of a random function of the output; `wanted` says of which of x, A, B, weights, base_out."""
    tensors = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_(w)
        for t, w in zip(p.tensors(), wanted, strict=True)
    ]
    out = p.of(*tensors).run(kernel)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (out * direction.to(out.dtype)).sum().backward()
    return [tensor.grad for tensor in tensors]


class Largest(TorchDispatchMode):
    """The most numbers that any tensor held which was made in the body, views and the grad-free left aside."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, list | tuple) else [out]:
            if isinstance(made, Tensor):
                self.numbers = max(self.numbers, made.untyped_storage().nbytes() // made.element_size())
        return out
