"""Adapters and multi-adapters on an encoder: what a training step costs beside that of a head alone, and of everything.

Usage: python scripts/benchmarks/multi_adapter.py [--rounds N] [--out FOLDER]

A RoBERTa of 4 layers and width 256 with random weights, batches of 16 × 64 tokens; forward and backward, one process,
one thread, interleaved, the least of the rounds in CPU time. Leaves multi_adapter.md and multi_adapter.json in
outputs/benchmarks/.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Row, milliseconds, timed, write
from transformers import RobertaConfig, RobertaForSequenceClassification

from mole import adapters
from mole.adapters import HoulsbyConfig
from mole.mixtures import MultiExpertModel
from mole.routers import MultiAdapterConfig
from mole.routing.weights_log import WeightsLog

COUNTS = (2, 4, 8, 16)
BATCH = {
    "input_ids": torch.randint(5, 500, (16, 64), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(16, 64, dtype=torch.long),
}


def encoder() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=500, pad_token_id=1, **sizes, **dropout))


def step(model: Any) -> Callable[[], None]:
    """Forward and backward, gradients dropped before."""
    model.train()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(**BATCH).logits.square().mean().backward()

    return run


def adapted() -> Any:
    model = encoder()
    adapters.attach(model, HoulsbyConfig(size=32), seed=0, trained=["classifier"])
    return model


def through() -> Any:
    """The head alone, with gradients through the frozen backbone: what any adapter below it needs."""
    model = encoder().requires_grad_(False)
    model.classifier.requires_grad_(True)
    model.roberta.embeddings.LayerNorm.requires_grad_(True)
    return model


def mixed(count: int) -> Any:
    experts = {}
    for index in range(count):
        model = encoder()
        adapters.attach(model, HoulsbyConfig(size=32), seed=index)
        experts[f"e{index}"] = adapters.detach(model)
    options = {"heads": ("classifier",), "modules_to_save": "train"}
    return MultiExpertModel(encoder(), experts, MultiAdapterConfig(), train="router", **options)


def logging_cost(model: Any, folder: Path, calls: int) -> float:
    """CPU seconds of one logged step."""
    router = model.router
    log = WeightsLog(
        folder / "weights.jsonl",
        branches=list(next(iter(router.weights_by_group().values()))),
        sites=list(router.sites),
        sets=router.groups,
    )
    steps = iter(range(10**9))

    def run() -> None:
        for _ in range(calls):
            log.see(next(steps), 0.0, router.weights_by_group())

    return timed({"log": run}, 3, min)["log"] / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="outputs/benchmarks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    everything = copy.deepcopy(encoder()).requires_grad_(True)
    mixtures = {count: mixed(count) for count in COUNTS}
    cases = {"everything": everything, "through": through(), "adapter": adapted()}
    cases |= {f"K={count}": model for count, model in mixtures.items()}
    found = timed({name: step(model) for name, model in cases.items()}, args.rounds, min)
    trained = sum(p.numel() for p in cases["adapter"].parameters() if p.requires_grad)
    detail = milliseconds(found)
    rows = [
        Row("frozen backbone", "adapter / everything", found["adapter"] / found["everything"], "x", 0.85, True, detail),
        Row("adapter", "adapter / head through backbone", found["adapter"] / found["through"], "x", 1.25, True),
        Row("multi-adapter", "K=16 / K=4", found["K=16"] / found["K=4"], "x", 4.6, True),
        Row("adapter", "numbers that an expert holds", trained, "", None),
    ]
    with tempfile.TemporaryDirectory() as folder:
        share = logging_cost(mixtures[4], Path(folder), 50) / found["K=4"]
    # By default a thousandth of the steps' lines: one a step in runs of up to a thousand.
    rows.append(Row("log of weights", "a logged step / a step, K=4", share, "x", 0.01, True))
    head = "# Multi-adapters: RoBERTa of 4 layers, width 256; 16 × 64 tokens, forward and backward, one thread"
    facts = {"rounds": args.rounds, "torch": torch.__version__}
    write(rows, facts, head, Path(args.out) / "multi_adapter")
    print("\n".join(map(str, rows)))


if __name__ == "__main__":
    main()
