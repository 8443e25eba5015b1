"""A small RoBERTa with random weights, for tries and tests of heads and adapters on an encoder: no download, no files.

Its words are w05 … w59, split at white space. Nothing was learnt: what an expert can do over it, it does by itself.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

from mole.backbones.heads import seeded
from mole.backbones.load import Attention, Backbone, Dtype, as_backbone, resolve_device
from mole.head import Head
from mole.registry import BACKBONES, config_dataclass

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
WORDS = tuple(f"w{number:02d}" for number in range(len(SPECIAL), 60))


@config_dataclass
class TinyEncoderConfig:
    """The random encoder: 4 layers, width 64; `weights_seed` makes its weights."""

    name: Literal["tiny_encoder"] = "tiny_encoder"
    weights_seed: int = 0
    dtype: Dtype = "float32"
    device: str = "auto"
    attention: Attention = "auto"


@BACKBONES.register("tiny_encoder", TinyEncoderConfig)
def load_tiny_encoder(config: TinyEncoderConfig, *, head: Head | None = None, seed: int = 0) -> Backbone:
    """The encoder under the head that the data asks for. Raises ValueError for data that asks for none."""
    if head is None:
        raise ValueError(
            "backbone=tiny_encoder writes no text: give data to classify, such as dataset=majority_a, or backbone=tiny"
        )
    with seeded(config.weights_seed):
        model = RobertaForSequenceClassification(_config(config, head))
    with seeded(seed):
        for module in model.classifier.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.02)
                torch.nn.init.zeros_(module.bias)
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    torch.nn.Module.to(model, resolve_device(config.device), dtype)
    model = model.requires_grad_(False).eval()
    return as_backbone(model, tokenizer(), f"mole/tiny-encoder-{config.weights_seed}", head=head)


def _config(config: TinyEncoderConfig, head: Head) -> RobertaConfig:
    more: dict[str, Any] = {"num_labels": head.size}
    if config.attention != "auto":
        more["attn_implementation"] = config.attention
    return RobertaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=130,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        **more,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One id per word; `<s>` before and `</s>` after a text, pairs as RoBERTa has them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    ids = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
