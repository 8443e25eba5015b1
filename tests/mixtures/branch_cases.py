"""Small backbones under heads for whole texts, experts on them that differ in all they may, and their mixtures."""

import torch
import transformers as t

from mole.adapters import attach, attach_weights, extract, layers
from mole.backbones import Backbone
from mole.backbones.load import shapes_digest
from mole.mixtures import MultiExpertModel
from mole.registry import ADAPTERS
from mole.routers.multi_adapter import MultiAdapterConfig

torch.set_num_threads(1)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
TEXT = {**SMALL, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 3}
WIDE = {"initializer_range": 0.3}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm"}
BUILD = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT, **WIDE)),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**TEXT, **WIDE)),
    "deberta-v2": lambda: t.DebertaV2ForSequenceClassification(
        t.DebertaV2Config(**TEXT, **WIDE, **RELATIVE, position_buckets=4)
    ),
    "modernbert": lambda: t.ModernBertForSequenceClassification(
        t.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2)
    ),
    "llama": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**TEXT, **WIDE)),
    "qwen3": lambda: t.Qwen3ForSequenceClassification(t.Qwen3Config(**TEXT, **WIDE, head_dim=8, num_key_value_heads=1)),
    "gpt2": lambda: t.GPT2ForSequenceClassification(
        t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, pad_token_id=0, num_labels=3, bos_token_id=1)
    ),
}
HEADS = {
    "bert": ("classifier", "bert.pooler"),
    "deberta-v2": ("classifier", "pooler"),
    "modernbert": ("classifier", "head"),
    **dict.fromkeys(("llama", "qwen3", "gpt2"), ("score",)),
}
EXPERTS = {
    "rte": ("houlsby", {"size": 5, "activation": "silu"}),
    "mrpc": ("pfeiffer", {"size": 3, "reduction_factor": None, "activation": "relu"}),
    "cola": ("parallel", {"reduction_factor": 2.0, "scale": "learned", "train_norms": "all"}),
    "qnli": ("houlsby", {"size": 7, "activation": "tanh", "layers": (1,), "train_norms": "none"}),
}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 0, 0]])
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
BATCH = {"input_ids": IDS, "attention_mask": MASK}
LABELS = torch.tensor([0, 2])


def backbone(family, dtype=torch.float32):
    torch.manual_seed(0)
    model = BUILD[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at 0, norms at 1: nothing would be seen of them
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.to(dtype).requires_grad_(False)


def heads(family):
    return HEADS.get(family, ("classifier",))


def moved(module, seed, by=0.3):
    """Every trainable number somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += (torch.randn(parameter.shape, generator=generator) * by).to(parameter.dtype)
    return module


def expert(family, name, *, head=True, **options):
    """The expert of that name, with its head, all its numbers away from their start."""
    preset, own = EXPERTS[name]
    model = backbone(family)
    trained = heads(family) if head else ()
    attach(model, ADAPTERS[preset].config(**{**own, **options}), seed=0, trained=trained)
    moved(model, list(EXPERTS).index(name) + 1)
    return extract(model, trained)


def experts(family, names=tuple(EXPERTS), **options):
    return {name: expert(family, name, **options) for name in names}


def alone(family, adapter, dtype=torch.float32):
    """The backbone with that expert on it: the oracle."""
    model = backbone(family, dtype)
    attach_weights(model, adapter)
    if dtype == torch.float64:
        model.double()
    assert layers(model)
    return model.eval()


def mixture(family, config=None, names=tuple(EXPERTS), *, dtype=torch.float32, whole="base", given=None, **options):
    """A mixture whose router is not at its start."""
    torch.manual_seed(3)
    members = experts(family, names) if given is None else given
    made = MultiExpertModel(
        backbone(family, dtype), members, config or MultiAdapterConfig(), modules_to_save=whole, **options
    )
    for router in made.routers().values():
        if dtype == torch.float64:
            router.double()
        generator = torch.Generator().manual_seed(7)
        for parameter in router.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return made.eval()


def saved_backbone(family, model=None):
    """As the commands have it: what is written with a mixture, and what a mixture is loaded on."""
    plain = backbone(family)
    return Backbone(plain if model is None else model, None, f"tests/{family}", None, shapes_digest(backbone(family)))
