"""X-LoRA generation beside PEFT's XLoraModel: same backbone, experts and router, in one process, interleaved, medians.

Usage: python scripts/benchmarks/generation.py [new tokens] [rounds]
"""

import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mole.adapters import peft_format
from mole.mixtures import MultiExpertModel
from mole.routers import XLoraConfig

EXPERTS, RANK, PROMPT = 4, 8, 64


def llama(use_cache: bool) -> LlamaForCausalLM:
    """Four blocks of width 256."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        use_cache=use_cache,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def expert_folders(root: Path) -> list[Path]:
    """Random LoRA experts on all linear layers, saved by PEFT."""
    folders = []
    for index in range(EXPERTS):
        config = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        torch.manual_seed(index)
        model = peft.get_peft_model(llama(True), config)
        model.save_pretrained(root / str(index))
        folders.append(root / str(index))
    return folders


def main(new_tokens: int, rounds: int) -> None:
    """Prints medians in seconds and the ratio."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        folders = expert_folders(Path(root))
        theirs = peft.get_peft_model(
            llama(False),
            peft.XLoraConfig(
                task_type="CAUSAL_LM",
                hidden_size=256,
                xlora_depth=1,
                adapters={str(i): str(folder) for i, folder in enumerate(folders)},
            ),
        ).eval()
        experts = {str(i): peft_format.read(folder) for i, folder in enumerate(folders)}
        mine = MultiExpertModel(llama(True), experts, XLoraConfig(depth=1), train="none").eval()
    classifier = theirs.base_model.internal_xlora_classifier
    for own, other in zip(mine.router.parameters(), classifier.parameters(), strict=True):
        own.data.copy_(other.data)
    ids = torch.randint(1, 4096, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    cases = {
        "PEFT X-LoRA": lambda: theirs.generate(input_ids=ids, **options),
        "mole X-LoRA": lambda: mine.generate(input_ids=ids, **options),
        "backbone alone": lambda: mine.backbone.generate(input_ids=ids, **options),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    outputs = {}
    for round_number in range(rounds + 1):
        for name, run in cases.items():
            began = time.process_time()
            outputs[name] = run()
            if round_number:
                times[name].append(time.process_time() - began)
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, median in medians.items():
        print(f"{name:<16}{median:8.3f} s for {PROMPT}+{new_tokens} tokens (CPU time, median of {rounds})")
    print(f"PEFT / mole      {medians['PEFT X-LoRA'] / medians['mole X-LoRA']:8.2f}")
    print(f"mole / backbone  {medians['mole X-LoRA'] / medians['backbone alone']:8.2f}")
    print(f"same tokens      {torch.equal(outputs['PEFT X-LoRA'], outputs['mole X-LoRA'])}")


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    main(*(numbers + [64, 5][len(numbers) :]))
