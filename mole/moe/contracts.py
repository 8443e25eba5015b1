"""What an expert is given: its tokens packed, its tokens per sequence, or everything with the other tokens at zero.

pointwise  [1, n, d]     its tokens of all samples, packed: right if an expert treats each token by itself
sequence   [b, n_max, d] its tokens of each sample in order, with a mask of what is filled
zeros      [B, T, d]     the input with the other tokens at zero

A probe tells whether an expert is pointwise: permuting tokens must permute its output, and a token alone must give the
same.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mole.moe.dispatch.plan import ExpertPlan
from mole.moe.dispatch.recipes import silent
from mole.moe.experts import architecture
from mole.moe.quiet import quietly

logger = logging.getLogger(__name__)
PROBED = 4  # tokens
CLOSE = 1e-4  # of the largest output
COARSE = 5e-2  # the same of half precision

_NORMS = (nn.LayerNorm, nn.RMSNorm)
_ACROSS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def contract_of(asked: str, plan: ExpertPlan, x: Tensor, name: str) -> str:
    """pointwise, sequence or zeros: what was asked for, or for `auto` what a probe says. `name` of the block, for logs.

    Raises ValueError for pointwise where experts are not.
    """
    if asked in ("sequence", "zeros"):
        return asked
    if plan.plain and all(surely_pointwise(expert) for expert in plan.experts):
        return "pointwise"
    if torch.compiler.is_compiling():
        raise RuntimeError("call the block once before it is compiled: its experts must be probed, or set contract")
    reason = why_not_pointwise(plan.forward, plan.experts, x)
    if reason is None:
        return "pointwise"
    if asked == "pointwise":
        raise ValueError(f"contract=pointwise, but {reason}: use contract=sequence or zeros")
    logger.warning(
        "MoE block%s: %s; every expert that is chosen runs on the whole input, with the other tokens at zero, which "
        'costs up to %d times the module; contract="sequence" gives experts their own tokens',
        name,
        reason,
        plan.num_experts,
    )
    return "zeros"


def takes_mask(call: Callable[..., Any], contract: str) -> bool:
    """Whether `call` (expert, x, …) takes a mask as its third argument. Raises ValueError if it cannot go without."""
    third = list(inspect.signature(call).parameters.values())[2:3]
    if third and contract != "sequence" and third[0].default is third[0].empty:
        raise ValueError(
            f"expert_forward takes {third[0].name}, which contract=sequence gives, not contract={contract}"
        )
    return bool(third)


def surely_pointwise(expert: nn.Module) -> bool:
    """Whether an expert is made of nothing but layers that treat each token by itself."""
    if isinstance(expert, nn.Sequential):
        return all(surely_pointwise(part) for part in expert)
    if isinstance(expert, _NORMS):
        return type(expert) in _NORMS and len(expert.normalized_shape) == 1
    if type(expert) is nn.Linear:
        return True
    return silent(expert)


def why_not_pointwise(call: Callable[[nn.Module, Tensor], Any], experts: Any, x: Tensor) -> str | None:
    """The reason why some expert is not pointwise; None if all are. `x` [.., d] gives the width, dtype and device.

    One expert of each architecture is looked at, in eval, without grad; the state of random numbers stays.
    """
    seen = set()
    for index, expert in enumerate(experts):
        kind = architecture(expert)
        if kind in seen:
            continue
        seen.add(kind)
        across = next((m for m in expert.modules() if isinstance(m, _ACROSS)), None)
        reason = f"it has {type(across).__name__}" if across is not None else _probe(call, expert, x)
        if reason is not None:
            return f"expert {index} is not pointwise: {reason}"
    return None


def _probe(call: Callable[[nn.Module, Tensor], Any], expert: nn.Module, x: Tensor) -> str | None:
    with quietly([expert], x.device):
        tokens = torch.randn(1, PROBED, x.shape[-1], generator=torch.Generator().manual_seed(0)).to(x)
        order = torch.tensor([2, 0, 3, 1], device=x.device)
        try:
            whole, permuted, alone = call(expert, tokens), call(expert, tokens[:, order]), call(expert, tokens[:, :1])
        except Exception as error:  # an expert may refuse four tokens in any way: then it is no pointwise one
            return f"it takes no {PROBED} tokens ({type(error).__name__}: {str(error)[:200]})"
    outputs = (whole, permuted, alone)
    if not all(isinstance(out, Tensor) for out in outputs):
        raise ValueError(f"{type(expert).__name__} returns {type(whole).__name__}, and an expert must return a tensor")
    if whole.shape[:2] != tokens.shape[:2] or alone.shape[:2] != (1, 1):
        return f"it gives {tuple(whole.shape)} for {tuple(tokens.shape)}"
    if not _close(whole[:, order], permuted):
        return "permuting its tokens does not permute its output"
    if not _close(whole[:, :1], alone):
        return "a token alone gives another output than among others"
    return None


def _close(one: Tensor, other: Tensor) -> bool:
    coarse = torch.finfo(one.dtype).eps > 1e-5 if one.is_floating_point() else False
    size = one.detach().float().abs().max().clamp_min(1.0)
    return bool((one.float() - other.float()).abs().max() <= (COARSE if coarse else CLOSE) * size)
