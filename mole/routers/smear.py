"""SMEAR: one routing per example, from the mean of what the router reads, spent on the experts' parameters.

    h_b = mean_{t in prompt} x_bt;   p_b = softmax((W · LN(h_b) + c) / τ)

Muqeeth et al. 2023, arXiv 2306.03745. With `posterior` a second router reads the whole text: training routes by it and
pulls the first one towards it by KL(p_full ‖ p_prompt), which is all that inference has.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mole.registry import ROUTERS, config_dataclass
from mole.routers.base import Combining, Learning, MixtureShape, Placing, Router, dropped
from mole.routers.float32 import Linear, at_least_float32, without_autocast
from mole.routers.pooling import by_example, mean_of, means_so_far, prompt_of, valid_of
from mole.routers.selection import chosen
from mole.routers.top_k import check_top_k, one_of_one
from mole.routing import Frame, Routing


@config_dataclass
class SmearConfig(Placing, Combining, Learning):
    """What is pooled, how it is scored, and how the weights are spent."""

    name: Literal["smear"] = "smear"
    combine: Literal["outputs", "parameters"] = "parameters"
    pool: Literal["prompt", "full", "causal"] = "prompt"
    source: Literal["input", "encoder"] = "input"
    layer_norm: bool = True
    normalise_rows: bool = False
    center_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    norm_topk: bool = True
    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    posterior: bool = False
    kl: Annotated[float, Field(ge=0)] = 1.0
    init_std: Annotated[float, Field(ge=0)] = 0.02

    def __post_init__(self):
        problems = self.placing_problems() + one_of_one(self.top_k, self.norm_topk)
        if self.posterior and self.pool != "prompt":
            problems.append("router.posterior=true is for router.pool=prompt: other pools see the text already")
        if self.source == "encoder" and self.pool != "full":
            problems.append("router.source=encoder reads all that the encoder read: set router.pool=full")
        if problems:
            raise ValueError("\n".join(problems))


class Scores(nn.Module):
    """LayerNorm (if asked for) and a linear score per expert, [.., d] → [.., E]."""

    def __init__(self, config: SmearConfig, input_dim: int, num_experts: int):
        super().__init__()
        self.normalise_rows = config.normalise_rows
        self.norm = nn.LayerNorm(input_dim) if config.layer_norm else None
        self.linear = Linear(input_dim, num_experts)
        nn.init.normal_(self.linear.weight, std=config.init_std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        if self.norm is not None:
            affine = at_least_float32(self.norm.weight), at_least_float32(self.norm.bias)
            pooled = F.layer_norm(pooled.to(affine[0].dtype), pooled.shape[-1:], *affine)
        if not self.normalise_rows:
            return self.linear(pooled)
        rows = F.normalize(at_least_float32(self.linear.weight), dim=-1)
        return F.linear(pooled.to(rows.dtype), rows, at_least_float32(self.linear.bias).to(rows.dtype))


@ROUTERS.register("smear", SmearConfig)
class SmearRouter(Router):
    """Learned routing per example, one instance per mixed module or group. Raises ValueError if top_k > experts.

    `pool` prompt: the mean over the prompt, made where it is read and kept while generating; full: over all tokens,
    for encoders; causal: over the tokens so far, which makes it a routing per token. `source` encoder: the modules of
    a decoder read the mean of what the encoder gave.
    """

    scope = "layer"
    learned = True
    expert_axes: ClassVar[Mapping[str, int]] = {
        "prior.linear.weight": 0,
        "prior.linear.bias": 0,
        "posterior.linear.weight": 0,
        "posterior.linear.bias": 0,
        "center": 0,
    }
    config: SmearConfig
    center: Tensor

    def __init__(self, config: SmearConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        check_top_k(config.top_k, shape.num_experts)
        assert self.input_dim is not None, "a router of scope layer is built with the width of its input"
        # A group may hold modules of both sides: the side of its first module decides, which is the one that routes.
        self.reads_encoder = config.source == "encoder" and "decoder" in self.sites[0].split(".")
        self.reads_ahead = config.pool == "full" and config.source == "input"
        if config.pool == "prompt":
            self.needs, self.keeps = frozenset({"prompt_mask"}), True  # type: ignore[misc]
        elif config.source == "encoder":
            self.needs = frozenset({"encoder_states"})  # type: ignore[misc]
        width = shape.hidden_size if self.reads_encoder else self.input_dim
        self.prior = Scores(config, width, shape.num_experts)
        if config.posterior:
            self.posterior = Scores(config, width, shape.num_experts)
        if config.center_momentum:
            self.register_buffer("center", torch.zeros(shape.num_experts))

    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """`x` [B, T, d_in] → weights [B, 1, E] (causal: [B, T, E]), or of the top_k experts with their ids."""
        assert x is not None
        config = self.config
        with without_autocast(x):
            logits = self._centered(self.prior(self._pooled(x, frame)), frame) / config.temperature
            spent = logits
            if config.posterior and self.training:
                spent = self.posterior(mean_of(*by_example(x, valid_of(frame, x), "smear"))) / config.temperature
                full = torch.log_softmax(spent, dim=-1)
                apart = (full.exp() * (full - torch.log_softmax(logits, dim=-1))).sum(-1).mean()
                frame.penalise("kl", self.sites[0], config.kl * apart)
            probabilities = torch.softmax(dropped(spent, config.expert_dropout, self.training), dim=-1)
            weights, ids = chosen(probabilities, config.top_k, normalise=config.norm_topk)
        return Routing(weights, ids, logits=spent)

    def _pooled(self, x: Tensor, frame: Frame) -> Tensor:
        """h, float32 [B, 1, d] (causal: [B, T, d])."""
        if self.reads_encoder:
            x = frame.need("encoder_states", "smear").to(x.device)
        if self.config.pool == "causal":
            return means_so_far(x, frame, self.sites[0], "smear")
        mask = prompt_of(frame, "smear") if self.config.pool == "prompt" else valid_of(frame, x)
        return mean_of(*by_example(x, mask, "smear"))

    def _centered(self, logits: Tensor, frame: Frame) -> Tensor:
        """`logits` less their moving average over training."""
        momentum = self.config.center_momentum
        if not momentum:
            return logits
        if not self.training:
            return logits - self.center
        place = (id(self), "center")
        if place not in frame.notes:  # a recomputation finds the centre of its forward
            seen = logits.detach().flatten(0, 1)
            if logits.shape[1] > 1:
                seen = seen[valid_of(frame, logits).flatten().to(seen.device)]
            self.center.lerp_(seen.mean(0).to(self.center.dtype), 1 - momentum)
            frame.notes[place] = self.center.clone()
        return logits - frame.notes[place]
