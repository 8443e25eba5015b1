"""The routing pass does no work that nobody needs, and leaves no trace."""

import pytest
import torch
from family_cases import FAMILIES, backbone, inputs
from mixture_cases import llama, mixture

from mole.adapters import Adapter, LoraWeights
from mole.mixtures import MultiExpertModel
from mole.mixtures.two_pass.hidden_store import HiddenStore
from mole.mixtures.two_pass.routing_pass import can_cache
from mole.routers import XLoraConfig

DROPPING = ["llama", "bert", "t5", "opt", "gpt2"]
RATES = (
    "attention_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout_rate",
    "dropout",
    "attn_pdrop",
)


def dropping(name):
    """A backbone of the family with dropout, and one expert on its last linear module."""
    family = FAMILIES[name]
    config = family.config()
    for rate in RATES:
        if hasattr(config, rate):
            setattr(config, rate, 0.5)
    torch.manual_seed(0)
    model = family.build(config)
    path, module = next((p, m) for p, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    weights = LoraWeights(A=torch.ones(1, module.in_features), B=torch.ones(module.out_features, 1), alpha=1.0)
    return model, {"one": Adapter("lora", {path: weights})}


def hidden_of(model, given):
    """What the router read in one forward."""
    seen = []
    handle = model.router.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**given)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_of_the_backbone_is_off_in_it_unless_asked_for(name):
    backbone, experts = dropping(name)
    model, given = MultiExpertModel(backbone, experts, XLoraConfig(dropout=0.0)), inputs(name)
    want = hidden_of(model.eval(), given)
    model.train()
    assert torch.equal(hidden_of(model, given), want)
    assert all(module.training for module in model.modules())
    backbone, experts = dropping(name)
    model = MultiExpertModel(backbone, experts, XLoraConfig(dropout=0.0), scaling_pass_dropout=True).train()
    assert not torch.equal(hidden_of(model, given), want)


def test_the_head_runs_once_and_no_tuple_of_hidden_states_is_made():
    model, calls = mixture("xlora"), []
    model.backbone.lm_head.register_forward_hook(lambda module, args, out: calls.append("head"))
    model.backbone.model.register_forward_hook(lambda module, args, out: calls.append(out.hidden_states))
    ids = torch.arange(3, 9)[None]
    model(input_ids=ids, labels=ids, output_hidden_states=False)
    assert calls == [None, None, "head"]


def test_what_the_caller_asks_to_see_is_of_the_mixture_pass():
    model, ids = mixture("xlora"), torch.arange(3, 9)[None]
    with torch.no_grad():
        asked = model(input_ids=ids, output_hidden_states=True)
        assert torch.equal(model.backbone.lm_head(asked.hidden_states[-1]), asked.logits)
        first = hidden_of(model, {"input_ids": ids})
    assert len(asked.hidden_states) == 3
    assert not torch.allclose(first, asked.hidden_states[-1], atol=1e-2)


def test_it_goes_through_the_call_of_the_inner_model():
    model, passes = mixture("xlora"), []
    model.backbone.model.register_forward_pre_hook(lambda module, args: passes.append(module))
    model(input_ids=torch.arange(3, 9)[None])
    assert passes == [model.backbone.model] * 2


def test_inputs_as_embeddings_give_the_same():
    model, ids = mixture("xlora_layerwise"), torch.arange(3, 9)[None]
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "llama classifies"])
def test_decoders_take_a_cache(name):
    assert can_cache(backbone(name))


@pytest.mark.parametrize("name", ["bert", "roberta classifies", "vit"])
def test_encoders_take_none(name):
    assert not can_cache(backbone(name))


def test_kept_hidden_states_go_by_tokens_alone(tmp_path):
    model = mixture("xlora").train()
    model.hidden_store = HiddenStore(tmp_path)
    ids = torch.arange(3, 9)[None]
    model(input_ids=ids)
    with pytest.raises(ValueError, match="this forward has inputs_embeds too"):
        model(inputs_embeds=llama().get_input_embeddings()(ids).detach())
    model.hidden_store.close()


def test_hidden_states_with_dropout_in_them_are_not_kept(tmp_path):
    model = mixture("xlora", scaling_pass_dropout=True).train()
    model.hidden_store = HiddenStore(tmp_path)
    with pytest.raises(ValueError, match="scaling_pass_dropout"):
        model(input_ids=torch.arange(3, 9)[None])
    model.hidden_store.close()
