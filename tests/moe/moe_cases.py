"""Blocks and inputs that the tests of moe share."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from mole.moe import CapacityConfig, MoEBlock, MoEConfig, MoERouterConfig

DIM = 8


def mlp(seed: int = 0, dim: int = DIM, out: int = DIM, hidden: int = 12) -> nn.Module:
    """A pointwise expert."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out))


def mlps(count: int, **options: int) -> list[nn.Module]:
    """Unlike experts."""
    return [mlp(seed, **options) for seed in range(count)]


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def block(experts: int | list[nn.Module] = 4, *, seed: int = 0, **options) -> MoEBlock:
    """Without noise and losses unless they are asked for. Fields of the router as `router_<field>`, of the capacity as
    `capacity_<field>`.
    """
    router = {key.removeprefix("router_"): options.pop(key) for key in list(options) if key.startswith("router_")}
    capacity = {key.removeprefix("capacity_"): options.pop(key) for key in list(options) if key.startswith("capacity_")}
    router = {"noise": None if router.get("name", "top_k") in ("top_k", "expert_choice") else "learned"} | router
    router = {"losses": {}} | router
    config = MoEConfig(router=MoERouterConfig(**router), capacity=CapacityConfig(**capacity), **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MoEBlock(mlps(experts) if isinstance(experts, int) else experts, config=config)


def with_backend(block: MoEBlock, backend: str) -> MoEBlock:
    """The same block, computed otherwise."""
    block.config = replace(block.config, backend=backend)
    return block


class Attention(nn.Module):
    """An expert that looks at other tokens, with padding where it is told of some."""

    def __init__(self, dim: int = DIM, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        padding = None if mask is None else ~mask
        return self.inner(x, x, x, key_padding_mask=padding, need_weights=False)[0]


class MaskedBlock(MoEBlock):
    """Hands the mask on."""

    def expert_forward(self, expert, x, mask):  # type: ignore[override]
        return expert(x, mask)
