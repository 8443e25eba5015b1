"""The kernels of one mixed linear module beside a loop over its experts, mttl's formulation and PEFT's layers.

Usage: python scripts/benchmarks/mixture.py [--quick] [--rounds N] [--out FOLDER] [PART …]

Parts: dense, top_2, grid, alone, arrow, xlora, poly, memory, examples; all of them by default. One process, one thread
(device cpu; a GPU if --device cuda), interleaved; the least of the rounds. Forward and backward, with gradients of x
and of the weights, unless a row says otherwise. Leaves mixture.md and mixture.json in outputs/benchmarks/. `--quick`:
fewer experts, tokens and rounds, to see that it runs.
"""

from __future__ import annotations

import argparse
import platform
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import peft
import torch
from measuring import Row, milliseconds, saved_bytes, write
from mixture_peers import mttl_after, mttl_before, peft_arrow, peft_poly, peft_xlora
from mixture_settings import Case, Run, Setting, linear, lora_weights, several

from mole.kernels import KERNELS, parameters, pick
from mole.mixtures.banks import LoraBank
from mole.routers.arrow import ArrowConfig, ArrowRouter
from mole.routers.base import MixtureShape
from mole.routing import Frame


# ---- parts
def dense(run: Run) -> list[Row]:
    """Every expert at every token: the stacked kernel beside a loop over the experts."""
    rows = []
    for experts, goal in ((8, 2.0), (64, 8.0)) if not run.quick else ((8, 2.0),):
        for trains in (False, True):
            case = Case(replace(run.start, experts=experts, chosen=0), run.device, trains)
            steps = case.steps("loop", "stacked", "auto")
            if experts <= 64 and not trains:
                steps["mttl after"] = case.step(lambda c=case: mttl_after(c.x, c.stack, c.weights, c.base_out))
                steps["mttl before"] = case.step(lambda c=case: mttl_before(c.x, c.stack, c.weights, c.base_out))
            found = run.time(steps)
            name = f"E={experts}, {'experts train' if trains else 'frozen experts'}, loop / stacked"
            rows.append(Row("dense", name, found["loop"] / found["stacked"], "x", goal, detail=milliseconds(found)))
    return rows


def top_2(run: Run) -> list[Row]:
    """Two experts per token: what auto takes beside the best, and what grows with the experts."""
    rows, grouped = [], {}
    for trains in (False, True):
        for experts in (8, 16) if run.quick else (8, 16, 32, 64, 128, 256):
            case = Case(replace(run.start, experts=experts), run.device, trains)
            names = ("loop", "stacked", "grouped") if experts <= 64 else ("stacked", "grouped")
            steps = case.steps(*names, "auto")
            if experts in (8, 64) and not trains:
                steps["mttl after"] = case.step(lambda c=case: mttl_after(c.x, c.stack, c.dense(), c.base_out))
            found = run.time(steps)
            best = min(found[name] for name in names)
            kind = f"E={experts}, {'experts train' if trains else 'frozen experts'}"
            detail = f"{pick(case.x, case.stack, case.weights, case.ids)}; {milliseconds(found)}"
            rows.append(Row("top-2", f"{kind}, auto / best", found["auto"] / best, "x", 1.1, True, detail))
            if experts == 64:
                ratio = found["grouped"] / found["loop"]
                rows.append(Row("top-2", f"{kind}, grouped / loop", ratio, "x", 0.35, True))
            grouped[experts, trains] = found["grouped"]
            if experts == 256:
                all_of_them = Case(replace(run.start, experts=256, chosen=0), run.device, trains)
                stacked = run.time(all_of_them.steps("stacked"))["stacked"]
                growth = found["grouped"] / grouped[8, trains]
                rows += [
                    Row("top-2", f"{kind}, grouped / grouped of E=8", growth, "x", 3.0, True),
                    Row("top-2", f"{kind}, dense stacked / grouped", stacked / found["grouped"], "x", 3.0),
                ]
    return rows


GRID = (
    Setting(2048, 768, 8, 8, 2),
    Setting(2048, 768, 6, 8, 2),
    Setting(2048, 768, 8, 64, 2),
    Setting(512, 2048, 16, 16, 2),
    Setting(512, 1024, 4, 32, 1),
    Setting(512, 1024, 4, 32, 4),
    Setting(512, 512, 32, 8, 2),
    Setting(256, 1024, 8, 16, 2),
    Setting(32, 1024, 8, 16, 2),
    Setting(32, 1024, 8, 128, 2),
    Setting(1, 1024, 8, 16, 2),
    Setting(1, 1024, 8, 256, 2),
)


def grid(run: Run) -> list[Row]:
    """What auto takes beside the best of loop, stacked and grouped, over shapes of modules and batches."""
    rows = []
    for setting in GRID[-4:] if run.quick else GRID:
        for recording in (True, False):
            case = Case(setting, run.device)
            names = ("loop", "stacked", "grouped")
            steps = case.steps(*names, "auto")
            if not recording:
                steps = {name: torch.no_grad()(lambda c=case, name=name: c.forward(name)) for name in steps}
            repeated = 1 if setting.tokens > 64 else 20
            found = run.time({name: several(step, repeated) for name, step in steps.items()})
            best = min(found[name] for name in names)
            taken = pick(case.x, case.stack, case.weights, case.ids)
            part = "grid" if recording else "grid, forward alone"
            times = {name: value / repeated for name, value in found.items()}
            detail = f"{taken}; {milliseconds(times)}"
            rows.append(Row(part, f"{setting}, auto / best", found["auto"] / best, "x", 1.3, True, detail))
    return rows


def alone(run: Run) -> list[Row]:
    """The module with its experts beside the bare module, 256 tokens, four experts each; forward alone."""
    rows, goals = [], {8: 1.3, 64: 1.9, 256: 4.0}
    for experts in (8,) if run.quick else goals:
        setting = replace(run.start, tokens=256, rank=4, experts=experts, chosen=4)
        case, base = Case(setting, run.device), linear(setting.d, run.device)
        x, weights = case.x.detach(), case.dense().detach()

        def over(mix, base=base, case=case, x=x, weights=weights):
            return torch.no_grad()(lambda: mix(x, case.stack, weights, base(x)))

        cases = {"bare": torch.no_grad()(lambda base=base, x=x: base(x)), "stacked": over(KERNELS["stacked"])}
        cases |= {"mttl before": over(mttl_before), "mttl after": over(mttl_after)}
        found = run.time({name: several(one, 5) for name, one in cases.items()})
        for name, goal in (("stacked", goals[experts]), ("mttl before", None), ("mttl after", None)):
            detail = milliseconds({k: v / 5 for k, v in found.items()}) if name == "stacked" else ""
            case_name = f"r=4, E={experts}, K=4, {name} / bare module"
            rows.append(Row("forward", case_name, found[name] / found["bare"], "x", goal, True, detail))
    return rows


def arrow(run: Run) -> list[Row]:
    """Arrow from x to the output, with the same prototypes; forward and backward to x."""
    rows = []
    for experts in (16,) if run.quick else (16, 64):
        setting = replace(run.start, tokens=run.start.tokens // 4, experts=experts, chosen=4)
        case, base = Case(setting, run.device), linear(setting.d, run.device)
        weights = lora_weights(case.stack)
        shape = MixtureShape(tuple(map(str, weights)), ((),) * experts, ("0",), setting.d)
        router = ArrowRouter(ArrowConfig(), shape, input_dim=setting.d, sites=("0",))
        router.take_experts([weights])
        bank = LoraBank(weights, experts, dtype=torch.float32).to(run.device)
        router.to(run.device)

        def mine(x, base=base, bank=bank, router=router):
            return bank(base(x), x, router(x, Frame()))

        theirs = peft_arrow(base, case.stack, router.prototypes.detach().reshape(experts, -1), 4)
        far = (mine(case.x) - theirs(case.x)).abs().max().item()
        runs = {"mole": partial(mine, case.x), "PEFT": partial(theirs, case.x)}
        found = run.time({name: case.step(forward) for name, forward in runs.items()})
        kept = {name: saved_bytes(forward, case.stack[:2]) / 2**20 for name, forward in runs.items()}
        held = ", ".join(f"{name} {size:.1f} MiB" for name, size in kept.items())
        name = f"{setting.tokens} tokens, E={experts}, K=4"
        rows += [
            Row("Arrow", f"{name}, PEFT / mole", found["PEFT"] / found["mole"], "x", 2.0, detail=milliseconds(found)),
            Row("Arrow", f"{name}, kept, mole / PEFT", kept["mole"] / kept["PEFT"], "x", detail=held),
            Row("Arrow", f"{name}, largest difference", far, "", 1e-5, True),
        ]
    return rows


def xlora(run: Run) -> list[Row]:
    """X-LoRA's layer with all experts, and with two, for weights that are there."""
    rows = []
    for experts in (8,) if run.quick else (8, 32):
        for chosen in (0, 2):
            case = Case(replace(run.start, experts=experts, chosen=chosen), run.device)
            base = linear(run.start.d, run.device)
            theirs, weights = peft_xlora(base, case.stack), case.dense().detach().requires_grad_()

            def mine(case=case, base=base):
                name = pick(case.x, case.stack, case.weights, case.ids)
                return KERNELS[name](case.x, case.stack, case.weights, base(case.x), case.ids)

            def peers(case=case, theirs=theirs, weights=weights):
                return theirs(case.x, weights)

            far = (mine() - peers()).abs().max().item()
            runs = {"mole": mine, "PEFT": peers}
            found = run.time({name: case.step(forward) for name, forward in runs.items()})
            kept = {name: saved_bytes(forward, case.stack[:2]) / 2**20 for name, forward in runs.items()}
            held = ", ".join(f"{name} {size:.1f} MiB" for name, size in kept.items())
            name = f"E={experts}, K={chosen or experts}"
            goal = 2.0 if (experts, chosen) == (8, 0) else None
            ratio = kept["mole"] / kept["PEFT"]
            rows += [
                Row(
                    "X-LoRA",
                    f"{name}, PEFT / mole",
                    found["PEFT"] / found["mole"],
                    "x",
                    goal,
                    False,
                    milliseconds(found),
                ),
                Row("X-LoRA", f"{name}, kept, mole / PEFT", ratio, "x", 1.02 if goal else None, True, held),
                Row("X-LoRA", f"{name}, largest difference", far, "", 1e-5, True),
            ]
    return rows


def poly(run: Run) -> list[Row]:
    """Poly: one adapter mixed of all experts for each example; gradients of x and of the weights."""
    rows = []
    for experts in (8,) if run.quick else (8, 64):
        setting = replace(run.start, experts=experts, chosen=0, batch=8, by_example=True)
        case, base = Case(setting, run.device), linear(setting.d, run.device)
        logits = torch.randn(8, experts, generator=torch.Generator().manual_seed(2)).to(run.device)
        theirs, tasks = peft_poly(base, case.stack, logits), torch.arange(8, device=run.device)
        gates = torch.sigmoid(logits)
        weights = (gates / (gates.sum(-1, keepdim=True) + 1e-12))[:, None]
        stack = case.stack._replace(scales=case.stack.scales / setting.rank)

        def mine(case=case, base=base, stack=stack, weights=weights):
            return parameters(case.x, stack, weights, base(case.x))

        def peers(case=case, theirs=theirs, tasks=tasks):
            return theirs(case.x, tasks)

        def tokens(case=case, base=base, stack=stack, weights=weights):
            return mttl_before(case.x, stack, weights.expand(-1, case.x.shape[1], -1), base(case.x))

        far = (mine() - peers()).abs().max().item()
        found = run.time({"mole": case.step(mine), "PEFT": case.step(peers), "mttl, per token": case.step(tokens)})
        rows += [
            Row("Poly", f"E={experts}, PEFT / mole", found["PEFT"] / found["mole"], "x", detail=milliseconds(found)),
            Row("Poly", f"E={experts}, largest difference", far, "", 1e-5, True),
        ]
    return rows


def memory(run: Run) -> list[Row]:
    """What a forward with two experts per token keeps for its backward, by how many experts there are."""
    rows = []
    for trains in (False, True):
        kept = {}
        for experts in (16, 32) if run.quick else (8, 64, 256):
            case = Case(replace(run.start, experts=experts), run.device, trains)
            own = (*case.stack[:3], *case.stack[4:])
            kept[experts] = saved_bytes(lambda c=case: c.forward("grouped"), own) / 2**20
        (few, small), *_, (many, large) = kept.items()
        detail = ", ".join(f"E={experts} {size:.2f} MiB" for experts, size in kept.items())
        name = f"grouped, {'experts train' if trains else 'frozen experts'}, E={many} / E={few}"
        rows.append(Row("kept for the backward", name, large / small, "x", 1.01, True, detail))
    return rows


def examples(run: Run) -> list[Row]:
    """One expert per example: the segments kernel, and what auto takes."""
    rows = []
    for batch, experts in ((8, 8), (8, 64), (64, 64)):
        setting = replace(run.start, experts=experts, chosen=1, batch=batch, by_example=True)
        case = Case(setting, run.device)
        names = ("stacked", "grouped", "segments")
        found = run.time(case.steps(*names, "auto"))
        best, taken = min(found[name] for name in names), pick(case.x, case.stack, case.weights, case.ids)
        detail = f"{taken}; {milliseconds(found)}"
        rows.append(Row("per example", f"{setting}, auto / best", found["auto"] / best, "x", 1.3, True, detail))
    return rows


PARTS = {part.__name__: part for part in (dense, top_2, grid, alone, arrow, xlora, poly, memory, examples)}


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PEFT's own
    run = Run(options.quick, options.rounds or (2 if options.quick else 5), options.device)
    rows: list[Row] = []
    for name in options.parts or PARTS:
        for row in PARTS[name](run):
            rows.append(row)
            print(row, flush=True)
    cpu = platform.processor() or platform.machine()
    facts = {"peft": peft.__version__, "torch": torch.__version__, "cpu": cpu, "rounds": run.rounds}
    facts |= {"device": run.device, "module": str(run.start), "quick": run.quick}
    head = (
        "# Mixture kernels, beside a loop over experts, mttl's formulation and PEFT's layers\n\n"
        f"PEFT {facts['peft']}, torch {facts['torch']}; {cpu}, one thread, float32, {run.device}; least CPU time of "
        f"{run.rounds} interleaved rounds. One linear module, {run.start} unless a row says otherwise; forward and "
        "backward, gradients of x and of the weights."
    )
    write(rows, facts, head, options.out / "mixture")


if __name__ == "__main__":
    main()
