"""What experts are given: packed tokens, sequences of their own, or zeros; and how the probe tells."""

import logging

import pytest
import torch
from moe_cases import DIM, Attention, MaskedBlock, block, inputs, mlp
from torch import nn

from mole.moe import MoEBlock
from mole.moe.contracts import why_not_pointwise


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv1d(DIM, DIM, 3, padding=1)

    def forward(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.linear(self.norm(x.flatten(0, 1)).view(x.shape))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.randn(1, 50, DIM))

    def forward(self, x):
        return x + self.at[:, : x.shape[1]]


class Own(nn.Module):
    """An MLP of a class that nobody knows."""

    def __init__(self):
        super().__init__()
        self.inner = mlp(0)

    def forward(self, x):
        return self.inner(x) + x


@pytest.mark.parametrize(
    ("make", "pointwise"),
    [
        (Own, True),
        (lambda: mlp(0), True),
        (lambda: nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM)), True),
        (Attention, False),
        (Convolution, False),
        (Normed, False),
        (Positions, False),
        (lambda: nn.Sequential(nn.Linear(DIM, DIM), nn.Softmax(dim=1)), False),
    ],
)
def test_the_probe_finds_what_treats_each_token_by_itself(make, pointwise, caplog):
    experts = [make() for _ in range(2)]
    rng = torch.get_rng_state()
    reason = why_not_pointwise(lambda expert, x: expert(x), experts, inputs(1, 4, DIM))
    assert (reason is None) == pointwise, reason
    assert torch.equal(rng, torch.get_rng_state())
    assert all(expert.training for expert in experts)
    with caplog.at_level(logging.WARNING, "mole.moe.contracts"):
        moe = MoEBlock(experts, input_dim=DIM, noise=None, layer_id="here")
        moe(inputs(2, 9, DIM))
        moe(inputs(2, 9, DIM))
    assert len(caplog.records) == (not pointwise)
    if not pointwise:
        assert "here" in caplog.text
        assert "sequence" in caplog.text
        with pytest.raises(ValueError, match="not pointwise"):
            MoEBlock([make() for _ in range(2)], input_dim=DIM, noise=None, contract="pointwise")(inputs(2, 9, DIM))


def test_attention_under_sequence_is_attention_among_an_experts_own_tokens():
    experts = [Attention(seed=seed) for seed in range(3)]
    moe = MaskedBlock(experts, input_dim=DIM, noise=None, contract="sequence", k=2)
    x, mask = inputs(3, 9, DIM), torch.ones(3, 9, dtype=torch.bool)
    mask[2, 4:] = False
    y, ids = moe(x, padding_mask=mask), moe.last.expert_ids
    gates = moe.batched_routing_matrix
    wanted = torch.zeros_like(x)
    for row in range(3):
        for index, expert in enumerate(experts):
            own = (ids[row] == index).any(-1)
            if own.any():
                wanted[row, own] += gates[row, own, index, None] * expert(x[row : row + 1, own])[0]
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
    y.sum().backward()
    assert all(p.grad is not None for p in moe.parameters())


def test_attention_under_zeros_is_moefys():
    experts = [Attention(seed=seed) for seed in range(3)]
    moe, x = MoEBlock(experts, input_dim=DIM, noise=None, contract="zeros", k=2), inputs(2, 9, DIM)
    y, masks = moe(x), moe.batched_experts_masks
    wanted = sum(mask * expert(x * (mask > 0)) for mask, expert in zip(masks, experts, strict=True))
    torch.testing.assert_close(y, wanted, atol=1e-6, rtol=1e-5)
    sequence = MoEBlock(experts, input_dim=DIM, noise=None, contract="sequence", k=2)
    sequence.router.weight.data = moe.router.weight.data
    assert (sequence(x) - y).abs().max() > 0.01


def test_experts_over_space_see_the_input_in_its_own_shape():
    class Space(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(DIM, DIM, 3, padding=1)

        def forward(self, x):
            assert x.dim() == 4
            return self.inner(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    experts = [Space() for _ in range(2)]
    moe, x = MoEBlock(experts, input_dim=DIM, noise=None, contract="zeros"), inputs(2, 4, 5, DIM)
    y = moe(x)
    masks = moe.batched_experts_masks.view(2, 2, 4, 5, 1)
    wanted = sum(mask * expert(x * (mask > 0)) for mask, expert in zip(masks, experts, strict=True))
    torch.testing.assert_close(y, wanted, atol=1e-6, rtol=1e-5)


def test_soft_slots_of_attention_are_a_sequence():
    experts = [Attention(seed=seed) for seed in range(2)]
    moe = block(experts, router_name="soft", router_slots=3, contract="sequence")
    assert moe(inputs(2, 5, DIM)).shape == (2, 5, DIM)


def test_an_expert_that_takes_a_mask_needs_sequences():
    with pytest.raises(ValueError, match="contract=sequence"):
        MaskedBlock([Attention()], input_dim=DIM)


def test_what_a_forward_leaves_has_no_graph_but_its_loss():
    moe = block(4, k=2, router_noise="learned", router_losses={"load_cv2": 1.0})
    moe(inputs(2, 5, DIM))
    kept = moe.last
    assert kept is not None
    for tensor in (kept.weights, kept.logits, kept.chances, *moe.losses.values()):
        assert not tensor.requires_grad
    assert moe.aux_loss.requires_grad
