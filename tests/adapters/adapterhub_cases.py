"""Folders as AdapterHub writes them, and what its models compute of them, written out in plain torch."""

import json

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from mole.backbones.modules import replace_module

WIDTH, BLOCKS = 16, 3
TOKENS = torch.arange(3, 17).reshape(2, 7)
SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": BLOCKS}
SIZES |= {"vocab_size": 32, "max_position_embeddings": 32, "initializer_range": 0.3, "num_labels": 3}
ENCODERS = {
    "bert": (BertConfig, BertForSequenceClassification),
    "electra": (ElectraConfig, ElectraForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
}
FIELDS = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "init_weights": "bert",
    "inv_adapter": None,
    "is_parallel": False,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": True,
    "non_linearity": "swish",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_layer": False,
    "reduction_factor": 8,
    "residual_before_ln": True,
    "scaling": 1.5,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
KINDS = {
    "double_seq_bn": FIELDS,
    "seq_bn": {**FIELDS, "mh_adapter": False, "original_ln_before": True, "non_linearity": "relu", "scaling": 1.0},
    "par_bn": {**FIELDS, "mh_adapter": False, "is_parallel": True, "non_linearity": "relu", "scaling": 4.0},
}
HUB = {"hidden_size": WIDTH, "model_name": "user/model", "name": "sst", "version": "adapters.1.2.0"}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def encoder(kind):
    """Under the head of transformers' own class, in eval mode."""
    config, model = ENCODERS[kind]
    torch.manual_seed(0)
    return model(config(**SIZES)).eval()


def homes(kind, parts=("attention.output", "output"), blocks=range(BLOCKS)):
    """Where AdapterHub keeps the bottlenecks of a backbone."""
    stem = {"gpt2": "transformer.h", "llama": "model.layers", "deberta-v2": "deberta.encoder.layer"}
    stem = stem.get(kind, f"{kind.partition('-')[2] or kind}.encoder.layer")
    ends = {"attention.output": "attention_adapters", "output": "output_adapters"}
    pre_norm = kind in ("gpt2", "llama")
    return [f"{stem}.{n}.{ends[part] if pre_norm else part}" for n in blocks for part in parts]


def tensors_at(places, sizes=None, *, learned=False, name="sst", seed=0):
    """Random tensors of a bottleneck at each of these places, of as many features as `sizes` says, or 2."""
    found = {}
    for number, (home, size) in enumerate(zip(places, sizes or [2] * len(places), strict=True)):
        shapes = {"adapter_down.0.weight": (size, WIDTH), "adapter_down.0.bias": (size,)}
        shapes |= {"adapter_up.weight": (WIDTH, size), "adapter_up.bias": (WIDTH,)}
        shapes |= {"scaling": (1,)} if learned else {}
        made = {part: random(*shape, seed=seed + number) for part, shape in shapes.items()}
        found |= {f"{home}.adapters.{name}.{part}": tensor for part, tensor in made.items()}
    return found


def tensors_of(kind, fields, **options):
    """Those of a folder with these fields, in every block."""
    flags = {"attention.output": "mh_adapter", "output": "output_adapter"}
    places = homes(kind, [part for part, flag in flags.items() if fields[flag]])
    return tensors_at(places, learned=fields["scaling"] == "learned", **options)


def folder(fields, tensors, kind="bert", **changes):
    """The two files."""
    return json.dumps({**HUB, "model_type": kind, **changes, "config": fields}).encode(), save(tensors)


class TheirOutput(nn.Module):
    """An output module as AdapterHub runs it: what goes into its adapters, what they give, what becomes of that.

    With `fusion` (query, query's bias, key, key's bias, value) several adapters are fused.
    """

    ACTIVATIONS = {"swish": F.silu, "relu": F.relu}  # noqa: RUF012

    def __init__(self, base, fields, adapters, fusion=None):
        super().__init__()
        self.base, self.fields, self.adapters, self.fusion = base, fields, adapters, fusion

    def up(self, own, seen):
        hidden = seen @ own["adapter_down.0.weight"].T + own["adapter_down.0.bias"]
        hidden = self.ACTIVATIONS[self.fields["non_linearity"]](hidden)
        scale = own["scaling"] if self.fields["scaling"] == "learned" else self.fields["scaling"]
        return scale * (hidden @ own["adapter_up.weight"].T + own["adapter_up.bias"])

    def forward(self, hidden_states, input_tensor):
        h, norm = self.base.dense(hidden_states), self.base.LayerNorm
        if self.fields["is_parallel"]:
            (own,) = self.adapters
            return norm(self.up(own, input_tensor) + h + input_tensor)
        seen = norm(h + input_tensor) if self.fields["original_ln_before"] else h
        ups = [self.up(own, seen) for own in self.adapters]
        if self.fusion is None:
            return norm(ups[0] + h + input_tensor)
        query, query_bias, key, key_bias, value = self.fusion
        stacked = torch.stack(ups, dim=-2)  # [B, T, adapters, d]
        scores = ((seen @ query.T + query_bias)[..., None, :] * (stacked @ key.T + key_bias)).sum(-1)
        values = stacked if value is None else stacked @ value.T
        return norm((scores.softmax(-1)[..., None] * values).sum(-2) + h + input_tensor)


def put_theirs(model, fields, adapters, fusions=None):
    """Replaces the output modules by theirs; `adapters` are the tensors of one adapter each."""
    places = {name.partition(".adapters.")[0] for name in adapters[0]}
    for home in places:
        own = []
        for tensors in adapters:
            start = f"{home}.adapters."
            own.append({n.removeprefix(start).partition(".")[2]: t for n, t in tensors.items() if n.startswith(start)})
        fusion = None if fusions is None else fusions[home]
        replace_module(model, home, TheirOutput(model.get_submodule(home), fields, own, fusion))
