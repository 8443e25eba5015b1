"""One rank of two on half a batch: gradients under DDP, losses over all ranks, the bias; written to a file each."""

import os
import sys

import torch
import torch.distributed as dist
from moe_cases import DIM, block, inputs
from torch.nn.parallel import DistributedDataParallel

from mole.moe import aux_loss, update_router_bias

LOSSES = {"load_balance": 0.5, "importance_cv2": 0.3, "balance_entropy": 0.2, "z_loss": 0.1, "token_entropy": 0.1}
OPTIONS = {"k": 2, "losses_over": "global", "router_losses": LOSSES, "router_bias_rate": 0.01}


def step(model, moe, x):
    """Gradients, losses and the bias after one step on x."""
    y = model(x)
    loss = y.square().mean() + aux_loss(moe)
    loss.backward()
    update_router_bias(moe)
    found = {name: p.grad for name, p in moe.named_parameters()}
    return {"grads": found, "losses": moe.losses, "bias": moe.router.bias}


def main(rank: int, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    moe = block(12, **OPTIONS)  # of 8 tokens not all experts get one
    model = DistributedDataParallel(moe)
    step(model, moe, inputs(4, 4, DIM, seed=3)[2 * rank : 2 * rank + 2])
    moe.zero_grad()
    x = inputs(4, 4, DIM)
    torch.save(step(model, moe, x[2 * rank : 2 * rank + 2]), f"{place}/{rank}.pt")
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # gloo's threads may ask for the interpreter while it is taken down, which aborts the process
