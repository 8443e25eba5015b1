"""Banks: what the experts at one mixed module hold, one file per kind of module and expert.

bank(base_out, x, routing) -> base_out + Σ_e w_e δ_e(x); `weights(expert)` gives one expert back, as views of the bank.
"""

from mole.mixtures.banks.bank import Bank, BankOfBanks
from mole.mixtures.banks.bottleneck import BottleneckBank
from mole.mixtures.banks.branches import NormBank, OutputBank
from mole.mixtures.banks.calls import CallBank
from mole.mixtures.banks.convolution import ConvolutionBank
from mole.mixtures.banks.dora import DoraBank
from mole.mixtures.banks.embedding import EmbeddingBank
from mole.mixtures.banks.ia3 import Ia3Bank
from mole.mixtures.banks.lora import LoraBank
from mole.mixtures.banks.modules import ModuleBank
from mole.mixtures.banks.offsets import OffsetBank
from mole.mixtures.banks.prefix import PrefixBank
from mole.mixtures.banks.prompt import PromptBank

__all__ = [
    "Bank",
    "BankOfBanks",
    "BottleneckBank",
    "CallBank",
    "ConvolutionBank",
    "DoraBank",
    "EmbeddingBank",
    "Ia3Bank",
    "LoraBank",
    "ModuleBank",
    "NormBank",
    "OffsetBank",
    "OutputBank",
    "PrefixBank",
    "PromptBank",
]
