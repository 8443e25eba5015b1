"""Generation: transformers' `generate` for a mixture, with what it asks of the class that generates."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from mole.mixtures.two_pass.speculation import require_routing_pass, speculate
from mole.routing import Frame, RoutingContext, RoutingInputs


class Generation(GenerationMixin):
    """The part of `MultiExpertModel` that generates: greedy, sampling, beams, drafts, all of transformers' ways."""

    backbone: Any
    context: RoutingContext
    listeners: list

    def generate(
        self,
        *args: Any,
        task_names: Any = None,
        texts: Any = None,
        prompt_mask: Tensor | None = None,
        self_speculation: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, exact with KV cache. Runs in eval mode; training flags are as before afterwards.

        `self_speculation`: the routing pass drafts the next token, for one read of the weights per token where it is
        right; exact as well. Greedy or sampling; `speculation` then tells how it went.
        """
        outer = self.context.current or Frame()
        model: Any = self
        if self_speculation:
            require_routing_pass(model)
            # transformers hands a streamer to its own decoding methods only.
            kwargs["custom_generate"] = partial(speculate, streamer=kwargs.get("streamer"))
        inputs = RoutingInputs(
            task_names=None if task_names is None else tuple(task_names),
            texts=None if texts is None else tuple(texts),
            prompt_mask=prompt_mask,
        )
        frame = replace(outer, inputs=inputs.over(outer.inputs), generating=True, kept={})
        if kwargs.get("prefill_chunk_size") and any(router.keeps for router in model.routers().values()):
            raise ValueError(f"prefill_chunk_size: router={model.router_config.name} reads the prompt as a whole")
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with self.context.push(frame):
                return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            for module in training:
                module.training = True

    def _reorder_cache(self, cache: Any, beam_idx: Tensor) -> Any:
        """Beams change places: the cache follows, and so do those who listen to the routing."""
        cache.reorder_cache(beam_idx)
        frame = self.context.current
        for state in frame.kept.values() if frame is not None else ():
            if hasattr(state, "reorder"):
                state.reorder(beam_idx)
        for listener in self.listeners:
            if hasattr(listener, "reorder"):
                listener.reorder(beam_idx)  # type: ignore[attr-defined]
        return cache

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict:
        """As the backbone does it."""
        return self.backbone.prepare_inputs_for_generation(*args, **kwargs)

    # transformers asks these of the class that generates; the backbone knows the answers.
    def _validate_model_kwargs(self, model_kwargs: dict) -> None:
        self.backbone._validate_model_kwargs(model_kwargs)

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        return self.backbone._supports_default_dynamic_cache()

    def _supports_logits_to_keep(self) -> bool:
        return self.backbone._supports_logits_to_keep()
