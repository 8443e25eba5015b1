"""torch.compile of mixtures of branches: one graph for every length, with the values of the plain model."""

import pytest
import torch
from branch_cases import experts, mixture
from test_compile import graphs_of, tokens

from mole.routers import UniformConfig
from mole.routers.attention import AdapterFusionConfig
from mole.routers.multi_adapter import MultiAdapterConfig

# torch's own: its tracer makes an object of every autograd function that it meets.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
CONFIGS = {
    "base": MultiAdapterConfig(),
    "flex": MultiAdapterConfig(mode="flex", num_groups=2),
    "uniform": UniformConfig(),
    "fusion": AdapterFusionConfig(norms="base"),
}
SLOW = {"flex", "fusion"}


@pytest.mark.parametrize("family", ["roberta", "distilbert", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CONFIGS])
def test_forward_and_backward_are_one_graph_for_every_length(name, family):
    model = mixture(family, CONFIGS[name], given=experts(family, ("rte", "mrpc", "cola"))).eval()
    compiled, made = graphs_of(model)
    for length in (7, 9, 13):  # none of them a width of the model, which would be taken for it
        ids, found = tokens(length), []
        for run in (compiled, model):
            model.zero_grad()
            logits = run(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            if logits.requires_grad:
                logits.square().sum().backward()
            found.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for mine, want in zip(*found, strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-6)
    assert len(made) == 1
