"""Small random backbones with a head for whole texts, and bottlenecks on them whose numbers are not their first."""

import torch
import transformers as t

from mole.adapters import attach
from mole.registry import ADAPTERS

torch.set_num_threads(1)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
TEXT = {**SMALL, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 3}
WIDE = {"initializer_range": 0.3}
BUILD = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT, **WIDE)),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**TEXT, **WIDE)),
    "deberta-v2": lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**TEXT, **WIDE)),
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(
            dim=16,
            hidden_dim=24,
            n_heads=2,
            n_layers=2,
            vocab_size=32,
            pad_token_id=0,
            num_labels=3,
            initializer_range=0.2,
        )
    ),
    "mpnet": lambda: t.MPNetForSequenceClassification(t.MPNetConfig(**TEXT, **WIDE)),
    "modernbert": lambda: t.ModernBertForSequenceClassification(
        t.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2)
    ),
    "llama": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**TEXT, **WIDE)),
    "gpt2": lambda: t.GPT2ForSequenceClassification(
        t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, pad_token_id=0, num_labels=3, bos_token_id=1)
    ),
}
POST_NORM = ("bert", "roberta", "deberta-v2", "distilbert", "mpnet")
# End of the last linear map → modules of the block: the first that reads x, the last that gives h, the norm.
SPLIT = {
    "attention.out_lin": ("attention.q_lin", "attention.out_lin", "sa_layer_norm"),
    "ffn.lin2": ("ffn.lin1", "ffn.dropout", "output_layer_norm"),
    "attention.attn.o": ("attention.attn.q", "attention.dropout", "attention.LayerNorm"),
}
HEADS = {"llama": "score", "gpt2": "score"}  # of the others: classifier
PRESETS = ("houlsby", "pfeiffer", "parallel")
IDS = torch.arange(3, 17).reshape(2, 7)


def backbone(family):
    torch.manual_seed(0)
    model = BUILD[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at 0, norms at 1: nothing would be seen of them
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def split_of(path):
    """Paths of the modules where x, h and the norm of that split site are; None of other sites."""
    for end, parts in SPLIT.items():
        if path.endswith(f".{end}"):
            return tuple(f"{path.removesuffix(end)}{part}" for part in parts)
    return None


def config(preset, **options):
    small = {"size": 5, "reduction_factor": None}
    if {"size", "reduction_factor"} & set(options):
        small = {"size": None, "reduction_factor": None}
    return ADAPTERS[preset].config(**{**small, **options})


def moved(model, seed=1, by=0.3):
    """Every trainable number somewhere else, so that it acts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * by
    return model


def adapted(family, preset, *, seed=0, trained=(), **options):
    """The backbone with a new adapter on it, and what was put there."""
    model = backbone(family)
    return model, attach(model, config(preset, **options), seed=seed, trained=trained)
