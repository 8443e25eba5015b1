"""Banks: what the experts at one mixed module hold, one file per kind of module and expert.

A bank is an nn.Module: `bank(base_out, x, routing)` is the module's output with the experts' share, in the shape and
dtype of `base_out` (called as a module, so that hooks that move parameters run); `weights(expert)` is one expert's
weights as views of the bank.
"""

from mole.mixtures.banks.lora import LoraBank

__all__ = ["LoraBank"]
