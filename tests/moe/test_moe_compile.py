"""Compiled blocks compute what they compute eagerly, most of them in one graph."""

import pytest
import torch
from moe_cases import DIM, Attention, block, inputs

from mole.moe import MoEBlock, aux_loss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # of dynamo itself
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]


def compiled(moe, x, fullgraph=True):
    """Eager and compiled output, and gradients of the parameters."""
    found = []
    moe(x)
    torch._dynamo.reset()
    for run in (moe, torch.compile(moe, fullgraph=fullgraph, backend="aot_eager")):
        moe.zero_grad()
        y = run(x)
        (y.square().sum() + aux_loss(moe)).backward()
        found.append([y.detach(), *(p.grad.clone() for p in moe.parameters() if p.grad is not None)])
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"k": 2},
        {"k": 2, "backend": "stacked", "aggregation": "mean"},
        {"k": 2, "backend": "grouped"},
        {"k": 2, "backend": "vmap", "capacity_factor": 1.0},
        {"k": 2, "backend": "vmap", "capacity_factor": 0.5, "router_losses": {"load_balance": 0.1}},
        {"router_name": "soft", "router_slots": 2},
        {"router_name": "expert_choice", "router_capacity_factor": 1.0},
        {"router_name": "expert_choice", "router_capacity_factor": 1.0, "backend": "vmap"},
        {"k": 2, "null_experts": ("zero", "identity"), "router_losses": {"balance_entropy": 0.1}},
    ],
    ids=str,
)
def test_a_compiled_block_is_one_graph_and_computes_the_same(options):
    for one, other in zip(*compiled(block(4, **options), inputs(2, 6, DIM)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_compiled_mixture_of_depths_is_one_graph():
    moe = block(1, router_name="depth", router_capacity_factor=0.5)
    for one, other in zip(*compiled(moe, inputs(2, 6, DIM)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_loop_compiles_with_breaks():
    for one, other in zip(*compiled(block(4, k=2, backend="loop"), inputs(2, 6, DIM), fullgraph=False), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_experts_that_must_be_probed_are_called_before_a_compilation():
    moe = MoEBlock([Attention()], input_dim=DIM, noise=None)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="call the block once before it is compiled"):
        torch.compile(moe, backend="eager", fullgraph=True)(inputs(1, 3, DIM))
