"""What a model with blocks tells them of each forward: hooks on the root that open and close a frame of the context."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from mole.routing import Frame, RoutingContext, RoutingInputs


class RootForward:
    """Holds the context that the blocks of one model share, and opens a frame of it for each forward of the root.

    Blocks read the attention mask and the token ids there; once the forward is over, nothing of it is left. Copies
    and pickles with the model.
    """

    def __init__(self, model: nn.Module):
        self.context = RoutingContext()
        self.parameters = tuple(inspect.signature(model.forward).parameters)
        self.handles = (
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        )

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Opens the frame of this forward."""
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        outer = self.context.current
        cache = given.get("past_key_values")
        inputs = RoutingInputs(input_ids=_tensor(given, "input_ids", (2,)), attention_mask=_mask(given))
        self.context.begin(
            Frame(
                inputs=inputs.over(None if outer is None else outer.inputs),
                generating=cache is not None,
                goes_on=cache is not None and cache.get_seq_length() > 0,
            )
        )

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Closes it, also where the forward failed."""
        if self.context.current is not None:
            self.context.end()

    def remove(self) -> None:
        """Takes the hooks off the root."""
        for handle in self.handles:
            handle.remove()


def _tensor(given: dict[str, Any], name: str, ranks: tuple[int, ...]) -> Tensor | None:
    value = given.get(name)
    return value if isinstance(value, Tensor) and value.dim() in ranks else None


def _mask(given: dict[str, Any]) -> Tensor | None:
    """The mask [B, T] of the tokens of this forward: of a longer one, which covers a cache too, the end.

    None where an encoder and a decoder read tokens of their own: one mask would be taken for the other's.
    """
    if any(name.startswith("decoder_") and value is not None for name, value in given.items()):
        return None
    mask, ids = _tensor(given, "attention_mask", (2,)), given.get("input_ids")
    embeddings = given.get("inputs_embeds")
    tokens = ids if isinstance(ids, Tensor) else embeddings
    if mask is None or not isinstance(tokens, Tensor):
        return mask
    return mask[:, -tokens.shape[1] :]
