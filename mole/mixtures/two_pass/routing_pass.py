"""The routing pass: the backbone under the router's constant routing, for its last hidden state and nothing else.

It has a KV cache of its own; neither head nor loss run; base dropout is off.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from mole.backbones.modules import reads_left_to_right
from mole.mixtures.two_pass.cache import TwoStreamCache
from mole.routers import Router
from mole.routing import Frame, Routing

# Inputs of the full forward that the routing pass has no use for.
_DROPPED = ("labels", "logits_to_keep", "num_items_in_batch", "return_dict", "past_key_values", "use_cache")


@dataclass(frozen=True)
class PassInputs:
    """Of the inputs of a forward, those that the routing pass does not get, and whether it takes a cache.

    `by_place`: the backbone may tell a token's absolute place in its row, as it has no rotary positions (GPT-2 counts
    padding on the left too where it is given no `position_ids`).
    """

    dropped: frozenset[str]
    takes_cache: bool
    by_place: bool


def pass_inputs(backbone: PreTrainedModel) -> PassInputs:
    """Found once for a model: reading signatures takes as long as some layers do."""
    inner, dropped = backbone.base_model, frozenset(_DROPPED)
    takes = signature(inner.forward).parameters.keys()
    if inner is not backbone:
        dropped |= signature(backbone.forward).parameters.keys() - takes
    rotary = any("rotary" in type(module).__name__.lower() for module in inner.modules())
    return PassInputs(dropped, "use_cache" in takes, by_place=not rotary)


@torch.no_grad()
def last_hidden_state(
    backbone: PreTrainedModel, inputs: dict[str, Any], cache: Cache | None, *, names: PassInputs, dropout: bool = False
) -> Tensor:
    """[B, T, H] after the final norm: transformers' `hidden_states[-1]` of the same inputs. Fills `cache`.

    `dropout` leaves the backbone's dropout as it is; otherwise it is off.
    """
    inner = backbone.base_model
    kept = {name: v for name, v in inputs.items() if name not in names.dropped and not name.startswith("output_")}
    if cache is not None or names.takes_cache:
        kept |= {"past_key_values": cache, "use_cache": cache is not None}
    with dropout_off(backbone, unless=dropout):
        output = inner(**kept)
    if getattr(output, "last_hidden_state", None) is None:
        raise ValueError(
            f"the router reads hidden states, and a {type(inner).__name__} gives none without its head: it has no "
            "inner model (base_model_prefix)"
        )
    return output.last_hidden_state


def constant_frame(model: Any, router: Router) -> Frame:
    """The frame of the routing pass: the router's constant routing, or no expert at all.

    Biases that no gate weighs are there even if every gate is 0.
    """
    constant = router.routing_pass_weights()
    if constant is None and not model.options.gate_lora_bias:
        constant = Routing(torch.zeros(1, 1, model.shape.num_experts, device=model.device))
    return Frame(experts_enabled=constant is not None, fixed=constant)


def can_cache(backbone: PreTrainedModel) -> bool:
    """Whether earlier tokens can be cached: the backbone takes a cache, and no token sees later ones."""
    takes = signature(backbone.forward).parameters
    return "past_key_values" in takes and (
        getattr(backbone.config, "is_encoder_decoder", False) or reads_left_to_right(backbone)
    )


class Streams:
    """Finds the two KV streams of a forward. Plain caches that were empty when they came are remembered, weakly."""

    def __init__(self):
        self._scaling: weakref.WeakKeyDictionary[Cache, tuple[Cache, tuple]] = weakref.WeakKeyDictionary()
        self._names: weakref.WeakKeyDictionary[Router, str] = weakref.WeakKeyDictionary()

    def name_of(self, router: Router) -> str:
        """Tells this model under this router from all others, whose settings may be the same."""
        if router not in self._names:
            self._names[router] = uuid.uuid4().hex
        return self._names[router]

    def pair(self, cache: Any, *, use_cache: bool, config: Any, fingerprint: tuple) -> TwoStreamCache | None:
        """The pair for this forward: the caller's own, one around the caller's empty cache, or a new one.

        None if nothing is to be cached. Raises ValueError for a cache of unknown origin that holds tokens already,
        and for a pair that was filled under another state of the router.
        """
        if cache is None:
            return TwoStreamCache(_new_cache(config), fingerprint=fingerprint) if use_cache else None
        if not isinstance(cache, Cache):
            raise ValueError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")
        pair = cache if isinstance(cache, TwoStreamCache) else self._around(cache, fingerprint)
        if pair.fingerprint != fingerprint:
            if pair.get_seq_length() > 0:
                raise ValueError(
                    "the router or the experts changed since this cache was filled, or it is another model's: start "
                    "from an empty cache"
                )
            pair.fingerprint = fingerprint
        return pair

    def _around(self, cache: Cache, fingerprint: tuple) -> TwoStreamCache:
        if cache in self._scaling:
            scaling, filled_under = self._scaling[cache]
            return TwoStreamCache(cache, scaling, filled_under)
        pair = TwoStreamCache(cache, fingerprint=fingerprint)  # refuses a cache that holds tokens
        self._scaling[cache] = (pair.scaling, fingerprint)
        return pair

    def __deepcopy__(self, memo: dict) -> Streams:
        return Streams()

    def __reduce__(self):
        return (Streams, ())


def _new_cache(config: Any) -> Cache:
    cache = DynamicCache(config=config)
    return EncoderDecoderCache(cache, DynamicCache()) if getattr(config, "is_encoder_decoder", False) else cache


@contextmanager
def dropout_off(model: nn.Module, *, unless: bool = False) -> Iterator[None]:
    """Eval mode for the body if some dropout would act; every training flag is as before afterwards."""
    training = [] if unless else [module for module in model.modules() if module.training]
    if not any(_drops(module) for module in training):
        yield
        return
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_dropout(model: Any) -> None:
    """Raises ValueError where dropout acts: a cache would keep the keys and values of one of its draws."""
    banks = {f"backbone.{site}.bank": layer.bank for site, layer in model.layers.items()}
    frozen = tuple(path for path, bank in banks.items() if not any(p.requires_grad for p in bank.parameters()))
    training = ((path, m) for path, m in model.named_modules() if m.training and not path.startswith(frozen))
    if path := next((path for path, module in training if _drops(module) or _experts_drop(module)), None):
        raise ValueError(
            f"a forward with a cache in training mode, and dropout acts at {path}: call model.eval() before it, or "
            "give neither use_cache=True nor past_key_values"
        )


def _drops(module: nn.Module) -> bool:
    rates = [getattr(module, "attention_dropout", 0.0), getattr(module, "dropout", 0.0)]
    if isinstance(module, nn.Dropout):
        rates.append(module.p)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _experts_drop(module: nn.Module) -> bool:
    """Whether it is a bank with rates of dropout, one for each expert."""
    rates = getattr(module, "dropout", None)
    return isinstance(rates, tuple) and any(rates) and getattr(module, "expert_dropout", "off") != "off"
