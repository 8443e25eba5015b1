"""Heads for whole texts on a backbone: the model's own, or one linear map of a pooled hidden state.

native  what transformers' sequence classification puts on the model, pooler included
linear  logits = W p + b, p the hidden state of the first token (cls), of the last real one (last), or their mean
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from mole.backbones.modules import reads_left_to_right
from mole.head import Head

HeadKind = Literal["native", "linear"]
Pooling = Literal["auto", "cls", "mean", "last"]
CLASSIFIER = "classifier"


class LinearHead(PreTrainedModel):
    """A model without a head of its own, under its usual name, and a linear map of its pooled hidden states."""

    # The inner model has answered for its attention already.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, inner: Any, outputs: int, pooling: str):
        super().__init__(inner.config)
        self.base_model_prefix = inner.base_model_prefix or "model"
        setattr(self, self.base_model_prefix, inner)
        self.pooling = pooling
        self.classifier = nn.Linear(inner.config.get_text_config().hidden_size, outputs)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    @property
    def supports_gradient_checkpointing(self) -> bool:  # type: ignore[override]
        return bool(self.base_model.supports_gradient_checkpointing)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """`input_ids`, `attention_mask` [B, T] → logits [B, C]."""
        given = {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        inputs = {name: value for name, value in given.items() if value is not None}
        states = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs, **kwargs)[0]
        mask = torch.ones_like(states[..., 0]) if attention_mask is None else attention_mask.to(states.dtype)
        return SequenceClassifierOutput(logits=self.classifier(pooled(states, mask, self.pooling)))


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector per example [B, H] of hidden states [B, T, H]; `mask` [B, T] is 1 at real tokens."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "mean":
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask.ne(0)).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


def class_for(kind: HeadKind) -> Any:
    """What loads the model under a head of that kind."""
    return AutoModelForSequenceClassification if kind == "native" else AutoModel


def options_for(kind: HeadKind, head: Head) -> dict[str, Any]:
    """Keywords of `from_pretrained` for that head."""
    if kind == "linear":
        return {}
    labels = head.labels or ("value",)
    return {
        "num_labels": head.size,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "regression" if head.kind == "regression" else "single_label_classification",
    }


def with_head(model: Any, kind: HeadKind, pooling: Pooling, head: Head) -> Any:
    """The loaded model under its head. Raises ValueError for a pooling that cannot act."""
    if kind == "native":
        if pooling != "auto":
            raise ValueError(
                f"backbone.pooling={pooling} acts with backbone.head=linear: the native head pools by itself"
            )
        return model
    if pooling == "auto":
        pooling = "last" if reads_left_to_right(model) else "cls"
    return LinearHead(model, head.size, pooling).to(model.dtype)


def head_modules(model: Any) -> tuple[str, ...]:
    """Paths of the head's modules: what stands beside the inner model and has parameters."""
    inner = model.base_model
    return tuple(
        name
        for name, child in model.named_children()
        if child is not inner and next(child.parameters(), None) is not None
    )


def pooler_of(model: Any) -> str | None:
    """Path of the pooler of the inner model, if the native head reads it."""
    inner = model.base_model
    pooler = getattr(inner, "pooler", None)
    if isinstance(model, LinearHead) or not isinstance(pooler, nn.Module) or inner is model:
        return None
    return f"{model.base_model_prefix}.pooler"


def check_padding(tokenizer: Any, model: Any, kind: HeadKind, source: str) -> None:
    """Tells the model what padding is. Raises ValueError where its head finds the last token by a padding token that
    the tokenizer has not.
    """
    if reads_left_to_right(model) and kind == "native" and tokenizer.pad_token_id is None:
        raise ValueError(
            f"backbone {source}: its tokenizer has no padding token, by which the native head finds the last token: "
            "set backbone.head=linear, which goes by the mask"
        )
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def in_float32(model: Any, paths: Sequence[str]) -> None:
    """Keeps these modules of a model in float32, as they are trained: what they read is brought to it."""
    for path in paths:
        for part in model.get_submodule(path).float().modules():
            if next(part.parameters(recurse=False), None) is not None:
                part.register_forward_pre_hook(_to_float32)


def _to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


@contextmanager
def seeded(seed: int):
    """New weights in the body depend on `seed` alone; the random stream outside does not move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
