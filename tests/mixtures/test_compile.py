"""torch.compile of a mixture: both passes and the gates between them are one graph, for every length."""

import pytest
import torch
from mixture_cases import CONFIGS, expert
from transformers import LlamaConfig, LlamaForCausalLM

from mole.mixtures import MultiExpertModel

# torch's own: its tracer makes an object of every autograd function that it meets.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def one_block(name: str, **options) -> MultiExpertModel:
    """One block, two experts on three modules: compiling takes seconds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    backbone = LlamaForCausalLM(config)
    experts = {
        "a": expert(backbone, ["q_proj", "v_proj"], rank=2, alpha=4.0, seed=1),
        "b": expert(backbone, ["v_proj", "down_proj"], rank=3, alpha=2.0, seed=2),
    }
    return MultiExpertModel(backbone, experts, CONFIGS[name], **options).eval()


def graphs_of(model):
    """The model compiled as one graph or not at all, and the list that every compilation adds to."""
    torch._dynamo.reset()
    made = []

    def backend(graph, example_inputs):
        made.append(graph)
        return graph.forward

    return torch.compile(model, fullgraph=True, dynamic=True, backend=backend), made


def tokens(length):
    return torch.randint(3, 31, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", ["xlora_layerwise", pytest.param("xlora_top_k", marks=pytest.mark.slow)])
def test_forward_and_backward_are_one_graph_for_every_length(name):
    model = one_block(name)
    compiled, made = graphs_of(model)
    for length in (7, 9, 13):  # none of them a width of the model, which would be taken for it
        ids, found = tokens(length), []
        for run in (compiled, model):
            model.zero_grad()
            output = run(input_ids=ids, use_cache=False, labels=ids)
            output.loss.backward()
            found.append([output.logits.detach(), *(p.grad for p in model.router.parameters())])
        for mine, want in zip(*found, strict=True):
            assert (mine - want).abs().max() <= 1e-6 * want.abs().max()
    assert len(made) == 1


def test_settings_that_are_numbers_compile_nothing_anew():
    model = one_block("xlora_scaling_pass")
    compiled, made = graphs_of(model)
    config = model.router.config
    for weight, value in ((1.7, 0.7), (0.4, 0.7), (1.0, 0.2)):
        changed = {**vars(config), "global_scaling_weight": weight, "scaling_pass_value": value}
        model.router.configure(type(config)(**changed))
        with torch.no_grad():
            got, want = (run(input_ids=tokens(6), use_cache=False).logits for run in (compiled, model))
        assert (got - want).abs().max() <= 1e-5
    assert len(made) == 1
