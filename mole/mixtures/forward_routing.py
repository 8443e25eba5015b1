"""Before the layers run: fills the frame of a forward with its routings, by a routing pass if the router needs one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mole.mixtures.keeping import kept
from mole.mixtures.placing import batch_rows, placed
from mole.mixtures.two_pass import encoder_decoder, gate_reuse
from mole.mixtures.two_pass.cache import TwoStreamCache
from mole.mixtures.two_pass.routing_pass import check_dropout, constant_frame, last_hidden_state
from mole.registry import unknown
from mole.routers import Router
from mole.routing import Frame, Routing
from mole.routing.routing import EMPTY


def given_routing(model: Any, weights: Mapping[str, float] | Routing) -> Routing:
    """A routing that a caller hands in: name → weight (others 0), or data.

    Raises ValueError for experts that the mixture does not have.
    """
    names = model.expert_names
    if not isinstance(weights, Routing):
        for name in weights:
            if name not in names:
                raise ValueError(unknown("expert", name, names))
        row = [float(weights.get(name, 0.0)) for name in names]
        return Routing(torch.tensor(row, device=model.device).view(1, 1, -1))
    known = f"the mixture has {len(names)} ({', '.join(names)})"
    if weights.expert_ids is None and weights.weights.shape[-1] != len(names):
        raise ValueError(f"routing: weights of {weights.weights.shape[-1]} experts, and {known}; or give expert_ids")
    if weights.expert_ids is not None and not torch.compiler.is_compiling():
        odd = [i for i in weights.expert_ids.unique().tolist() if not EMPTY <= i < len(names)]
        if odd:
            raise ValueError(f"routing: no expert has the id {', '.join(map(str, odd))}: {known}; {EMPTY} is no expert")
    return weights


def route(model: Any, frame: Frame, inputs: dict[str, Any]) -> TwoStreamCache | None:
    """Fills the frame's routings where one router serves the model.

    Puts what the mixture pass needs into `inputs`; returns the pair of caches that the caller gets back. Raises
    ValueError for a pair of caches where there is no routing pass.
    """
    if any("encoder_states" in router.needs for router in model.routers().values()):
        encoder_decoder.read_encoder_first(model, frame, inputs)
    router: Router | None = model.router if frame.router is None else frame.router
    if not frame.experts_enabled or frame.fixed is not None:
        router = None
    if router is None or "hidden_states" not in router.needs:
        if isinstance(inputs.get("past_key_values"), TwoStreamCache):
            raise ValueError("this cache was filled under a routing pass: it cannot go on without one")
        if router is not None:
            rows = batch_rows(inputs)
            if "embeddings" in router.needs:
                frame.inputs = replace(frame.inputs, embeddings=_apart(frame, _embeddings(model, inputs)))
            routed = kept(frame, "", rows, partial(router, None, frame)) if router.keeps else router(None, frame)
            frame.routings = placed(model, routed, rows, frame.packing)
        return None
    cache, use_cache, pair = inputs.get("past_key_values"), inputs.get("use_cache", False), None
    if cache is not None or use_cache:
        if model.training:
            check_dropout(model)
        fingerprint = (model.streams.name_of(router), *router.fingerprint(), *_expert_versions(model))
        pair = model.streams.pair(cache, use_cache=use_cache, config=model.config, fingerprint=fingerprint)
    if encoder_decoder.is_one(model.backbone):
        frame.routings = encoder_decoder.route(model, router, frame, inputs, pair)
    else:
        run = partial(_routing_pass, model, router, pair)
        routed = gate_reuse.route(router, frame, inputs, pair, lambda seen: _apart(frame, run(seen)))
        frame.routings = placed(model, routed, batch_rows(inputs), frame.packing)
    if pair is not None:
        inputs["past_key_values"] = pair.mixture
    return pair


def _apart(frame: Frame, states: Any) -> Any:
    """What a router reads of `states` [B, T, H]: those of each sample where rows are packed."""
    return states if frame.packing is None or states is None else frame.packing.apart(states)


def _embeddings(model: Any, inputs: dict[str, Any]) -> Tensor | None:
    if inputs.get("inputs_embeds") is not None or inputs.get("input_ids") is None:
        return inputs.get("inputs_embeds")
    return model.backbone.get_input_embeddings().weight.detach()[inputs["input_ids"]]


def _expert_versions(model: Any) -> tuple[int, ...]:
    """How often the experts were changed; none for frozen ones, which nothing changes."""
    layers = model.layers.values()
    return tuple(p._version for layer in layers for p in layer.bank.parameters()) if model.trains_experts else ()


def _routing_pass(model: Any, router: Router, pair: TwoStreamCache | None, inputs: dict[str, Any]) -> Tensor:
    constant = constant_frame(model, router)
    outer = model.context.current
    generating = outer is not None and outer.generating

    def run(inputs: dict[str, Any]) -> Tensor:
        scaling = pair.scaling if pair else None
        # `generate` is in eval mode as a whole: nothing to look for
        dropout = model.options.scaling_pass_dropout or generating
        with model.context.push(constant):
            return last_hidden_state(model.backbone, inputs, scaling, names=model.pass_inputs, dropout=dropout)

    if model.hidden_store is None or not model.training or pair is not None:
        return run(inputs)
    if constant.experts_enabled:
        raise ValueError("hidden states can be kept only if no expert works in the routing pass: its gates are not 0")
    if model.options.scaling_pass_dropout:
        raise ValueError("hidden states can be kept only if no dropout acts in the routing pass: scaling_pass_dropout")
    names = ("input_ids", "attention_mask", "position_ids")
    others = [n for n in inputs if n not in (*names, *model.pass_inputs.dropped) and not n.startswith("output_")]
    if others:
        raise ValueError(f"hidden states are kept by {', '.join(names)}; this forward has {', '.join(others)} too")
    valid = None if outer is None or outer.packing is None else outer.packing.segment_ids >= 0
    given = {name: inputs[name] for name in names if name in inputs}
    return model.hidden_store.hidden_states(given, run, valid, by_place=model.pass_inputs.by_place)
