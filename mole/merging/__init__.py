"""Merging: many experts become one set of weights; one file per method. What decides per input is a router instead."""

from mole.merging.concat import ConcatConfig
from mole.merging.dare import DareConfig
from mole.merging.iso_c import IsoCConfig
from mole.merging.knots import KnotsConfig
from mole.merging.linear import LinearConfig
from mole.merging.merge import LayerReport, Merged, merge, merged_by
from mole.merging.mixture import one_expert, static_weights, with_modules
from mole.merging.slerp import SlerpConfig
from mole.merging.task_arithmetic import TaskArithmeticConfig
from mole.merging.ties import TiesConfig
from mole.merging.tsv import TsvConfig
from mole.merging.wudi import WudiConfig

__all__ = [
    "ConcatConfig",
    "DareConfig",
    "IsoCConfig",
    "KnotsConfig",
    "LayerReport",
    "LinearConfig",
    "Merged",
    "SlerpConfig",
    "TaskArithmeticConfig",
    "TiesConfig",
    "TsvConfig",
    "WudiConfig",
    "merge",
    "merged_by",
    "one_expert",
    "static_weights",
    "with_modules",
]
