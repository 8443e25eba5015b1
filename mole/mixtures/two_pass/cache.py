"""Two KV caches for one sequence: one for the routing pass, one for the pass that spends the routing.

With causal attention the keys and values of either pass at a position depend on earlier tokens only, and the routing
of a token depends on its own hidden state only; so two append-only caches reproduce full recomputation exactly, and
a decode step is one token through each pass. One cache shared by both passes would be wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache


class TwoStreamCache(Cache):
    """`scaling`, the cache of the routing pass, and `mixture`, that of the mixture pass, of the same kind.

    Operations on the state go to both; queries are answered by `mixture`. Passing the pair to a plain model raises
    RuntimeError: its keys and values belong to two different passes.
    """

    def __init__(self, mixture: Cache, scaling: Cache | None = None, fingerprint: tuple = ()):
        # Not Cache.__init__: this object holds no layers of its own.
        if scaling is None:
            if mixture.get_seq_length() > 0:
                raise ValueError(
                    "a TwoStreamCache starts from an empty cache: the routing pass has not seen these tokens"
                )
            scaling = copy.deepcopy(mixture)
        self.mixture = mixture
        self.scaling = scaling
        self.fingerprint = fingerprint
        self.reuse: Any = None  # a GateReuse where gates are reused while decoding

    @property
    def layers(self) -> Any:  # type: ignore[override]
        """The layers of the mixture stream."""
        return self.mixture.layers

    def __getattr__(self, name: str) -> Any:
        if name in ("mixture", "scaling", "reuse"):  # not set yet: while unpickling or copying
            raise AttributeError(name)
        return getattr(self.mixture, name)

    def __repr__(self) -> str:
        return f"TwoStreamCache(mixture={self.mixture!r}, scaling={self.scaling!r})"

    def __len__(self) -> int:
        return len(self.mixture)

    def update(self, *args: Any, **kwargs: Any):
        """Refused: a layer writes to one of the two streams, never to the pair."""
        raise RuntimeError(
            "a TwoStreamCache was passed to a model that is no mixture with a routing pass; "
            "give that model a cache of its own"
        )

    update_conv_state = update_recurrent_state = update_indexer = update

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        self.mixture.early_initialization(*args, **kwargs)
        self.scaling.early_initialization(*args, **kwargs)

    def offload(self, *args: Any, **kwargs: Any) -> None:
        self.mixture.offload(*args, **kwargs)
        self.scaling.offload(*args, **kwargs)

    def prefetch(self, *args: Any, **kwargs: Any) -> None:
        self.mixture.prefetch(*args, **kwargs)
        self.scaling.prefetch(*args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held; RuntimeError if the two streams disagree."""
        length, other = self.mixture.get_seq_length(layer_idx), self.scaling.get_seq_length(layer_idx)
        if length != other + (self.reuse.behind if self.reuse is not None else 0):
            raise RuntimeError(f"the two streams of a TwoStreamCache hold {length} and {other} tokens")
        return length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.mixture.get_max_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.mixture.get_mask_sizes(query_length, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self.mixture.crop(tokens_to_remove)
        if self.reuse is not None:
            tokens_to_remove = -self.reuse.forget(-tokens_to_remove)
        self.scaling.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.mixture.reorder_cache(beam_idx)
        self.scaling.reorder_cache(beam_idx)
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.mixture.batch_repeat_interleave(repeats)
        self.scaling.batch_repeat_interleave(repeats)
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.mixture.batch_select_indices(indices)
        self.scaling.batch_select_indices(indices)
        self._rows(lambda tensor: tensor[indices.to(tensor.device)])

    def _rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.reuse is not None:
            self.reuse.rows(change)

    def reset(self) -> None:
        self.mixture.reset()
        self.scaling.reset()
        self.reuse = None

    def activate_past_recording(self):
        self.mixture.activate_past_recording()
        self.scaling.activate_past_recording()

    @property
    def is_compileable(self) -> bool:
        return self.mixture.is_compileable and self.scaling.is_compileable

    @property
    def is_croppable(self) -> bool:
        return self.mixture.is_croppable and self.scaling.is_croppable

    @property
    def is_initialized(self) -> bool:
        return self.mixture.is_initialized

    @property
    def is_sliding(self) -> list[bool]:
        return self.mixture.is_sliding
