"""Optimizers: the steps that their papers say, and what weight decay spares."""

import pytest
import torch
from torch import nn

from mole.registry import OPTIMIZERS
from mole.training.optimizers import AdafactorConfig, AdamWConfig, SGDConfig, build_optimizer

CONFIGS = {"adamw": AdamWConfig, "sgd": SGDConfig, "adafactor": AdafactorConfig}


def parameters(dtype=torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 4), "bias": (4,), "scale": ()}
    return {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for name, shape in shapes.items()}


def test_every_optimizer_has_a_case():
    assert set(CONFIGS) == set(OPTIMIZERS.names())


@pytest.mark.parametrize("name", CONFIGS)
def test_weight_decay_spares_what_has_fewer_than_two_dimensions(name):
    named = parameters()
    before = {key: value.detach().clone() for key, value in named.items()}
    optimizer = build_optimizer(CONFIGS[name](weight_decay=0.5), named, 0.1)
    for value in named.values():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    assert not torch.allclose(named["matrix"], before["matrix"])
    assert torch.equal(named["bias"], before["bias"])
    assert torch.equal(named["scale"], before["scale"])


def test_adamw_steps_as_its_paper_says():
    named = {"matrix": parameters()["matrix"]}
    config = AdamWConfig(beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.1)
    optimizer = build_optimizer(config, named, 0.05)
    expected = named["matrix"].detach().clone()
    first = second = torch.zeros_like(expected)
    for t in range(1, 5):
        gradient = torch.sin(expected + t)
        named["matrix"].grad = torch.sin(named["matrix"].detach() + t)
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        mean, square = first / (1 - 0.8**t), second / (1 - 0.9**t)
        expected = expected - 0.05 * 0.1 * expected - 0.05 * mean / (square.sqrt() + 1e-6)
    assert torch.allclose(named["matrix"], expected, atol=1e-12)


def test_adamw_is_fused_where_there_is_a_kernel():
    assert build_optimizer(AdamWConfig(), parameters(torch.float32), 0.1).defaults["fused"] is True


def test_adamw_without_a_fused_kernel_is_plain(monkeypatch):
    whole = torch.optim.AdamW

    def without_kernel(groups, *, fused=None, **settings):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return whole(groups, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", without_kernel)
    assert not build_optimizer(AdamWConfig(), parameters(), 0.1).defaults["fused"]


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.nesterov=true needs optimizer\.momentum"):
        SGDConfig(nesterov=True)
