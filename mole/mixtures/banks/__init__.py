"""Banks: what the experts at one mixed module hold, one file per kind of module and expert.

bank(base_out, x, routing) -> base_out + Σ_e w_e δ_e(x); `weights(expert)` gives one expert back, as views of the bank.
"""

from mole.mixtures.banks.bank import Bank, BankOfBanks
from mole.mixtures.banks.convolution import ConvolutionBank
from mole.mixtures.banks.dora import DoraBank
from mole.mixtures.banks.embedding import EmbeddingBank
from mole.mixtures.banks.lora import LoraBank
from mole.mixtures.banks.modules import ModuleBank
from mole.mixtures.banks.offsets import OffsetBank

__all__ = [
    "Bank",
    "BankOfBanks",
    "ConvolutionBank",
    "DoraBank",
    "EmbeddingBank",
    "LoraBank",
    "ModuleBank",
    "OffsetBank",
]
