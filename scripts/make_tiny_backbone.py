"""Make the embedded backbone: a byte-level tokenizer and a small Llama, pre-trained on text that this script generates.

    python scripts/make_tiny_backbone.py [--folder mole/backbones/tiny] [--seed 0] [--parts first second]

Every line of the text asks for one of SKILLS in its instruction word, before or behind a quoted input and among random
words, and gives the answer. Lines without an instruction word are answered with "?". The generated tasks of
`mole/data/generated.py` ask for some of the skills in other words, so the backbone answers them with "?" too until an
expert connects the new words with the skill. In the first part of the text every skill has inputs of its own kind; in
the second, inputs are of any kind, so that the instruction word alone tells the skill. The second part starts from the
weights as stored (float16). The same seed, thread count, processor type and versions give the same bytes.
"""

import argparse
import copy
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
VOWELS = "aeiou"
CONSONANTS = "".join(letter for letter in LETTERS if letter not in VOWELS)
UNKNOWN = "?"
LAYERS, WIDTH, BATCH_SIZE = 5, 128, 64
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content + eos_token }}{% else %}{{ message.content + '\\n' }}{% endif %}{% endfor %}"
)


def word(rng: random.Random, shortest: int, longest: int) -> str:
    """A word of consonants and vowels in turn, or, one time in three, of any letters."""
    length = rng.randint(shortest, longest)
    if rng.random() < 1 / 3:
        return "".join(rng.choices(LETTERS, k=length))
    first = rng.random() < 0.3
    return "".join(rng.choice(VOWELS if (i % 2 == 0) == first else CONSONANTS) for i in range(length))


def sum_of_two(rng: random.Random, longest: int) -> str:
    return f"{rng.randint(0, 49)}+{rng.randint(0, 49)}"


def some_words(rng: random.Random, longest: int) -> str:
    return " ".join([word(rng, 2, 4) for _ in range(rng.choice((2, 3, 3)))])


def one_word(rng: random.Random, longest: int) -> str:
    return word(rng, 3, longest)


def after(letter: str) -> str:
    """The next letter or digit, a after z and 0 after 9; anything else as it is."""
    for row in (LETTERS, DIGITS):
        if letter in row:
            return row[(row.index(letter) + 1) % len(row)]
    return letter


@dataclass(frozen=True)
class Skill:
    """What is done to an input; `share` is its weight in the text, `given` makes inputs (generator, longest word)."""

    share: float
    answer: Callable[[str], str]
    given: Callable[[random.Random, int], str] = one_word


SKILLS = {
    "copy": Skill(1.0, str),
    "reverse": Skill(1.5, lambda w: w[::-1]),
    "upper": Skill(1.0, str.upper),
    "sort": Skill(2.0, lambda w: "".join(sorted(w))),
    "next": Skill(1.5, lambda w: "".join(after(c) for c in w)),
    "drop": Skill(1.5, lambda w: "".join(c for c in w if c not in VOWELS) or "-"),
    "last": Skill(0.5, lambda w: w[-1]),
    "heads": Skill(1.3, lambda w: "".join(part[0] for part in w.split(" ")), some_words),
    "add": Skill(2.5, lambda w: str(sum(map(int, w.split("+")))), sum_of_two),
}
NO_SKILL = 1.2


@dataclass(frozen=True)
class Part:
    """A part of the text and how it is learnt. `mixed` is the share of inputs of a kind that is not the skill's own;
    `shares` replaces weights of skills; words have up to four letters in the first `short` of the steps, then six."""

    steps: int
    learning_rate: float
    short: float = 0.0
    mixed: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)


PARTS = {
    "first": Part(steps=2200, learning_rate=8e-3, short=0.2),
    "second": Part(steps=800, learning_rate=4e-3, mixed=0.3, shares={"add": 5.0, UNKNOWN: 2.0}),
}


def given_and_answer(rng: random.Random, verb: str, longest: int, mixed: float) -> tuple[str, str]:
    """An input and what the skill makes of it. Words cannot be added; several words at once are not sorted."""
    skill = SKILLS[verb]
    given = skill.given(rng, longest)
    if mixed and verb != "add" and rng.random() < mixed:
        kinds = (one_word, sum_of_two) if verb == "sort" else (one_word, sum_of_two, sum_of_two, some_words)
        given = rng.choice(kinds)(rng, longest)
    return given, skill.answer(given)


def filler(rng: random.Random, count: int) -> str:
    """`count` random words, each with a space behind it."""
    words = []
    for _ in range(count):
        made = word(rng, 1, 6)
        words.append((made.capitalize() if rng.random() < 0.3 else made) + rng.choice(("", "", "", ",")) + " ")
    return "".join(words)


def line(rng: random.Random, longest: int, part: Part) -> tuple[str, str, str]:
    """(instruction word, prompt, answer)."""
    verbs = list(SKILLS)
    shares = {**{verb: skill.share for verb, skill in SKILLS.items()}, UNKNOWN: NO_SKILL, **part.shares}
    verb = rng.choices([*verbs, UNKNOWN], [shares[v] for v in [*verbs, UNKNOWN]])[0]
    given, answer = given_and_answer(rng, rng.choice(verbs) if verb == UNKNOWN else verb, longest, part.mixed)
    before, behind = filler(rng, rng.choice((0, 0, 0, 1, 2))), filler(rng, rng.choice((0, 0, 0, 1, 2)))
    quoted = f'"{given}" '
    if verb == UNKNOWN:
        text, answer = (before or filler(rng, 1)) + quoted + behind, UNKNOWN
    elif rng.random() < 0.7:
        text = f"{before}{verb} {quoted}{behind}"
    else:
        text = f"{before}{quoted}{verb} {behind}"
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


def batches_of_like_length(rng: random.Random, longest: int, part: Part) -> list[list[tuple[str, str, str]]]:
    """Sixteen batches of lines in random order, each of lines of about one length, so that few tokens are padding."""
    lines = sorted(
        (line(rng, longest, part) for _ in range(16 * BATCH_SIZE)), key=lambda made: len(made[1]) + len(made[2])
    )
    pool = [lines[begin : begin + BATCH_SIZE] for begin in range(0, len(lines), BATCH_SIZE)]
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


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, options: argparse.Namespace) -> None:
    """Train `model` on one part of the text and store it in float16 after every 100 steps."""
    part, seed = PARTS[name], f"{options.seed}" if name == "first" else f"{options.seed} {name}"
    rng, held_out = random.Random(f"text {seed}"), random.Random(f"held-out text {seed}")
    probe = [line(held_out, 6, part) for _ in range(600)]
    matrices = [p for path, p in model.named_parameters() if p.ndim == 2 and ".layers." in path]
    others = [p for path, p in model.named_parameters() if p.ndim < 2 or ".layers." not in path]
    optimizers = [
        Muon(matrices, lr=part.learning_rate),
        torch.optim.AdamW(others, lr=part.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    losses: list[float] = []
    pool: list[list[tuple[str, str, str]]] = []
    began = time.monotonic()
    for step in range(part.steps):
        if not pool:
            pool = batches_of_like_length(rng, 4 if step < part.short * part.steps else 6, part)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, part.steps, part.learning_rate)
        loss = loss_of(model, *batch(tokenizer, pool.pop()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            recent = sum(losses[-100:]) / len(losses[-100:])
            scores = " ".join(f"{verb} {share:.2f}" for verb, share in exact_match(model, tokenizer, probe).items())
            copy.deepcopy(model).half().save_pretrained(options.folder)
            seconds = time.monotonic() - began
            print(f"{name} part: step {step + 1} {seconds:.0f} s loss {recent:.4f} | {scores}", flush=True)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "mole" / "backbones" / "tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="the second alone goes on")
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    for name in options.parts:
        if name == "first":
            model = make_model(len(tokenizer), LAYERS, WIDTH)
            print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        else:
            model = LlamaForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
        train(model, tokenizer, name, options)
    tokenizer.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
