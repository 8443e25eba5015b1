"""Where new bottlenecks go and what they start from: sites of a placement, sizes, norms, first weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mole.adapters.bottleneck_config import at_block
from mole.backbones.sites import Site, norms_of, sites_of


def chosen_sites(config: Any, model: nn.Module) -> list[Site]:
    """The sites of `config.placement` in the blocks of `config.layers`.

    Raises ValueError for a family that is not known, and for a block that is not there.
    """
    sites = sites_of(model, config.sites)
    if config.layers is not None:
        known = {site.layer for site in sites}
        if odd := sorted(set(config.layers) - known):
            raise ValueError(f"adapter.layers: there is no block {odd[0]}: the backbone has 0 … {max(known)}")
        sites = [site for site in sites if site.layer in config.layers]
    chosen = [site for site in sites if config.placement == "houlsby" or site.part == "ffn"]
    if not chosen:
        raise ValueError(
            f"adapter.placement={config.placement} needs a site of the feed-forward: add ffn to adapter.sites"
        )
    return chosen


def module_of(site: Site, placement: str) -> str:
    """The path of the module that is wrapped: parallel ones stand beside a whole sub-layer where nothing closes it."""
    if placement == "parallel" and site.whole is not None:
        return site.whole
    return site.path


def size_at(site: Site, config: Any, width: int) -> int:
    """r at that site. Raises ValueError where it is below 1 or above four times the width."""
    if config.size is not None:
        size = int(at_block(config.size, site.layer, "size"))
    else:
        size = int(width // at_block(config.reduction_factor, site.layer, "reduction_factor"))
    if not 1 <= size <= 4 * width:
        raise ValueError(
            f"{site.path}: a bottleneck of {size} features at a width of {width}: 1 to {4 * width} are good"
        )
    return size


def chosen_norms(config: Any, model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Paths of the norms that are trained. Raises ValueError for sites where no norm closes one."""
    if config.train_norms == "none":
        return []
    norms = norms_of(model)
    if config.train_norms == "all":
        return list(norms)
    closing = {site.norm for site in sites if site.norm is not None}
    if not closing:
        raise ValueError("adapter.train_norms=sites: no norm closes a sub-layer of this backbone: use all or none")
    return [path for path in norms if path in closing]


def first_weights(
    config: Any, size: int, d_in: int, d_out: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D [r, d_in], b [r], U [d_out, r], c [d_out] as `config.init` says."""
    down, up = torch.empty(size, d_in), torch.zeros(d_out, size)
    for matrix in (down, up) if config.init != "zero_up" else (down,):
        if config.init == "trunc_normal":
            bound = 2 * config.init_std
            nn.init.trunc_normal_(matrix, std=config.init_std, a=-bound, b=bound, generator=generator)
        else:
            matrix.normal_(std=config.init_std, generator=generator)
    return down, torch.zeros(size), up, torch.zeros(d_out)
