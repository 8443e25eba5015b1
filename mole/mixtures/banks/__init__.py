"""Banks: what the experts at one mixed module hold, one file per kind of module and expert.

A bank is an nn.Module with `delta(x, routing)`, the experts' share of the module's output, and `weights(expert)`,
one expert's weights as views of the bank.
"""

from mole.mixtures.banks.lora import LoraBank

__all__ = ["LoraBank"]
