"""MoEBlock beside MoEfy's dense formulation, transformers' Mixtral block and one dense expert; forward and backward.

Usage: python scripts/benchmarks/moe.py [--quick] [--rounds N] [--out FOLDER] [PART …]

Parts: dense, mixtral, table, small, memory; all of them by default. One process, one thread on a CPU, interleaved; the
least of the rounds, in CPU time. Leaves moe.md and moe.json in outputs/benchmarks/. `--quick`: fewer experts, tokens
and rounds, to see that it runs.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from measuring import Row, milliseconds, saved_bytes, timed, write
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from mole.moe import MoEBlock, MoEConfig, MoERouterConfig
from mole.moe.dispatch.fitting import fitness


@dataclass(frozen=True)
class Setting:
    tokens: int
    width: int
    hidden: int
    quick: bool
    rounds: int


class Gated(nn.Module):
    """An expert of Mixtral: down(silu(gate x) ⊙ up x)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def block_of(
    experts: int, k: int, make: Callable[[], nn.Module], backend: str = "auto", share: bool = False
) -> MoEBlock:
    router = MoERouterConfig(noise=None, losses={}, norm_topk=share and k > 1)
    return MoEBlock(make, config=MoEConfig(num_experts=experts, k=k, router=router, backend=backend))


class Dense(nn.Module):
    """What MoEfy does: every expert on all tokens, those that did not choose it at zero."""

    def __init__(self, block: MoEBlock):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        p = torch.softmax(x @ self.block.router.weight.T, dim=-1)
        chosen = torch.zeros_like(p).scatter(-1, p.topk(self.block.config.k, dim=-1).indices, 1.0)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.block.experts):
            mask = chosen[..., index, None]
            y = y + mask * p[..., index, None] * expert(x * mask)
        return y


def step(module: nn.Module, x: Tensor, out: Tensor) -> None:
    """Forward and backward, with gradients of x and of all parameters."""
    module.zero_grad()
    x.grad = None
    y = module(x)
    (y[0] if isinstance(y, tuple) else y).backward(out)


def steps(modules: dict[str, nn.Module], tokens: int, width: int) -> dict[str, Callable[[], None]]:
    x, out = torch.randn(1, tokens, width, requires_grad=True), torch.randn(1, tokens, width)
    return {name: partial(step, module, x, out) for name, module in modules.items()}


def measured(run: Setting, modules: dict[str, nn.Module], tokens: int, width: int) -> dict[str, float]:
    return timed(steps(modules, tokens, width), run.rounds, min)


# ---- parts
def dense(run: Setting) -> list[Row]:
    """Beside the dense formulation, and how cost grows with the experts at equal k."""
    rows, own = [], {}
    for experts, goal in ((8, 3.0), (64, 10.0)) if not run.quick else ((8, 3.0),):
        block = block_of(experts, 2, partial(mlp, run.width, run.hidden))
        own[experts] = block
        found = timed(steps({"dense": Dense(block)}, run.tokens, run.width), 1, min)
        found |= measured(run, {"auto": block}, run.tokens, run.width)
        name = f"{run.tokens} tokens, d={run.width}, E={experts}, k=2: dense / auto"
        rows.append(Row("dense", name, found["dense"] / found["auto"], "x", goal, detail=milliseconds(found)))
    if len(own) == 2:
        found = measured(run, {f"E={experts}": block for experts, block in own.items()}, run.tokens, run.width)
        rows.append(Row("dense", "k=2: E=64 / E=8", found["E=64"] / found["E=8"], "x", 1.6, True, milliseconds(found)))
    return rows


def mixtral(run: Setting) -> list[Row]:
    """Beside transformers' block with eager experts, of the same weights."""
    rows = []
    for experts, goal in ((8, 1.0), (64, 2.0)) if not run.quick else ((8, 1.0),):
        config = MixtralConfig(
            hidden_size=run.width,
            intermediate_size=run.hidden,
            num_local_experts=experts,
            num_experts_per_tok=2,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        config._experts_implementation = "eager"
        theirs = MixtralSparseMoeBlock(config)
        ours = block_of(experts, 2, partial(Gated, run.width, run.hidden), share=True)
        with torch.no_grad():
            theirs.gate.weight.copy_(ours.router.weight)
            for index, expert in enumerate(ours.experts):
                both = torch.cat([expert.get_parameter("gate_proj.weight"), expert.get_parameter("up_proj.weight")])
                theirs.experts.gate_up_proj[index].copy_(both)
                theirs.experts.down_proj[index].copy_(expert.get_parameter("down_proj.weight"))
            x = torch.randn(1, 64, run.width)
            one, other = theirs(x), ours(x)
            torch.testing.assert_close(one[0] if isinstance(one, tuple) else one, other, atol=1e-4, rtol=1e-3)
        found = measured(run, {"mixtral": theirs, "auto": ours}, run.tokens, run.width)
        name = f"{run.tokens} tokens, d={run.width}, E={experts}, k=2: Mixtral / auto"
        rows.append(Row("mixtral", name, found["mixtral"] / found["auto"], "x", goal, detail=milliseconds(found)))
    return rows


def backends_of(block: MoEBlock, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The same experts and router under each back-end that can run them."""
    can = fitness(block._plan(), torch.zeros(1, block.input_dim or 1))
    found: dict[str, nn.Module] = {}
    for name in names:
        if not can.can(name):
            continue
        twin = copy.copy(block)  # the same modules
        twin.config = replace(block.config, backend=name)
        found[name] = twin
    return found


def table(run: Setting) -> list[Row]:
    """As multiples of one dense expert on all tokens: 1024 tokens, 256 → 512 → 256."""
    rows, own = [], {}
    cases = ((4, 1), (8, 1), (8, 2), (16, 2), (32, 2), (8, 4)) if not run.quick else ((4, 1),)
    for experts, k in cases:
        block = block_of(experts, k, partial(mlp, 256, 512))
        modules = {"one": mlp(256, 512), "auto": block, **backends_of(block, ("loop", "grouped", "vmap"))}
        found = measured(run, modules, 1024, 256)
        masked = timed(steps({"masked": Dense(block)}, 1024, 256), 1, min)["masked"]
        own[experts, k] = found["auto"] / found["one"]
        best = min(found[name] for name in ("loop", "grouped", "vmap"))
        detail = f"{block.backend_used}; {milliseconds(found)}, masked {1e3 * masked:.1f} ms"
        rows.append(Row("table", f"E={experts}, k={k}: auto / one", own[experts, k], "x", 1.6 * k, True, detail))
        rows.append(Row("table", f"E={experts}, k={k}: auto / best", found["auto"] / best, "x", 1.25, True))
        if (experts, k) in ((8, 2), (32, 2)):
            goal = 2.2 if experts == 8 else 7.0
            rows.append(Row("table", f"E={experts}, k={k}: masked / auto", masked / found["auto"], "x", goal))
    if not run.quick:
        rows.append(Row("table", "k=2: E=32 / E=8", own[32, 2] / own[8, 2], "x", 1.4, True))
        rows.append(Row("table", "E=8: k=4 / k=1", own[8, 4] / own[8, 1], "x", 4.5, True))
    return rows


def small(run: Setting) -> list[Row]:
    """Few tokens or small experts, low-rank ones, and one expert beside the bare module."""

    def low_rank() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 8, bias=False), nn.Linear(8, 512, bias=False))

    cases = [
        ("N=256, d=64, E=64, k=2", 256, 64, 64, 2, partial(mlp, 64, 128)),
        ("N=16, d=256, E=64, k=2", 16, 256, 64, 2, partial(mlp, 256, 512)),
        ("rank 8, N=1024, d=512, E=8, k=2", 1024, 512, 8, 2, low_rank),
        ("rank 8, N=1024, d=512, E=32, k=2", 1024, 512, 32, 2, low_rank),
    ]
    rows = []
    for name, tokens, width, experts, k, make in cases[: 1 if run.quick else None]:
        block = block_of(experts, k, make)
        names = ("loop", "grouped", "vmap", "stacked") if experts < 64 else ("loop", "grouped", "vmap")
        found = measured(run, {"auto": block, **backends_of(block, names)}, tokens, width)
        best = min(value for name, value in found.items() if name != "auto")
        detail = f"{block.backend_used}; {milliseconds(found)}"
        rows.append(Row("small", f"{name}: auto / best", found["auto"] / best, "x", 1.25, True, detail))
    one = block_of(1, 1, partial(mlp, 256, 512))
    found = measured(run, {"module": one.experts[0], "block": one}, 1024, 256)
    ratio = found["block"] / found["module"]
    rows.append(Row("small", "E=1, k=1: block / module", ratio, "x", 1.3, True, milliseconds(found)))
    return rows


def memory(run: Setting) -> list[Row]:
    """Bytes kept for the backward, at equal k."""
    kept = {}
    for experts in (8, 32):
        block = block_of(experts, 2, partial(mlp, 256, 512))
        x = torch.randn(1, 1024, 256, requires_grad=True)
        kept[experts] = saved_bytes(lambda block=block, x=x: block(x), block.parameters())
    ratio = kept[32] / kept[8]
    return [Row("memory", "k=2: bytes of E=32 / E=8", ratio, "x", 1.2, True, f"{kept[8]} and {kept[32]} bytes")]


PARTS = {"dense": dense, "mixtral": mixtral, "table": table, "small": small, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all by default")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = (256, 64, 128) if given.quick else (4096, 512, 1024)
    run = Setting(*size, given.quick, 1 if given.quick else given.rounds)
    rows = []
    for name in given.parts or PARTS:
        for row in PARTS[name](run):
            rows.append(row)
            print(row, flush=True)
    facts = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "rounds": run.rounds}
    write(rows, facts, "# A mixture of experts out of modules", given.out / "moe")


if __name__ == "__main__":
    main()
