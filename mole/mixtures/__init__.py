"""Mixtures: the one layer that spends a routing, and the model that owns the layers and their router."""

from mole.mixtures.adapter_mixture import MixtureLayer
from mole.mixtures.banks import LoraBank
from mole.mixtures.by_library import add_experts_from_library, from_library
from mole.mixtures.files import Origin, experts_in, load_mixture, origins_of, router_name, save_mixture
from mole.mixtures.listening import own_statistics
from mole.mixtures.model import MultiExpertModel
from mole.mixtures.opening import (
    blocks_in,
    cards_at,
    experts_of,
    mixture_folder,
    mixture_of,
    open_model,
    pinned,
    referred,
)
from mole.mixtures.two_pass.cache import TwoStreamCache
from mole.mixtures.wrapping import MixtureOptions

__all__ = [
    "LoraBank",
    "MixtureLayer",
    "MixtureOptions",
    "MultiExpertModel",
    "Origin",
    "TwoStreamCache",
    "add_experts_from_library",
    "blocks_in",
    "cards_at",
    "experts_in",
    "experts_of",
    "from_library",
    "load_mixture",
    "mixture_folder",
    "mixture_of",
    "open_model",
    "origins_of",
    "own_statistics",
    "pinned",
    "referred",
    "router_name",
    "save_mixture",
]
