"""An attention that sees more keys and values than its tokens have: those of prefixes, in front of its own.

The attention module runs as it is. It gets a cache that puts the prefix before what it gives back, and a mask with a
column for each key of the prefix; so the real cache holds tokens only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mole.adapters.places import check_decoder, inner_model

_ATTENTION = ("eager", "sdpa")
_CACHES = ("past_key_values", "past_key_value", "layer_past")


@dataclass(frozen=True, eq=False)
class AttentionFacts:
    """What is to be known of an attention: its key heads and their width, its arguments by place, its rotation.

    `rotary` the backbone's rotary embedding, `rotate` what applies its cosines and sines, `layer_type` its argument
    where blocks differ in their rotation. `cache` what the attention calls its cache.
    """

    heads: int
    head_dim: int
    arguments: tuple[str, ...]
    rotary: nn.Module
    rotate: Any
    cache: str
    layer_type: str | None = None

    def __deepcopy__(self, memo: dict) -> AttentionFacts:
        """The copy of a model has a rotary embedding of its own, with the same numbers: this one serves both."""
        return self

    def turned(self, keys: Tensor, lengths: Sequence[int]) -> Tensor:
        """`keys` [Σ m_e, heads, d_head], each turned back by the length m_e of its prefix."""
        places = torch.tensor([-length for length in lengths for _ in range(length)], device=keys.device)[None]
        more = {} if self.layer_type is None else {"layer_type": self.layer_type}
        cos, sin = self.rotary(keys, position_ids=places, **more)
        cos, sin = cos.to(keys), sin.to(keys)
        size = torch.hypot(
            cos, sin
        )  # some rotations scale the keys as well: those of a prefix are as they were trained
        width = cos.shape[-1]
        part = keys[..., :width].transpose(0, 1)[None]  # [1, heads, Σ m, width]
        part = self.rotate(part, part, cos / size, sin / size)[1]
        return torch.cat([part[0].transpose(0, 1), keys[..., width:]], dim=-1)


def facts_of(attention: nn.Module, model: Any) -> AttentionFacts:
    """Raises ValueError, with the reason, for an attention that no prefix can be put into."""
    config = model.config.get_text_config()
    check_decoder(model, "prefixes")
    used = getattr(config, "_attn_implementation", None) or "eager"
    if used not in _ATTENTION:
        raise ValueError(
            f"the attention {used} takes no mask with weights, which a prefix needs: load the backbone with "
            f"backbone.attention={' or '.join(_ATTENTION)}"
        )
    arguments = tuple(signature(type(attention).forward).parameters)[1:]
    cache = next((name for name in _CACHES if name in arguments), None)
    if cache is None or not {"hidden_states", "attention_mask"} <= set(arguments):
        raise ValueError(f"a {type(attention).__name__} takes no attention_mask, or no cache that is called as others")
    rotary = next((m for n, m in inner_model(model)[1].named_modules() if n.rsplit(".", 1)[-1] == "rotary_emb"), None)
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or rotate is None:
        raise ValueError(
            "prefixes need rotary positions: with positions that are learned, or none, the tokens after a prefix "
            "would have other places in each expert; use adapter=prompt"
        )
    if hasattr(attention, "kv_a_proj_with_mqa") or hasattr(attention, "num_kv_heads"):
        raise ValueError(f"a {type(attention).__name__} has heads of its own kind: no prefix fits them")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    said = (getattr(attention, name, None) for name in ("head_dim", "head_size"))
    head_dim = next((width for width in said if width), config.hidden_size // config.num_attention_heads)
    types = getattr(config, "layer_types", None)
    takes_type = types and "layer_type" in signature(type(rotary).forward).parameters
    layer_type = types[attention.layer_idx] if takes_type else None  # type: ignore[index]
    return AttentionFacts(heads, head_dim, arguments, rotary, rotate, cache, layer_type)


def attend(
    attention: nn.Module,
    facts: AttentionFacts,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
) -> Any:
    """The attention called with these arguments, in which all tokens see `keys` and `values` too.

    `keys`, `values` [1|B, heads, m, d_head]; `bias` [1|B, 1, 1|T, m] is added to the products of queries and these
    keys; None: 0.
    """
    given = {**dict(zip(facts.arguments, args, strict=False)), **kwargs}
    x, cache = given["hidden_states"], given.get(facts.cache)
    mask: Any = given.get("attention_mask")
    if mask is None:
        mask = _own_mask(attention, x, cache)
    elif mask.dim() != 4:
        raise ValueError(f"a prefix needs the mask of a whole attention, [B, 1, T, S], and got {tuple(mask.shape)}")
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
    first = mask.new_zeros(1, 1, 1, keys.shape[2]) if bias is None else bias.to(mask.dtype)
    lead = torch.broadcast_shapes(mask.shape[:-1], first.shape[:-1])
    mask = torch.cat([first.expand(*lead, -1), mask.expand(*lead, -1)], dim=-1)
    return attention(**{**given, "attention_mask": mask, facts.cache: _InFront(cache, keys, values)})


def _own_mask(attention: nn.Module, x: Tensor, cache: Any) -> Tensor:
    """What an attention without a mask does, as one: tokens see themselves and earlier ones, from the first on."""
    tokens = x.shape[1]
    length = tokens if cache is None else cache.get_mask_sizes(tokens, attention.layer_idx)[0]
    mask = torch.zeros(tokens, length, dtype=x.dtype, device=x.device)
    if tokens > 1 and getattr(attention, "is_causal", True):
        seen = torch.ones(tokens, length, dtype=torch.bool, device=x.device).tril()
        mask = mask.masked_fill(~seen, torch.finfo(x.dtype).min)
    return mask[None, None]


class _InFront:
    """The cache as the attention sees it: what it gives back begins with the prefix."""

    def __init__(self, cache: Any, keys: Tensor, values: Tensor):
        self.cache, self.keys, self.values = cache, keys, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = keys.shape[0]
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        first = [part.to(keys.dtype).expand(rows, -1, -1, -1) for part in (self.keys, self.values)]
        return torch.cat([first[0], keys], dim=2), torch.cat([first[1], values], dim=2)
