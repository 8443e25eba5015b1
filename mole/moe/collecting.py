"""What a training loop asks of all blocks of a model: their losses once, and their bias after each optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mole.moe.balance import summed_over_ranks
from mole.moe.block import MoEBlock
from mole.moe.ledger import nothing_owed


def aux_loss(model: nn.Module) -> Tensor:
    """The weighted losses of all blocks of `model`, the mean over their forwards, a scalar with graph.

    Each forward counts once: a second call gives 0. 0 in eval too. Raises ValueError for a model without blocks.
    """
    blocks = _blocks(model)
    owed = [loss for block in blocks for loss in block.ledger.take()]
    if not owed:
        return nothing_owed(blocks[0])
    return torch.stack([loss.to(owed[0].device) for loss in owed]).mean()


def update_router_bias(model: nn.Module) -> None:
    """Moves the balancing bias of every block that has one; to be called once after each optimizer step.

    c = the slots of each expert in training forwards since the last call, of all ranks; b += rate · sign(mean(c) − c);
    b −= mean(b). Wang et al. 2024, arXiv 2408.15664. Raises ValueError for a model without blocks.
    """
    for block in _blocks(model):
        rate = block.config.router.bias_rate
        if not rate:
            continue
        counts = block.ledger.take_counts()
        bias = block.router.get_buffer("bias")
        if counts is None:
            counts = torch.zeros(block.num_experts, dtype=torch.long, device=bias.device)
        counts = summed_over_ranks(counts).to(bias)
        with torch.no_grad():
            bias += rate * torch.sign(counts.mean() - counts)
            bias -= bias.mean()


def _blocks(model: nn.Module) -> list[MoEBlock]:
    blocks = [module for module in model.modules() if isinstance(module, MoEBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no MoEBlock")
    return blocks
