"""Blocks in training: two processes, autocast, frozen experts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_cases import DIM, block, inputs, mlp, mlps
from torch import nn
from two_moe_processes import OPTIONS, step


@pytest.mark.slow
def test_two_ranks_on_half_a_batch_have_the_gradients_of_one_on_the_whole(tmp_path):
    script = Path(__file__).with_name("two_moe_processes.py")
    ranks = [subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    moe = block(12, **OPTIONS)
    step(moe, moe, inputs(4, 4, DIM, seed=3))
    moe.zero_grad()
    wanted = step(moe, moe, inputs(4, 4, DIM))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for what in ("grads", "losses"):
            for name, tensor in wanted[what].items():
                torch.testing.assert_close(found[what][name], tensor, atol=1e-6, rtol=1e-4, msg=f"{what} {name}")
        torch.testing.assert_close(found["bias"], wanted["bias"])


@pytest.mark.parametrize("backend", ["loop", "vmap", "grouped", "stacked"])
def test_under_autocast_the_router_stays_exact_and_the_output_is_the_modules(backend):
    moe, x = block(4, k=2, backend=backend), inputs(2, 6, DIM)
    wanted = moe(x).detach()
    logits = moe.last.logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x)
        dense = moe.experts[0](x)
    assert y.dtype == dense.dtype == torch.bfloat16
    assert torch.equal(moe.last.logits, logits)
    torch.testing.assert_close(y.float(), wanted, atol=0.05, rtol=0.05)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())


def test_a_block_in_half_precision_keeps_its_dtype():
    moe, x = block(4, k=2, null_experts=("identity",)).to(torch.bfloat16), inputs(2, 6, DIM, dtype=torch.bfloat16)
    assert moe(x).dtype == torch.bfloat16
    assert moe.last.weights.dtype == torch.float32


@pytest.mark.parametrize("backend", ["loop", "vmap", "grouped", "stacked"])
def test_frozen_experts_get_no_gradient(backend):
    experts = mlps(3)
    for expert in experts:
        expert.requires_grad_(False)
    moe = block(experts, k=2, backend=backend)
    moe(inputs(2, 6, DIM)).sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in moe.experts.parameters())
    assert moe.router.weight.grad.any()


def test_gradients_reach_the_input_through_every_router():
    for name in ("top_k", "expert_choice", "soft", "round_robin"):
        x = inputs(2, 6, DIM).requires_grad_()
        block(3, router_name=name)(x).square().sum().backward()
        assert x.grad.abs().sum() > 0


def test_identity_and_dense_parts_share_an_optimizer_that_sees_each_parameter_once():
    shared = mlp(0)
    moe = block([shared, shared, nn.Sequential(*shared)])
    assert len(list(moe.experts.parameters())) == len(list(shared.parameters()))
