"""X-LoRA in mole beside PEFT's XLoraModel: same weights, one process, one thread, interleaved; medians of CPU time.

Usage: python scripts/benchmarks/xlora.py [--quick] [--rounds N] [--out FOLDER] [PART …]

Parts: forward, step, memory, generate, flat, disabled, retained; all of them by default. Leaves xlora.md and xlora.json
in outputs/benchmarks/. `--quick` takes a fifth of the time: fewer experts, tokens and rounds.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from measuring import Row, saved_bytes, seconds, timed, write
from xlora_models import MIXED, TRAINED, Setting, in_mole, in_peft, llama

from mole.mixtures import MultiExpertModel
from mole.mixtures.two_pass.hidden_store import HiddenStore


def tokens(setting: Setting, rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, setting.vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


# ---- parts
def forward(quick: bool, rounds: int) -> list[Row]:
    """Logits of 2 x 128 tokens."""
    mine = in_mole(MIXED)
    theirs, ids = in_peft(MIXED, mine), tokens(MIXED, 2, 128)

    @torch.no_grad()
    def run(model):
        return model(input_ids=ids, use_cache=False).logits

    difference = (run(mine) - run(theirs)).abs().max().item()
    found = timed({"PEFT": lambda: run(theirs), "mole": lambda: run(mine)}, rounds)
    return [
        Row("forward", "2x128 tokens, PEFT / mole", found["PEFT"] / found["mole"], "x", 2.0, detail=seconds(found)),
        Row("forward", "largest difference of logits", difference, "", 1e-5, at_most=True),
    ]


def step_of(model, ids: torch.Tensor) -> Callable[[], None]:
    """Forward, loss, gradient of the router."""

    def run() -> None:
        model.zero_grad()
        model(input_ids=ids, use_cache=False, labels=ids).loss.backward()

    return run


def base_step(setting: Setting, ids: torch.Tensor) -> Callable[[], None]:
    """Two forwards and one backward of the backbone: what no X-LoRA can do without."""
    backbone = llama(setting).requires_grad_(False)

    def run() -> None:
        with torch.no_grad():
            backbone.model(input_ids=ids, use_cache=False)
        embedded = backbone.model.embed_tokens(ids).requires_grad_()
        backbone(inputs_embeds=embedded, use_cache=False, labels=ids).loss.backward()

    return run


def stored_step(mine: MultiExpertModel, ids: torch.Tensor, folder: Path) -> Callable[[], None]:
    """The step with the routing pass of these tokens in a store on disk, as from the second epoch on."""
    store, run = HiddenStore(folder), step_of(mine, ids)

    def stored() -> None:
        mine.hidden_store = store
        mine.train()
        run()
        mine.hidden_store = None
        mine.eval()

    return stored


def step(quick: bool, rounds: int) -> list[Row]:
    """A training step of the router on 2 x 256 tokens."""
    rows, goals = [], {8: 1.7, 32: 2.3}
    for experts in (4, 8) if quick else (4, 8, 16, 32):
        setting = replace(TRAINED, experts=experts)
        mine, ids = in_mole(setting), tokens(setting, 2, 256)
        theirs = in_peft(setting, mine)
        cases = {"PEFT": step_of(theirs, ids), "mole": step_of(mine, ids), "base": base_step(setting, ids)}
        with tempfile.TemporaryDirectory() as folder:
            cases["stored"] = stored_step(mine, ids, Path(folder))
            found = timed(cases, rounds)
        above = (found["PEFT"] - found["base"]) / (found["mole"] - found["base"])
        case = f"E={experts}, PEFT / mole"
        rows += [
            Row("step", case, found["PEFT"] / found["mole"], "x", goals.get(experts), detail=seconds(found)),
            Row("step above two backbone passes", case, above, "x", 2.5),
            Row(
                "step, routing pass stored",
                case,
                found["PEFT"] / found["stored"],
                "x",
                2.2 if experts == 8 else None,
            ),
        ]
    return rows


def memory(quick: bool, rounds: int) -> list[Row]:
    """What a forward of 2 x 256 tokens keeps for its backward."""
    rows = []
    for experts in (4, 8) if quick else (4, 8, 16, 32):
        setting = replace(TRAINED, experts=experts)
        mine, ids = in_mole(setting), tokens(setting, 2, 256)
        models = {"PEFT": in_peft(setting, mine), "mole": mine}
        found = {}
        for name, model in models.items():
            run = partial(model, input_ids=ids, use_cache=False)
            found[name] = saved_bytes(lambda run=run: run().logits, model.parameters()) / 2**20
        detail = ", ".join(f"{name} {value:.1f} MiB" for name, value in found.items())
        ratio = found["mole"] / found["PEFT"]
        rows.append(
            Row("saved for backward", f"E={experts}, mole / PEFT", ratio, "x", 1.0, at_most=True, detail=detail)
        )
    return rows


def generate(quick: bool, rounds: int) -> list[Row]:
    """64 tokens and 16 or 256 more; the longer one only once for PEFT, which computes everything anew."""
    rows = []
    mine = in_mole(MIXED, train="none")
    theirs, backbone, ids = in_peft(MIXED, mine), llama(MIXED), tokens(MIXED, 1, 64)
    for new, goal in ((16, 5.0),) if quick else ((16, 5.0), (256, 15.0)):
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        outputs: dict[str, torch.Tensor] = {}

        def run(name, model, outputs=outputs, options=options) -> None:
            outputs[name] = model.generate(input_ids=ids, **options)

        cases = {"mole": lambda: run("mole", mine), "backbone": lambda: run("backbone", backbone)}
        found = timed(cases, rounds)
        slow = 0 if new > 16 else max(1, rounds // 2)
        began = time.process_time()
        run("PEFT", theirs)
        found["PEFT"] = time.process_time() - began
        if slow:
            found["PEFT"] = timed({"PEFT": lambda: run("PEFT", theirs)}, slow)["PEFT"]
        same = torch.equal(outputs["PEFT"], outputs["mole"])
        case = f"64+{new} tokens"
        rows += [
            Row("generate", f"{case}, PEFT / mole", found["PEFT"] / found["mole"], "x", goal, detail=seconds(found)),
            Row("generate", f"{case}, same tokens as PEFT", float(same), "", 1.0),
            Row(
                "generate", f"{case}, mole / cached backbone", found["mole"] / found["backbone"], "x", 2.0, at_most=True
            ),
        ]
    return rows


def flat(quick: bool, rounds: int) -> list[Row]:
    """Time of a decode step: the last 32 of 256 against the first 32."""
    mine, new = in_mole(MIXED, train="none"), 96 if quick else 256
    ids = tokens(MIXED, 1, 64)
    ratios = []
    for _ in range(rounds):
        stamps = []
        with torch.no_grad():
            cache = mine(input_ids=ids, use_cache=True).past_key_values
            for position in range(new):
                began = time.process_time()
                cache = mine(
                    input_ids=ids[:, position % 64, None], past_key_values=cache, use_cache=True
                ).past_key_values
                stamps.append(time.process_time() - began)
        ratios.append(statistics.median(stamps[-32:]) / statistics.median(stamps[:32]))
    case = f"position {64 + new} / 64, per token"
    return [Row("decode", case, statistics.median(ratios), "x", 1.3, at_most=True)]


def disabled(quick: bool, rounds: int) -> list[Row]:
    """The mixture with its experts off against the backbone that was never wrapped."""
    mine, backbone, ids = in_mole(MIXED, train="none"), llama(MIXED), tokens(MIXED, 2, 128)

    @torch.no_grad()
    def off():
        with mine.experts_off():
            return mine(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def plain():
        return backbone(input_ids=ids, use_cache=False).logits

    equal = torch.equal(off(), plain())
    found = timed({"off": off, "backbone": plain}, rounds * 2)
    ratio = found["off"] / found["backbone"]
    return [
        Row("experts off", "2x128 tokens, mole / backbone", ratio, "x", 1.05, at_most=True, detail=seconds(found)),
        Row("experts off", "bit-equal to the backbone", float(equal), "", 1.0),
    ]


def retained(quick: bool, rounds: int) -> list[Row]:
    """Tensors alive after each of 50 optimizer steps, beside those of the first two."""
    setting = replace(TRAINED, layers=1, experts=4)
    mine, ids = in_mole(setting).train(), tokens(setting, 2, 32)
    optimizer = torch.optim.AdamW(mine.router.parameters(), lr=1e-3)
    run, counts = step_of(mine, ids), []
    for _ in range(10 if quick else 50):
        run()
        optimizer.step()
        gc.collect()
        counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    grown = (counts[-1] - counts[2]) / (len(counts) - 3)
    return [Row("training", "tensors more per optimizer step", grown, "", 0.0, at_most=True)]


PARTS = {part.__name__: part for part in (forward, step, memory, generate, flat, disabled, retained)}


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PEFT's and transformers' own
    transformers.logging.set_verbosity_error()
    rounds = options.rounds or (3 if options.quick else 7)
    rows = []
    for name in options.parts or PARTS:
        found = PARTS[name](options.quick, rounds)
        rows += found
        for row in found:
            print(row, flush=True)
    facts = {
        "peft": peft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": platform.processor() or platform.machine(),
        "rounds": rounds,
        "models": "; ".join(
            f"{s.layers} blocks of width {s.hidden}, E={s.experts}, r={s.rank}, 7 modules per block, router of depth "
            f"{s.depth} and size {s.size}, layerwise"
            for s in (MIXED, TRAINED)
        ),
    }
    head = (
        "# X-LoRA: mole and PEFT\n\n"
        f"PEFT {facts['peft']}, torch {facts['torch']}, transformers {facts['transformers']}; {facts['cpu']}, one "
        f"thread; medians of {facts['rounds']} interleaved rounds of CPU time. Models: {facts['models']}."
    )
    write(rows, facts, head, options.out / "xlora")


if __name__ == "__main__":
    main()
