"""Experts and libraries of them: a trained adapter with a card, kept in a place that publishes whole revisions.

Nothing here needs torch before weights are asked for.
"""

from mole.experts.backends import Backend, LocalBackend, LocalConfig
from mole.experts.batch import Batch
from mole.experts.by_place import HFExpertLibrary, LocalExpertLibrary
from mole.experts.card import BackboneRef, Card, check_backbone, make_card
from mole.experts.errors import (
    Conflict,
    Damaged,
    LibraryError,
    NoLibrary,
    ReadOnly,
    Refused,
    UnknownExpert,
    Unreachable,
)
from mole.experts.expert import Expert, describe, load_expert
from mole.experts.folder import read_card, verified_files, write_card
from mole.experts.library import ExpertLibrary
from mole.experts.names import check_name, is_name, proposal
from mole.experts.verifying import Problem

__all__ = [
    "BackboneRef",
    "Backend",
    "Batch",
    "Card",
    "Conflict",
    "Damaged",
    "Expert",
    "ExpertLibrary",
    "HFExpertLibrary",
    "LibraryError",
    "LocalBackend",
    "LocalConfig",
    "LocalExpertLibrary",
    "NoLibrary",
    "Problem",
    "ReadOnly",
    "Refused",
    "UnknownExpert",
    "Unreachable",
    "check_backbone",
    "check_name",
    "describe",
    "is_name",
    "load_expert",
    "make_card",
    "proposal",
    "read_card",
    "verified_files",
    "write_card",
]
