"""The banks of experts that are no LoRA, at one module: those of a kind that can share one, in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mole.adapters import BottleneckWeights, Ia3Weights, NormWeights, PrefixWeights, PromptWeights
from mole.adapters.prefix_attention import facts_of
from mole.mixtures.banks import BottleneckBank, Ia3Bank, NormBank, PrefixBank, PromptBank


def other_banks(
    experts: Mapping[int, Any],
    num_experts: int,
    path: str,
    module: nn.Module,
    backbone: nn.Module,
    *,
    dtype: torch.dtype,
    **dropout: Any,
) -> list:
    """`experts` mixture index → its weights at `module`; none, no banks. `dropout` settings are a BottleneckBank's.

    Raises ValueError for kinds that no one module can have.
    """
    banks: list = []
    for reads in ("output", "input"):
        factors = {
            i: w for i, w in experts.items() if isinstance(w, Ia3Weights) and w.feedforward == (reads == "input")
        }
        if factors:
            banks.append(Ia3Bank(factors, num_experts, base=module, dtype=dtype))
        small = {i: w for i, w in experts.items() if isinstance(w, BottleneckWeights) and w.reads == reads}
        if small:
            banks.append(BottleneckBank(small, num_experts, dtype=torch.promote_types(dtype, torch.float32), **dropout))
    norms = {i: w for i, w in experts.items() if isinstance(w, NormWeights)}
    if norms:
        dtype = torch.promote_types(dtype, torch.float32)
        banks.append(NormBank(norms, num_experts, base=module, dtype=dtype))
    prefixes = {i: w for i, w in experts.items() if isinstance(w, PrefixWeights)}
    if prefixes:
        banks.append(PrefixBank(prefixes, num_experts, facts=facts_of(module, backbone), dtype=dtype))
    prompts = {i: w for i, w in experts.items() if isinstance(w, PromptWeights)}
    if prompts:
        banks.append(PromptBank(prompts, num_experts, dtype=dtype))
    if (prefixes or prompts) and len(banks) > 1:
        raise ValueError(f"{path}: {' and '.join(bank.kind for bank in banks)} experts at one module cannot be mixed")
    return banks
