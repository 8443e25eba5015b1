"""torch.compile of mixtures under learned routers: one graph without a break, for every length."""

import pytest
import torch
from learned_cases import LEARNED, equal_experts
from mixture_cases import TASKS
from transformers import LlamaConfig, LlamaForCausalLM

from mole.mixtures import MultiExpertModel

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
QUICK = ("smear",)


def one_block(name) -> MultiExpertModel:
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
    return MultiExpertModel(backbone, equal_experts(backbone), LEARNED[name], tasks=TASKS).eval()


def inputs(length):
    ids = torch.randint(3, 31, (2, length), generator=torch.Generator().manual_seed(length))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "prompt_mask": (torch.arange(length) < 3).expand(2, length),
        "task_names": ["spell", "date"],
    }


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LEARNED])
def test_forward_is_one_graph_with_the_same_logits(name):
    model, made = one_block(name), []
    torch._dynamo.reset()

    def backend(graph, example_inputs):
        made.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for length in (7, 9, 13):  # none of them a width of the model, which would be taken for it
            given = inputs(length)
            got = compiled(**given, use_cache=False).logits
            torch.testing.assert_close(got, model(**given, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    assert len(made) <= 2  # few tokens are computed in another way than many
