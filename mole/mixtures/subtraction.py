"""Modules that compute with the experts less general knowledge, while they hold the experts as they are."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from mole.mixtures.banks import LoraBank
from mole.routers.general_knowledge import Subtraction
from mole.routers.low_rank import lora_of
from mole.routing import Routing

logger = logging.getLogger(__name__)


class SubtractedBank(nn.Module):
    """`experts` as they were loaded, and `differences`, the bank of what they come to, which computes."""

    takes = "features"
    reads_output = mixes_base = False

    def __init__(self, experts: LoraBank, differences: LoraBank):
        super().__init__()
        self.experts, self.differences = experts, differences
        self.num_experts, self.present, self.kind = experts.num_experts, experts.present, experts.kind

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """As a bank's."""
        return self.differences(base_out, x, routing)

    def inner(self, base_out: Tensor, x: Tensor, direction: Tensor) -> Tensor:
        """As a bank's."""
        return self.differences.inner(base_out, x, direction)

    def spend(self, **settings: Any) -> None:
        """As a bank's."""
        self.differences.spend(**settings)

    def requires_grad_(self, requires_grad: bool = True) -> SubtractedBank:
        """Raises ValueError: what would train is made of the experts once."""
        if requires_grad:
            raise ValueError(
                "experts less general knowledge do not train: set train=router, or router.subtract=delta without "
                "router.subtract_rank"
            )
        super().requires_grad_(False)
        return self

    def weights(self, expert: int) -> Any:
        """Those of the expert as it was loaded."""
        return self.experts.weights(expert)

    def base_bias(self, expert: int) -> Tensor | None:
        """As a bank's."""
        return self.experts.base_bias(expert)

    def full_module(self, expert: int) -> dict[str, Tensor] | None:
        """As a bank's."""
        return self.experts.full_module(expert)


def subtract(model: Any) -> None:
    """Puts a `SubtractedBank` at every module where the router's config asks for other factors than the experts'.

    Raises ValueError for experts that it is not defined for.
    """
    config = model.router_config
    if not getattr(config, "makes_experts", False):
        return
    subtraction = Subtraction(config, model.shape)
    errors = []
    for site, layer in model.layers.items():
        if type(layer.bank) is not LoraBank:
            raise ValueError(
                f"router.general_experts: at {site} the experts are no plain LoRA, from which factors can be taken"
            )
        here = {index: layer.bank.weights(index) for index in layer.bank.present}
        differences = {}
        for index in here:
            if index not in subtraction.generals:
                change, error = subtraction.change(here, index, site)
                differences[index] = lora_of(change)
                errors.append(error)
        if differences:
            bank = LoraBank(differences, model.shape.num_experts, dtype=layer.bank.A.dtype, kernel=model.options.kernel)
            layer.bank = SubtractedBank(layer.bank, bank.to(layer.bank.A.device))
    if config.subtract_rank is not None and errors:
        logger.info(
            "router.subtract_rank=%d: relative error %.3g on average, %.3g at most",
            config.subtract_rank,
            sum(errors) / len(errors),
            max(errors),
        )
