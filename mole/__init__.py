"""mole: train adapters as experts on a frozen backbone, keep them in a library, mix them under a router."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name → module. Nothing is imported before it is asked for: `mole --help` must not load torch.
_PUBLIC: dict[str, str] = {
    "ExpertLibrary": "mole.experts",
    "ExpertTrainer": "mole.commands.expert_trainer",
    "HFExpertLibrary": "mole.experts",
    "LocalExpertLibrary": "mole.experts",
    "MultiExpertModel": "mole.mixtures",
    "add_experts_from_library": "mole.mixtures",
    "from_library": "mole.mixtures",
    "load_expert": "mole.experts",
    "load_mixture": "mole.mixtures",
    "load_scalings_log": "mole.routing.log",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mole' has no attribute {name!r}")
