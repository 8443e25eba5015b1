"""What scripts/benchmarks/mixture.py measures mole's kernels against, on the experts of one stack.

mttl (3724abf5) multiplies with the factors of all experts mixed for each token, [B, T, d, r] ("before"), or computes
the output of each expert for each token, [B, T, E, d] ("after"); written here from that description. PEFT's Arrow,
X-LoRA and Poly are PEFT's own layers, given the same factors.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import peft
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.poly.layer import Linear as PolyLinear
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn

from mole.kernels import LoraStack


def mttl_before(x: Tensor, stack: LoraStack, weights: Tensor, base_out: Tensor) -> Tensor:
    """Mixed factors for every token, then the token through them: another sum than the others, see mole.kernels."""
    A, B = stack.blocks()
    mixed_A = torch.einsum("bte,erd->btrd", weights, A)
    mixed_B = torch.einsum("bte,erd->btrd", weights * stack.scales, B)
    low = torch.einsum("btd,btrd->btr", x, mixed_A)
    return base_out + torch.einsum("btr,btrd->btd", low, mixed_B)


def mttl_after(x: Tensor, stack: LoraStack, weights: Tensor, base_out: Tensor) -> Tensor:
    """Every expert's output for every token, then their weighted sum."""
    A, B = stack.blocks()
    outputs = torch.einsum("bter,erd->bted", torch.einsum("btd,erd->bter", x, A), B)
    return base_out + torch.einsum("bte,bted->btd", weights * stack.scales, outputs)


def with_adapters(base: nn.Linear, stack: LoraStack):
    """PEFT's LoRA layer on `base` with the stack's experts as adapters "0" to "n-1", all active."""
    rank = stack.ranks[0]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(base), config, adapter_name="0")
    for expert in range(1, stack.num_experts):
        model.add_adapter(str(expert), config)
    layer = model.base_model.model[0]
    A, B = stack.blocks()
    for expert in range(stack.num_experts):
        layer.lora_A[str(expert)].weight.data = A[expert].clone()
        layer.lora_B[str(expert)].weight.data = B[expert].t().contiguous()
    layer.set_adapter([str(expert) for expert in range(stack.num_experts)])
    return layer.requires_grad_(False)


def peft_xlora(base: nn.Linear, stack: LoraStack, top_k: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """PEFT's X-LoRA layer: (x, weights [B, T, E]) → the module's output with the experts' share."""
    target = with_adapters(base, stack)
    config = peft.XLoraConfig(hidden_size=base.in_features, adapters={}, top_k_lora=top_k)
    layer = XLoraLinearLayer(SimpleNamespace(disabled=False), target, target.forward, 0, config)
    return lambda x, weights: layer.forward(x, scalings=weights[:, :, None])


def peft_arrow(base: nn.Linear, stack: LoraStack, prototypes: Tensor, top_k: int) -> Callable[[Tensor], Tensor]:
    """PEFT's Arrow with these prototypes [E, d_in] in the place of its own approximate ones."""
    target = with_adapters(base, stack)
    names = [str(expert) for expert in range(stack.num_experts)]
    config = peft.ArrowConfig(top_k=top_k, router_temperature=1.0)
    config.task_adapter_names, config.gks_adapter_names = names, []
    layer = ArrowLoraLinearLayer(base.in_features, config)
    layer.register_buffer("prototypes", prototypes, persistent=False)
    scaling = {name: float(scale) for name, scale in zip(names, stack.scales, strict=True)}
    drop = nn.Identity()
    return lambda x: base(x) + layer(x, target.lora_A, target.lora_B, drop, scaling)


def peft_poly(base: nn.Linear, stack: LoraStack, logits: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """PEFT's Poly: (x, task ids [B]) → output; `logits` [tasks, E] of its router. Its scale is 1 / r."""
    rank, count = stack.ranks[0], stack.num_experts
    config = peft.PolyConfig(r=rank, n_tasks=len(logits), n_skills=count, n_splits=1, target_modules=["0"])
    layer = PolyLinear(base, "default", config).eval()
    A, B = stack.blocks()
    layer.poly_lora_A["default"].data = A.transpose(1, 2)[None].contiguous()
    layer.poly_lora_B["default"].data = B[None].contiguous()
    layer.poly_router["default"].module_logits.data = logits.clone()
    layer.requires_grad_(False)
    return lambda x, tasks: layer(x, task_ids=tasks)
