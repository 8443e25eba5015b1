"""Routers of blocks: tokens → choice. One file each; importing the package fills the registry."""

from mole.moe.routers.base import MOE_ROUTERS, Choice, MoERouter, ScoringRouter, Tokens
from mole.moe.routers.depth import Depth
from mole.moe.routers.expert_choice import ExpertChoice
from mole.moe.routers.hash import Hash
from mole.moe.routers.round_robin import RoundRobin
from mole.moe.routers.soft import Soft, SoftChoice
from mole.moe.routers.top_k import TopK

__all__ = [
    "MOE_ROUTERS",
    "Choice",
    "Depth",
    "ExpertChoice",
    "Hash",
    "MoERouter",
    "RoundRobin",
    "ScoringRouter",
    "Soft",
    "SoftChoice",
    "Tokens",
    "TopK",
]
