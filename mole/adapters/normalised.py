"""The same LoRA in the one form that every server reads alike: one rank, one alpha, a scale of 1.

Servers and converters read `r` and `lora_alpha` for all modules; patterns of them, rsLoRA's other scale and modules
beside the factors are read by PEFT alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mole.adapters.adapter import Adapter
from mole.adapters.lora import LoraWeights


def normalised(adapter: Adapter) -> Adapter:
    """The adapter with its scales folded into B, and zeros up to the largest rank: what it adds is the same.

    Raises ValueError for what such folders have no place for, naming what stands against it.
    """
    if adapter.method != "lora":
        raise ValueError(f"an adapter of method {adapter.method} has no such form: only LoRA has; use format=peft")
    if held := [*adapter.biases, *adapter.full_modules]:
        raise ValueError(
            f"the adapter holds weights of the backbone itself ({', '.join(held[:3])}), which servers do not read: "
            "use format=peft"
        )
    rank = max(part.rank for part in adapter.modules.values())
    modules = {path: _folded(path, part, rank) for path, part in adapter.modules.items()}
    return replace(adapter, modules=modules, base_weights={})


def _folded(path: str, part: LoraWeights, rank: int) -> LoraWeights:
    if part.magnitude is not None:
        raise ValueError(
            f"{path}: DoRA has a length for each row, which no A and B alone say: make a LoRA of it with mole merge "
            "and a rank, or use format=peft"
        )
    if part.kind == "convolution" or part.bias is not None:
        what = "a bias of its own (lora_bias)" if part.bias is not None else "the factors of a convolution"
        raise ValueError(f"{path}: {what}, which servers do not read: use format=peft")
    B = (part.B.double() * part.scale).to(part.B.dtype)
    missing = rank - part.rank
    A = torch.cat([part.A, part.A.new_zeros(missing, part.A.shape[1])]) if missing else part.A
    B = torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1) if missing else B
    return replace(part, A=A.contiguous(), B=B.contiguous(), alpha=float(rank), rslora=False)
