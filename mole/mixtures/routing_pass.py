"""The routing pass: the backbone under the router's constant routing, for its last hidden state and nothing else.

It has a KV cache of its own; neither head nor loss run; base dropout is off.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from mole.mixtures.cache import TwoStreamCache

# Inputs of the full forward that the routing pass has no use for.
_DROPPED = ("labels", "logits_to_keep", "num_items_in_batch", "return_dict", "past_key_values", "use_cache")


@torch.no_grad()
def last_hidden_state(backbone: PreTrainedModel, inputs: dict[str, Any], cache: Cache | None) -> Tensor:
    """[B, T, H] after the final norm: transformers' `hidden_states[-1]` of the same inputs. Fills `cache`."""
    kept = {k: v for k, v in inputs.items() if k not in _DROPPED and not k.startswith("output_")}
    with _dropout_off(backbone):
        output = backbone.base_model(**kept, past_key_values=cache, use_cache=cache is not None)
    return output.last_hidden_state


class Streams:
    """Finds the two KV streams of a forward. Plain caches that were empty when they came are remembered, weakly."""

    def __init__(self):
        self._scaling: weakref.WeakKeyDictionary[Cache, tuple[Cache, tuple]] = weakref.WeakKeyDictionary()

    def pair(self, cache: Any, *, use_cache: bool, config: Any, fingerprint: tuple) -> TwoStreamCache | None:
        """The pair for this forward: the caller's own, one around the caller's empty cache, or a new one.

        None if nothing is to be cached. Raises ValueError for a cache of unknown origin that holds tokens already,
        and for a pair that was filled under another state of the router.
        """
        if cache is None:
            return TwoStreamCache(DynamicCache(config=config), fingerprint=fingerprint) if use_cache else None
        if not isinstance(cache, Cache):
            raise ValueError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")
        pair = cache if isinstance(cache, TwoStreamCache) else self._around(cache, fingerprint)
        if pair.fingerprint != fingerprint:
            if pair.get_seq_length() > 0:
                raise ValueError("the router changed since this cache was filled: start from an empty cache")
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


@contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    """Eval mode for the body if some dropout would act; every training flag is as before afterwards."""
    training = [module for module in model.modules() if module.training]
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


def _drops(module: nn.Module) -> bool:
    rates = [getattr(module, "attention_dropout", 0.0), getattr(module, "dropout", 0.0)]
    if isinstance(module, nn.Dropout):
        rates.append(module.p)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
