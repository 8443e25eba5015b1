"""Optimizers: what turns gradients into steps. Biases and norms are never decayed.

AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101. Adafactor: Shazeer and Stern 2018, arXiv:1804.04235.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from mole.registry import OPTIMIZERS, config_dataclass

Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Groups = list[dict[str, Any]]


@config_dataclass
class AdamWConfig:
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NotNegative = 0.0


@config_dataclass
class SGDConfig:
    """Stochastic gradient descent, with momentum if asked for."""

    name: Literal["sgd"] = "sgd"
    momentum: Share = 0.0
    nesterov: bool = False
    weight_decay: NotNegative = 0.0

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov=true needs optimizer.momentum above 0: set it, or nesterov=false")


@config_dataclass
class AdafactorConfig:
    """Adam's second moments kept as row and column sums: little memory."""

    name: Literal["adafactor"] = "adafactor"
    beta2_decay: Annotated[float, Field(lt=0)] = -0.8
    update_clip: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: NotNegative = 0.0


@OPTIMIZERS.register("adamw", AdamWConfig)
def adamw(config: AdamWConfig, groups: Groups, learning_rate: float) -> Optimizer:
    """AdamW, fused into one kernel where the device and the dtypes have one."""
    settings: dict[str, Any] = {"lr": learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon}
    try:
        return torch.optim.AdamW(groups, **settings, fused=True)
    except RuntimeError:  # torch says so when the parameters' device or dtype has no fused kernel
        return torch.optim.AdamW(groups, **settings)


@OPTIMIZERS.register("sgd", SGDConfig)
def sgd(config: SGDConfig, groups: Groups, learning_rate: float) -> Optimizer:
    """SGD."""
    return torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum, nesterov=config.nesterov)


@OPTIMIZERS.register("adafactor", AdafactorConfig)
def adafactor(config: AdafactorConfig, groups: Groups, learning_rate: float) -> Optimizer:
    """Adafactor."""
    return torch.optim.Adafactor(groups, lr=learning_rate, beta2_decay=config.beta2_decay, d=config.update_clip)


def build_optimizer(
    config: Any,
    parameters: dict[str, nn.Parameter],
    learning_rate: float,
    own: Mapping[str, Mapping[str, float]] | None = None,
) -> Optimizer:
    """The optimizer that `config.name` names, over named parameters.

    Matrices are decayed; what has fewer than two dimensions (biases, norms, scales) is not. `own` gives parameters by
    name a rate (`lr`) or a `weight_decay` of their own.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        settings = (own or {}).get(name, {})
        decay = settings.get("weight_decay", config.weight_decay) if parameter.ndim >= 2 else 0.0
        groups.setdefault((settings.get("lr", learning_rate), decay), []).append(parameter)
    # The run's own rate comes first: it is the one that is logged.
    ordered = sorted(groups.items(), key=lambda row: (row[0][0] != learning_rate, -row[0][1]))
    members = [{"params": found, "weight_decay": decay, "lr": rate} for (rate, decay), found in ordered]
    return OPTIMIZERS.build(config, members, learning_rate)
