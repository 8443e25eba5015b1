"""A model that reads virtual tokens before the text: its inputs extended, its outputs cut to the text again.

Shapes: B rows, T tokens of the text in this forward, m virtual tokens, P tokens that a cache holds already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def prompted(
    base: nn.Module,
    prompts: Tensor,
    there: Tensor | None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """`base`, an inner model, with `prompts` [1|B, m, d] before its input, and its output without them.

    `there` bool [1|B, m]: which virtual tokens a row has; they stand at its end. None: all. With a cache that holds
    tokens the prompts are in it already. Positions of the text go on from those of the prompt. Raises ValueError for a
    mask that is no row per example.
    """
    embeddings: Any = inputs_embeds
    if embeddings is None:
        assert input_ids is not None, "input_ids or inputs_embeds"
        embeddings = base.get_input_embeddings()(input_ids)  # type: ignore[operator]
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        raise ValueError("prompts need a mask [B, T]: static caches and masks of whole attentions are not for them")
    rows, tokens = embeddings.shape[:2]
    size, device = prompts.shape[1], embeddings.device
    held = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    there = torch.ones(1, size, dtype=torch.bool, device=device) if there is None else there
    there = there.expand(rows, -1)
    before = max(held - size, 0)
    lengths = there.sum(1, keepdim=True)
    if position_ids is None:
        position_ids = _positions(attention_mask, before, tokens, device)
    position_ids = position_ids + lengths
    if attention_mask is None:
        attention_mask = torch.ones(rows, before + tokens, dtype=torch.long, device=device)
    mask = torch.cat([there.to(attention_mask.dtype), attention_mask], dim=1)
    if not held:
        embeddings = torch.cat([prompts.to(embeddings.dtype).expand(rows, -1, -1), embeddings], dim=1)
        own = (there.long().cumsum(1) - 1).clamp_min(0)
        position_ids = torch.cat([own, position_ids], dim=1)
    output = base(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        **kwargs,
    )
    return output if held else _cut(output, size)


def _positions(mask: Tensor | None, before: int, tokens: int, device: torch.device) -> Tensor:
    """Of the text by itself, [1|B, T]: padding before it takes no place."""
    if mask is None:
        return torch.arange(before, before + tokens, device=device)[None]
    return (mask.long().cumsum(1) - 1).clamp_min(0)[:, -tokens:]


def _cut(output: Any, size: int) -> Any:
    """The output for the positions of the text."""
    if isinstance(output, tuple):
        return (output[0][:, size:], *output[1:])
    output.last_hidden_state = output.last_hidden_state[:, size:]
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(state[:, size:] for state in output.hidden_states)
    if getattr(output, "attentions", None) is not None:
        output.attentions = tuple(None if a is None else a[:, :, size:] for a in output.attentions)
    return output
