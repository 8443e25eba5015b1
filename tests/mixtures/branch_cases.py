"""Small backbones under heads for whole texts, experts on them that differ in all they may, and their mixtures."""

import torch
import transformers as t

from mole.adapters import attach, attach_weights, extract, layers
from mole.backbones import Backbone
from mole.backbones.load import shapes_digest
from mole.mixtures import MultiExpertModel
from mole.mixtures.output_mixture import SplitMixture
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
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(
            dim=16, hidden_dim=24, n_heads=2, n_layers=2, vocab_size=32, pad_token_id=0, num_labels=3, **WIDE
        )
    ),
    "mpnet": lambda: t.MPNetForSequenceClassification(t.MPNetConfig(**TEXT, **WIDE)),
    "modernbert": lambda: t.ModernBertForSequenceClassification(
        t.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2)
    ),
    "llama": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**TEXT, **WIDE)),
    "qwen3": lambda: t.Qwen3ForSequenceClassification(t.Qwen3Config(**TEXT, **WIDE, head_dim=8, num_key_value_heads=1)),
    "gpt2": lambda: t.GPT2ForSequenceClassification(
        t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, pad_token_id=0, num_labels=3, bos_token_id=1)
    ),
}
SPLIT = {
    "attention.out_lin": ("attention.q_lin", "attention.out_lin", "sa_layer_norm"),
    "ffn.lin2": ("ffn.lin1", "ffn.dropout", "output_layer_norm"),
    "attention.attn.o": ("attention.attn.q", "attention.dropout", "attention.LayerNorm"),
}
HEADS = {
    "bert": ("classifier", "bert.pooler"),
    "deberta-v2": ("classifier", "pooler"),
    "distilbert": ("classifier", "pre_classifier"),
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


def split_of(path):
    """Paths of the modules where x, h and the norm of a split site are: the first that reads x, the last to give h."""
    for end, parts in SPLIT.items():
        if path.endswith(f".{end}"):
            return tuple(f"{path.removesuffix(end)}{part}" for part in parts)
    raise ValueError(path)


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


def ending(layer, given):
    """h and x at a site that a norm closes; of a split one as `noted` gives them."""
    if isinstance(layer, SplitMixture):
        return given
    return layer.base.dense(given[0]), given[1]


def noted(model, seen):
    """Site → what goes in and comes out, in every forward from now on; of split sites h and x go in."""
    for site, layer in model.layers.items():
        held = {}
        if isinstance(layer, SplitMixture):
            reads, gives, _ = split_of(layer.split.path)
            backbone = model.backbone
            backbone.get_submodule(reads).register_forward_hook(lambda m, a, out, held=held: held.update(x=a[0]))
            backbone.get_submodule(gives).register_forward_hook(lambda m, a, out, held=held: held.update(h=out))
        layer.register_forward_hook(
            lambda m, a, out, site=site, held=held: seen.update({site: ((held["h"], held["x"]) if held else a, out)})
        )
