"""Ways to generate from a trained X-LoRA mixture: exact, drafting with its first pass, gates refreshed or frozen.

For each: time per token relative to exact decoding (median over rounds, interleaved, CPU time), reads of the weights
per token, share of drafts accepted, and how far its distributions are from the exact ones on its own texts (KL in
nats per token) with the share of tokens that exact greedy decoding would have chosen as well.

Usage: python scripts/benchmarks/generation_modes.py <mixture> [--backbone tiny|<path>] [--prompts <text file>]
           [--tokens 128] [--rounds 3] [--out outputs/benchmarks/generation_modes.md]
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole import backbones, mixtures
from mole.backbones.load import PretrainedConfig
from mole.backbones.tiny_backbone import TinyConfig
from mole.mixtures import MultiExpertModel

PROMPT = 24  # tokens of each prompt
PROMPTS = (
    "Once upon a time there was a little girl who lived near the woods and",
    "KING RICHARD: What says my lord? I prithee, speak, and tell me how the day",
    "In 1914 the company was founded and the building was opened to the public",
    "Monsieur, je vous prie de croire que mon coeur est tout a vous",
)


@dataclass(frozen=True)
class Mode:
    """Settings of the router, and arguments of `generate`."""

    name: str
    settings: dict[str, Any]
    arguments: dict[str, Any]


MODES = (
    Mode("exact", {}, {}),
    Mode("self-speculation", {}, {"self_speculation": True}),
    *(Mode(f"refresh {n}", {"gate_refresh": n}, {}) for n in (2, 4, 8)),
    *(Mode(f"freeze after {k}", {"gate_freeze_after": k}, {}) for k in (1, 8, 32)),
)


class Subject:
    """The mixture in one mode at a time, over prompts of token ids."""

    def __init__(self, model: MultiExpertModel, prompts: list[Tensor], tokens: int):
        assert model.router is not None
        self.model, self.prompts, self.tokens = model.eval(), prompts, tokens
        self.router: Any = model.router
        self.exact = replace(self.router.config, gate_refresh=1, gate_freeze_after=None)

    def generate(self, mode: Mode, prompt: Tensor) -> Any:
        """Greedy, without an end, one prompt [1, T]."""
        self.router.configure(replace(self.exact, **mode.settings))
        try:
            return self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
                **mode.arguments,
            )
        finally:
            self.router.configure(self.exact)

    def seconds(self, mode: Mode) -> float:
        """CPU seconds for all prompts."""
        start = time.process_time()
        for prompt in self.prompts:
            self.generate(mode, prompt)
        return time.process_time() - start

    @torch.no_grad()
    def facts(self, mode: Mode) -> dict[str, float]:
        """Deviation from exact decoding, and what speculation reports."""
        divergence, agreed, tokens, reads, drafts, accepted = 0.0, 0, 0, 0, 0, 0
        for prompt in self.prompts:
            out = self.generate(mode, prompt)
            logits = self.model(input_ids=out.sequences, use_cache=False).logits[:, prompt.shape[1] - 1 : -1]
            want = torch.log_softmax(logits[0].double(), dim=-1)
            got = torch.log_softmax(torch.cat(out.scores).double(), dim=-1)
            divergence += float((want.exp() * (want - got)).sum())
            agreed += int((want.argmax(-1) == out.sequences[0, prompt.shape[1] :]).sum())
            tokens += self.tokens
            if report := (self.model.speculation if mode.arguments else None):
                reads, drafts, accepted = reads + report.reads, drafts + report.drafts, accepted + report.accepted
        decoded = tokens - len(self.prompts)  # the first token of each comes from the prompt's passes
        row = {"kl": divergence / tokens, "agreement": agreed / tokens, "reads": self._reads(mode)}
        return row | ({"reads": reads / decoded, "acceptance": accepted / drafts} if drafts else {})

    def _reads(self, mode: Mode) -> float:
        """Reads of the weights per decode step, without speculation: pass 2, and pass 1 where it runs."""
        if freeze := mode.settings.get("gate_freeze_after"):
            return 1 + min(freeze, self.tokens - 1) / (self.tokens - 1)
        return 1 + 1 / mode.settings.get("gate_refresh", 1)


def prompts_of(tokenizer: Any, file: str | None) -> list[Tensor]:
    """The first tokens of each line of `file`, or of a few of our own."""
    texts = PROMPTS if file is None else [t for t in Path(file).read_text("utf-8").splitlines() if t.strip()]
    return [torch.tensor([tokenizer(text)["input_ids"][:PROMPT]]) for text in texts]


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """The table."""
    lines = ["| mode | time per token / exact | reads per token | accepted | KL to exact | agreement |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in rows.items():
        accepted = f"{row['acceptance']:.0%}" if "acceptance" in row else ""
        cells = [name, f"{row['time']:.2f}", f"{row['reads']:.2f}", accepted, f"{row['kl']:.4f}"]
        lines.append(f"| {' | '.join(cells)} | {row['agreement']:.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--prompts")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="outputs/benchmarks/generation_modes.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = (
        TinyConfig(device="cpu") if given.backbone == "tiny" else PretrainedConfig(path=given.backbone, device="cpu")
    )
    backbone = backbones.load(config)
    model = mixtures.open_model(given.mixture, backbone)
    subject = Subject(model, prompts_of(backbone.tokenizer, given.prompts), given.tokens)
    rows = {mode.name: subject.facts(mode) for mode in MODES}
    times: dict[str, list[float]] = {mode.name: [] for mode in MODES}
    for _ in range(given.rounds):
        for mode in MODES:
            times[mode.name].append(subject.seconds(mode))
    for name, row in rows.items():
        row["time"] = statistics.median(t / e for t, e in zip(times[name], times["exact"], strict=True))
    print(markdown(rows))
    out = Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markdown(rows), encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
