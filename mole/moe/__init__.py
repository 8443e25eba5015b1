"""Mixtures of experts out of any modules: MoEBlock, by subclass, composition or surgery on a finished model."""

from mole.moe.block import MoEBlock
from mole.moe.collecting import aux_loss, update_router_bias
from mole.moe.config import CapacityConfig, MoEConfig, MoERouterConfig
from mole.moe.files import load, save
from mole.moe.image_plots import image_through_experts, image_through_moe_block
from mole.moe.images import make_expert_mask, make_experts_masks
from mole.moe.model import MoEModel, checkpointing
from mole.moe.plots import display_abs_experts_load, display_experts_load
from mole.moe.report import SurgeryReport
from mole.moe.statistics import BlockStats, RoutingStats, record_routing
from mole.moe.surgery import moefy, unmoefy

__all__ = [
    "BlockStats",
    "CapacityConfig",
    "MoEBlock",
    "MoEConfig",
    "MoEModel",
    "MoERouterConfig",
    "RoutingStats",
    "SurgeryReport",
    "aux_loss",
    "checkpointing",
    "display_abs_experts_load",
    "display_experts_load",
    "image_through_experts",
    "image_through_moe_block",
    "load",
    "make_expert_mask",
    "make_experts_masks",
    "moefy",
    "record_routing",
    "save",
    "unmoefy",
    "update_router_bias",
]
