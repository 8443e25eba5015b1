"""The README of an X-LoRA checkpoint: what it is, and how each reader loads it."""

from __future__ import annotations

from pathlib import Path

from mole.xlora.card import CheckpointCard

README = "README.md"
MARK = "<!-- written by mole: X-LoRA checkpoint -->"


def readme(card: CheckpointCard, folder: Path) -> str:
    """Markdown; a file with `MARK` in it may be written over by the next save."""
    base = card.base.id or f"a {card.base.architecture} of width {card.base.hidden_size}"
    names = "\n".join(f"{row.index}. {_line(row.name)} ({row.folder or row.source})" for row in card.experts)
    text = f"""{MARK}
# X-LoRA over {_line(base)}

{len(card.experts)} LoRA experts on {len(card.layers)} layers of {_line(base)}, mixed by a router that reads the last
hidden state of a first pass. Experts, in the order of the gates:

{names}

With mole:

```python
from mole import xlora

model = xlora.from_pretrained({str(folder.name)!r}, base_model)
```

`xlora_config.json`, `xlora_classifier.safetensors` and the experts' folders are what the original X-LoRA and mistral.rs
read. Top-k, where it is used, is taken over the experts of each token.
"""
    if card.peft_layout.written:
        text += """
With PEFT 0.18 and later. The experts' paths are absolute; if the folder was moved, tell PEFT where they are:

```python
from peft import PeftModel, XLoraConfig

config = XLoraConfig.from_pretrained(folder)
config.adapters = {str(i): f"{folder}/{name}" for i, name in enumerate(names_of_the_experts_folders)}
model = PeftModel.from_pretrained(base_model, folder, config=config)   # base_model.config.use_cache = False
```
"""
    else:
        text += f"\nNot in PEFT's layout: {card.peft_layout.reason}.\n"
    return text


def _line(text: str | None) -> str:
    return ascii(text)[1:-1].replace("`", "'").replace("<", "(").replace("[", "(")
