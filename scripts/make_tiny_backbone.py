"""Make the embedded backbone: a byte-level tokenizer and a small Llama, pre-trained on text that this script generates.

    python scripts/make_tiny_backbone.py [--folder mole/backbones/tiny] [--seed 0] [--steps 2200] …

Every line of the text asks for one of SKILLS in its instruction word, before or behind a quoted input and among random
words, and gives the answer. Lines without an instruction word are answered with "?". The generated tasks of
`mole/data/generated.py` ask for some of the skills in other words, so the backbone answers them with "?" too until an
expert connects the new words with the skill. The same seed, thread count and versions give the same bytes.
"""

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
CONSONANTS = "".join(letter for letter in LETTERS if letter not in VOWELS)
UNKNOWN = "?"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content + eos_token }}{% else %}{{ message.content + '\\n' }}{% endif %}{% endfor %}"
)


Skill = Callable[[random.Random, int], tuple[str, str]]  # (generator, letters of the longest word) → (input, answer)


def word(rng: random.Random, shortest: int, longest: int) -> str:
    """A word of consonants and vowels in turn, or, one time in three, of any letters."""
    length = rng.randint(shortest, longest)
    if rng.random() < 1 / 3:
        return "".join(rng.choices(LETTERS, k=length))
    first = rng.random() < 0.3
    return "".join(rng.choice(VOWELS if (i % 2 == 0) == first else CONSONANTS) for i in range(length))


def on_word(answer: Callable[[str], str]) -> Skill:
    """A skill whose input is one word."""

    def make(rng: random.Random, longest: int) -> tuple[str, str]:
        given = word(rng, 3, longest)
        return given, answer(given)

    return make


def add(rng: random.Random, longest: int) -> tuple[str, str]:
    a, b = rng.randint(0, 49), rng.randint(0, 49)
    return f"{a}+{b}", str(a + b)


def heads(rng: random.Random, longest: int) -> tuple[str, str]:
    words = [word(rng, 2, 4) for _ in range(rng.choice((2, 3, 3)))]
    return " ".join(words), "".join(w[0] for w in words)


# instruction word → (share of the text, skill)
SKILLS: dict[str, tuple[float, Skill]] = {
    "copy": (1.0, on_word(str)),
    "reverse": (1.5, on_word(lambda w: w[::-1])),
    "upper": (1.0, on_word(str.upper)),
    "sort": (2.0, on_word(lambda w: "".join(sorted(w)))),
    "next": (1.5, on_word(lambda w: "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in w))),
    "drop": (1.5, on_word(lambda w: "".join(c for c in w if c not in VOWELS) or "-")),
    "last": (0.5, on_word(lambda w: w[-1])),
    "heads": (1.3, heads),
    "add": (2.5, add),
}
NO_SKILL = 1.2


def filler(rng: random.Random, count: int) -> str:
    """`count` random words, each with a space behind it."""
    words = []
    for _ in range(count):
        made = word(rng, 1, 6)
        words.append((made.capitalize() if rng.random() < 0.3 else made) + rng.choice(("", "", "", ",")) + " ")
    return "".join(words)


def line(rng: random.Random, longest: int) -> tuple[str, str, str]:
    """(instruction word, prompt, answer)."""
    verbs = list(SKILLS)
    verb = rng.choices([*verbs, UNKNOWN], [*(SKILLS[v][0] for v in verbs), NO_SKILL])[0]
    given, answer = SKILLS[rng.choice(verbs) if verb == UNKNOWN else verb][1](rng, longest)
    before, after = filler(rng, rng.choice((0, 0, 0, 1, 2))), filler(rng, rng.choice((0, 0, 0, 1, 2)))
    quoted = f'"{given}" '
    if verb == UNKNOWN:
        text, answer = (before or filler(rng, 1)) + quoted + after, UNKNOWN
    elif rng.random() < 0.7:
        text = f"{before}{verb} {quoted}{after}"
    else:
        text = f"{before}{quoted}{verb} {after}"
    text = text.strip() + rng.choice(("", "", ".", "?", "!"))
    return verb, (text[0].upper() + text[1:] if rng.random() < 0.2 else text) + "\n", answer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and three special ones; a text begins with <bos>."""
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(vocabulary: int, layers: int, width: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings, its weights drawn from torch's generator."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config)


def batch(tokenizer: PreTrainedTokenizerFast, lines: list[tuple[str, str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, T], labels [B, T]) of the lines; only answers are supervised."""
    rows = []
    for _, prompt, answer in lines:
        head, tail = tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]
        rows.append((head + tail + [2], [-100] * len(head) + tail + [2]))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for _, row in rows])
    return ids, labels


def batches_of_like_length(rng: random.Random, longest: int, size: int) -> list[list[tuple[str, str, str]]]:
    """Sixteen batches of lines in random order, each of lines of about one length, so that few tokens are padding."""
    lines = sorted((line(rng, longest) for _ in range(16 * size)), key=lambda made: len(made[1]) + len(made[2]))
    pool = [lines[begin : begin + size] for begin in range(0, len(lines), size)]
    rng.shuffle(pool)
    return pool


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the supervised tokens; the head is computed at those positions only."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    chosen = wanted != -100
    return functional.cross_entropy(model.lm_head(hidden[chosen]), wanted[chosen])


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, lines: list) -> dict[str, float]:
    """Share of answers, per instruction word, all of whose tokens are the likeliest ones given those before."""
    right: dict[str, list[bool]] = {}
    ids, labels = batch(tokenizer, lines)
    guesses = model(input_ids=ids).logits[:, :-1].argmax(-1)
    good = ((guesses == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1)
    for (verb, _, _), fine in zip(lines, good.tolist(), strict=True):
        right.setdefault(verb, []).append(fine)
    return {verb: sum(fine) / len(fine) for verb, fine in sorted(right.items())}


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is replaced by the nearest orthogonal one (Jordan et al., 2024), in float32.

    torch's own works in bfloat16, which a CPU emulates slowly. Updates have the root mean square 0.2, like AdamW's,
    so that both take the same learning rate.
    """

    def __init__(self, matrices: list[torch.Tensor], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                gradients = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
                mean = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(gradients))
                mean.mul_(group["momentum"]).add_(gradients)
                update = orthogonal(gradients + group["momentum"] * mean) * (0.2 * max(shape) ** 0.5)
                torch._foreach_sub_(matrices, list((group["lr"] * update).unbind()))


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """U Vᵀ of each matrix U S Vᵀ in [N, rows, columns], roughly: five steps of a quintic Newton-Schulz iteration."""
    wide = matrices.transpose(1, 2) if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x if wide is matrices else x.transpose(1, 2)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a half cosine to nothing."""
    warmup = min(100, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> float:
    """Pre-train `model` in place; returns the mean loss of the last 100 steps."""
    rng, held_out = random.Random(f"text {options.seed}"), random.Random(f"held-out text {options.seed}")
    probe = [line(held_out, 6) for _ in range(600)]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or ".layers." not in name]
    optimizers = [
        Muon(matrices, lr=options.learning_rate),
        torch.optim.AdamW(others, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    losses: list[float] = []
    pool: list[list[tuple[str, str, str]]] = []
    began = time.monotonic()
    for step in range(options.steps):
        if not pool:
            pool = batches_of_like_length(rng, longest=4 if step < options.steps // 5 else 6, size=options.batch_size)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options.steps, options.learning_rate)
        loss = loss_of(model, *batch(tokenizer, pool.pop()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % options.report_every == 0 or step + 1 == options.steps:
            recent = sum(losses[-100:]) / len(losses[-100:])
            scores = " ".join(f"{verb} {share:.2f}" for verb, share in exact_match(model, tokenizer, probe).items())
            copy.deepcopy(model).half().save_pretrained(options.folder)
            print(f"step {step + 1} {time.monotonic() - began:.0f} s loss {recent:.4f} | {scores}", flush=True)
    return sum(losses[-100:]) / len(losses[-100:])


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "mole" / "backbones" / "tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=8e-3)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report-every", type=int, default=100)
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), options.layers, options.width)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    loss = train(model, tokenizer, options)
    tokenizer.save_pretrained(options.folder)
    print(json.dumps({"loss": round(loss, 4)}))


if __name__ == "__main__":
    main()
