"""Generation: transformers' `generate` for a mixture, with what it asks of the class that generates."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, NoReturn

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
        _refuse_paged(args, kwargs)
        self._check_embeddings(kwargs)
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

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: continuous batching keeps one paged cache for all sequences."""
        raise ValueError(
            "continuous batching and paged caches hold one stream of keys and values for packed sequences, which no "
            "routing is told apart in: call generate(), with its dynamic cache"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch  # type: ignore[assignment]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict:
        """As the backbone does it; `inputs_embeds` by its name, as transformers looks for it there."""
        given = {} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        return self.backbone.prepare_inputs_for_generation(input_ids, *args, **given, **kwargs)

    def _check_embeddings(self, kwargs: dict[str, Any]) -> None:
        """Raises ValueError where the backbone would leave `inputs_embeds` out after the first token, or altogether."""
        if kwargs.get("inputs_embeds") is None:
            return
        if "inputs_embeds" not in signature(self.backbone.prepare_inputs_for_generation).parameters:
            name = type(self.backbone).__name__
            raise ValueError(f"inputs_embeds: a {name} generates from tokens only: give input_ids instead")
        settings = kwargs.get("generation_config") or self.generation_config
        use_cache = kwargs.get("use_cache")
        use_cache = getattr(settings, "use_cache", None) if use_cache is None else use_cache
        if use_cache is False and kwargs.get("input_ids") is None and not self.backbone.config.is_encoder_decoder:
            raise ValueError(
                "inputs_embeds with use_cache=False: each token after the first would be made without the prompt, "
                "whose tokens are not known: leave use_cache as it is, or give input_ids too"
            )

    # transformers asks these of the class that generates; the backbone knows the answers.
    def _validate_model_kwargs(self, model_kwargs: dict) -> None:
        self.backbone._validate_model_kwargs(model_kwargs)

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        return self.backbone._supports_default_dynamic_cache()

    def _supports_logits_to_keep(self) -> bool:
        return self.backbone._supports_logits_to_keep()


def _refuse_paged(args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for transformers' way into continuous batching."""
    configs = [kwargs.get("generation_config"), *args[1:2]]
    kinds = [kwargs.get("cache_implementation"), *(getattr(one, "cache_implementation", None) for one in configs)]
    if "paged" in kinds:
        raise ValueError(
            "cache_implementation='paged' batches continuously, with one paged cache for both passes: leave it out, or "
            "use 'dynamic' or 'static'"
        )
