"""Encoder–decoder backbones (T5, BART): the encoder and the decoder each run twice, under one router.

The first decoder pass reads the first encoder pass, the second the second. Layers of the encoder, and the keys and
values that the decoder makes of it, spend the encoder's gates; all other layers of the decoder spend the decoder's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from mole.mixtures.placing import batch_rows, placed
from mole.mixtures.two_pass.cache import TwoStreamCache
from mole.mixtures.two_pass.routing_pass import constant_frame, dropout_off, last_hidden_state
from mole.routers import Router
from mole.routing import Frame, Routing, RoutingInputs

# Inputs of the whole forward that are none of the encoder's.
_NOT_THE_ENCODERS = ("decoder_", "cross_attn", "use_cache", "past_key_values", "cache_", "labels", "encoder_outputs")
_CROSS = re.compile(
    r"(?:^|\.)(?:EncDecAttention|encoder_attn|crossattention|cross_attn|cross_attention)\."
    r"(?:self\.)?(?:k|v|kv|key|value)(?:_proj)?$"
)


def is_one(backbone: PreTrainedModel) -> bool:
    """Whether the backbone has an encoder and a decoder that reads it."""
    if not getattr(backbone.config, "is_encoder_decoder", False):
        return False
    return hasattr(backbone.base_model, "decoder") and hasattr(backbone.base_model, "encoder")


@dataclass
class RoutedEncoderOutput(BaseModelOutput):
    """What the encoder gave in both passes; `routing_state` [B, T, H] is the first one's. Beams copy both."""

    routing_state: Tensor | None = None


class RoutedEncoder:
    """The encoder of a mixture: called as the backbone's own, it runs both passes. For `generate`."""

    def __init__(self, model: Any):
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"].backbone.get_encoder(), name)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As the backbone's encoder; where a router reads hidden states, the output is a RoutedEncoderOutput."""
        model, given = self.model, {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        frame = model.new_frame(RoutingInputs(input_ids=input_ids, attention_mask=attention_mask))
        router = model.router if frame.router is None else frame.router
        if router is not None and frame.experts_enabled and frame.fixed is None:
            if "hidden_states" in router.needs:
                return encoded(model, router, frame, given)
            frame.routings = placed(model, router(None, frame), batch_rows(given))
        with model.context.push(frame):
            return model.backbone.get_encoder()(**_encoders(model, given))

    __call__ = forward


def encoded(model: Any, router: Router, frame: Frame, inputs: dict[str, Any]) -> RoutedEncoderOutput:
    """Both passes of the encoder, and a report of its own."""
    encoder, given = model.backbone.get_encoder(), _encoders(model, inputs)
    plain = {name: value for name, value in given.items() if not name.startswith("output_")}
    dropout = model.options.scaling_pass_dropout
    with model.context.push(constant_frame(model, router)), torch.no_grad(), dropout_off(encoder, unless=dropout):
        state = encoder(**plain).last_hidden_state
    own = replace(frame, routings={}, seen={}, inputs=replace(frame.inputs, hidden_states=state))
    own.routings = placed(model, router(None, own), state.shape[0])
    with model.context.push(own):
        output = encoder(**given)
    if frame.recording and model.listeners:
        model.report(replace(own, seen=own.routings), model.phase(None, frame))
    return RoutedEncoderOutput(**output, routing_state=state)


def read_encoder_first(model: Any, frame: Frame, inputs: dict[str, Any]) -> None:
    """Runs the encoder, under the current frame, before the decoder's routers ask for what it gave."""
    if inputs.get("encoder_outputs") is None:
        inputs["encoder_outputs"] = model.backbone.get_encoder()(**_encoders(model, inputs))
    frame.inputs = replace(frame.inputs, encoder_states=inputs["encoder_outputs"][0])


def route(
    model: Any, router: Router, frame: Frame, inputs: dict[str, Any], pair: TwoStreamCache | None
) -> dict[str, Routing]:
    """Site → routing for the mixture pass; puts both states of the encoder where the two passes find them.

    The report of the forward is the decoder's. Raises ValueError for an encoder's output that was made elsewhere, and
    for what works with decoders only.
    """
    if router.gate_refresh > 1 or router.gate_freeze_after is not None:
        raise ValueError("gate_refresh and gate_freeze_after are for backbones without an encoder")
    if model.hidden_store is not None:
        raise ValueError("hidden states of the routing pass are kept for backbones without an encoder only")
    starts = pair is None or pair.get_seq_length() == 0
    before = inputs.get("encoder_outputs")
    states = encoded(model, router, frame, inputs) if before is None else before
    if not isinstance(states, RoutedEncoderOutput) or states.routing_state is None:
        raise ValueError(
            "encoder_outputs holds one pass of the encoder, and the router needs two: give input_ids instead, or what "
            "the mixture's own get_encoder() returns"
        )
    inputs["encoder_outputs"] = states
    given = {**inputs, "encoder_outputs": BaseModelOutput(last_hidden_state=states.routing_state)}  # type: ignore[arg-type]
    if inputs.get("labels") is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        given["decoder_input_ids"] = model.backbone.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    with model.context.push(constant_frame(model, router)):
        hidden = _decoder_state(model, given, pair.scaling if pair else None)
    across: dict[str, Routing] = {}
    if starts and any(map(reads_encoder, model.sites)):  # later the keys and values are there
        frame.inputs = replace(frame.inputs, hidden_states=states.routing_state)
        across = placed(model, router(None, frame), states.routing_state.shape[0])
    ids, mask = given.get("decoder_input_ids"), given.get("decoder_attention_mask")
    frame.inputs = replace(frame.inputs, input_ids=ids, attention_mask=mask, hidden_states=hidden)
    routings = placed(model, router(None, frame), hidden.shape[0])
    if frame.recording:
        frame.recording, frame.seen = False, dict(routings)
    return {site: across.get(site, own) if reads_encoder(site) else own for site, own in routings.items()}


def _decoder_state(model: Any, inputs: dict[str, Any], cache: Cache | None) -> Tensor:
    """[B, T, H] of the decoder's first pass. T5 with a head has no inner model: its decoder is called."""
    backbone, dropout = model.backbone, model.options.scaling_pass_dropout
    if backbone.base_model is not backbone:
        return last_hidden_state(backbone, inputs, cache, names=model.pass_inputs, dropout=dropout)
    renames = {"decoder_input_ids": "input_ids", "decoder_attention_mask": "attention_mask"}
    renames |= {"decoder_inputs_embeds": "inputs_embeds", "attention_mask": "encoder_attention_mask"}
    given = {new: inputs[old] for old, new in renames.items() if inputs.get(old) is not None}
    given |= {"past_key_values": cache, "use_cache": cache is not None, "return_dict": True}
    states = inputs["encoder_outputs"].last_hidden_state
    with torch.no_grad(), dropout_off(backbone, unless=dropout):
        return backbone.get_decoder()(**given, encoder_hidden_states=states).last_hidden_state


def reads_encoder(site: str) -> bool:
    """Whether a module of the decoder makes keys or values of what the encoder gave."""
    return _CROSS.search(site) is not None


def check_widths(backbone: PreTrainedModel) -> None:
    """Raises ValueError for an encoder and a decoder of unlike widths: one router cannot read both."""
    config = backbone.config
    parts = [getattr(config, name, None) for name in ("encoder", "decoder")]
    widths = {getattr(part, "hidden_size", None) for part in parts} - {None}
    if len(widths) > 1:
        raise ValueError(
            f"encoder and decoder have unlike widths {sorted(map(str, widths))}, and one router reads both"
        )


def _encoders(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Of the inputs of a forward those that the encoder takes."""
    takes = signature(model.backbone.get_encoder().forward).parameters
    kept = {name: value for name, value in inputs.items() if not name.startswith(_NOT_THE_ENCODERS)}
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in takes.values()):
        return kept
    return {name: value for name, value in kept.items() if name in takes}
