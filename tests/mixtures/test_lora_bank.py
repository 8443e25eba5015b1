"""The bank of LoRA experts: which dropout acts when, in which dtype it computes, what follows it when it moves."""

import copy

import pytest
import torch
from mixture_cases import mixture
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mole.adapters import LoraWeights
from mole.kernels import loop, stacked
from mole.mixtures.banks import LoraBank
from mole.routing import Routing

D_IN, D_OUT, EXPERTS = 6, 5, 4
RATES = {0: 0.5, 2: 0.5, 3: 0.0}


def experts(ranks=(2, 3, 1), dtype=torch.float32) -> dict[int, LoraWeights]:
    """Experts 0, 2 and 3 of four; expert 1 has nothing at this module."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for index, rank in zip((0, 2, 3), ranks, strict=True):
        a = torch.randn(rank, D_IN, generator=generator).to(dtype)
        b = torch.randn(D_OUT, rank, generator=generator).to(dtype)
        made[index] = LoraWeights(A=a, B=b, alpha=1.0 + index, rslora=index == 2)
    return made


def bank(train=False, dtype=torch.float32, **options) -> LoraBank:
    made = LoraBank(experts(dtype=dtype), EXPERTS, dtype=dtype, dropout=RATES, **options)
    return made.requires_grad_(train).train()


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, D_IN, generator=generator).to(dtype)
    base_out = torch.randn(2, 7, D_OUT, generator=generator).to(dtype)
    return base_out, x, Routing(torch.rand(2, 7, EXPERTS, generator=generator))


def one_by_one(base_out, x, routing, only=None):
    """Σ over experts, each from its own factors; `only` some of them."""
    out = base_out.double()
    for index, w in experts().items():
        if only is None or index in only:
            delta = x.double() @ w.A.double().T @ w.B.double().T * w.scale
            out = out + routing.weights[..., index, None].double() * delta
    return out


def test_bank_adds_its_experts_and_the_weight_of_absent_ones_is_lost():
    assert (bank().eval()(*inputs()) - one_by_one(*inputs())).abs().max() < 1e-4


def test_ids_of_a_routing_work_like_their_dense_weights():
    base_out, x, _ = inputs()
    ids = torch.tensor([3, 1, 0, -1]).view(1, 1, 4).expand(2, 7, 4)
    weights = torch.rand(2, 7, 4)
    dense = torch.zeros(2, 7, EXPERTS)
    dense[..., 3], dense[..., 0] = weights[..., 0], weights[..., 2]
    got = bank().eval()(base_out, x, Routing(weights, ids))
    assert torch.allclose(got, bank().eval()(base_out, x, Routing(dense)), atol=1e-6)


@pytest.mark.parametrize("expert_dropout", ["auto", "off", "shared", "independent"])
def test_frozen_experts_drop_nothing_in_training(expert_dropout):
    frozen = bank(expert_dropout=expert_dropout)
    assert (frozen(*inputs()) - one_by_one(*inputs())).abs().max() < 1e-4


@pytest.mark.parametrize("expert_dropout", ["auto", "off", "shared", "independent"])
def test_trained_experts_drop_nothing_in_eval(expert_dropout):
    trained = bank(train=True, expert_dropout=expert_dropout).eval()
    assert (trained(*inputs()) - one_by_one(*inputs())).abs().max() < 1e-4


def test_dropout_that_is_off_stays_off_in_training():
    assert (bank(train=True, expert_dropout="off")(*inputs()) - one_by_one(*inputs())).abs().max() < 1e-4


@pytest.mark.parametrize("expert_dropout", ["auto", "shared"])
def test_shared_dropout_is_one_mask_for_all_experts_of_a_rate(expert_dropout):
    base_out, x, routing = inputs()
    torch.manual_seed(4)
    got = bank(train=True, expert_dropout=expert_dropout)(base_out, x, routing)
    torch.manual_seed(4)
    want = one_by_one(base_out, F.dropout(x, 0.5), routing, only=(0, 2))
    want = one_by_one(want, x, routing, only=(3,))
    assert (got - want).abs().max() < 1e-4


def test_independent_dropout_is_a_mask_for_each_expert():
    base_out, x, routing = inputs()
    torch.manual_seed(4)
    got = bank(train=True, expert_dropout="independent")(base_out, x, routing)
    torch.manual_seed(4)
    want = base_out.double()
    for index, rate in RATES.items():
        want = one_by_one(want, F.dropout(x, rate), routing, only=(index,))
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("expert_dropout", ["shared", "independent"])
def test_gradients_pass_through_the_dropout_to_every_expert(expert_dropout):
    trained = bank(train=True, expert_dropout=expert_dropout)
    trained(*inputs()).square().sum().backward()
    assert trained.A.grad.abs().amax(dim=1).min() > 0
    assert trained.B.grad.abs().amax(dim=0).min() > 0


def test_frozen_experts_get_no_gradient():
    frozen = bank()
    base_out, x, routing = inputs()
    x.requires_grad_()
    frozen(base_out, x, routing).sum().backward()
    assert x.grad is not None
    assert frozen.A.grad is None
    assert frozen.B.grad is None


@pytest.mark.parametrize(
    ("setting", "value"), [("expert_dropout", "sharde"), ("expert_dtype", "float23"), ("kernel", "lopo")]
)
def test_an_unknown_setting_is_an_error_that_names_the_known_ones(setting, value):
    with pytest.raises(ValueError, match=f"unknown {setting} '{value}'; did you mean (shared|float32|loop)"):
        bank(**{setting: value})


# ---- dtype and device
def test_experts_in_float32_on_a_bfloat16_module_compute_in_float32_and_stay_in_it():
    base_out, x, routing = inputs(torch.bfloat16)
    held = bank(expert_dtype="float32").to(torch.bfloat16)
    assert held.A.dtype == held.B.dtype == torch.float32
    got = held(base_out, x, routing)
    assert got.dtype == torch.bfloat16
    want = one_by_one(base_out, x, routing)
    assert ((got - want).abs() <= 2**-8 * want.abs() + 1e-6).all()  # one rounding, of the sum
    low = bank().to(torch.bfloat16)
    assert low.A.dtype == torch.bfloat16
    assert low(base_out, x, routing).dtype == torch.bfloat16


def test_experts_held_in_bfloat16_leave_a_float32_module_its_dtype():
    got = bank(expert_dtype="bfloat16")(*inputs())
    want = one_by_one(*inputs())
    assert got.dtype == torch.float32
    assert 1e-4 < (got - want).abs().max() < 5e-2 * want.abs().max()


def test_scales_have_the_precision_of_the_computation():
    ones = {0: LoraWeights(torch.ones(2, D_IN).double(), torch.ones(D_OUT, 2).double(), alpha=3.0, rslora=True)}
    moved = LoraBank(ones, 1, dtype=torch.bfloat16).to(torch.float64)  # ones lose nothing on the way
    rows = torch.ones(1, 1, D_IN, dtype=torch.float64)
    assert LoraBank(ones, 1, dtype=torch.bfloat16)._stack().scales.dtype == torch.float32
    share = moved(torch.zeros(1, 1, D_OUT).double(), rows, Routing(torch.ones(1, 1, 1).double()))
    assert (share - 3.0 / 2**0.5 * 2 * D_IN).abs().max() < 1e-12


def test_what_an_expert_lost_to_bfloat16_is_rounding_of_its_factors_alone():
    there = bank().to(torch.bfloat16).to(torch.float32)
    fresh = bank()
    fresh.A.data, fresh.B.data = fresh.A.bfloat16().float(), fresh.B.bfloat16().float()
    assert torch.equal(there(*inputs()), fresh(*inputs()))


def test_factors_are_parameters_and_no_buffer_is_there():
    made = bank()
    assert dict(made.named_parameters()).keys() == {"A", "B"}
    assert not list(made.named_buffers())
    assert made.state_dict().keys() == {"A", "B"}


def test_tables_follow_factors_that_are_set_one_by_one():
    made = bank()
    for name in ("A", "B"):
        setattr(made, name, nn.Parameter(getattr(made, name).detach().to("meta"), requires_grad=False))
    base_out, x, routing = (part.to("meta") for part in (*inputs()[:2], inputs()[2].weights))
    assert made(base_out, x, Routing(routing)).device.type == "meta"


def test_a_copy_is_a_bank_of_its_own():
    made = bank()
    twin = copy.deepcopy(made)
    twin.A.data.zero_()
    assert not torch.equal(made(*inputs()), twin(*inputs()))
    assert torch.equal(twin(*inputs()), inputs()[0])


def test_an_expert_comes_back_as_it_went_in():
    made = bank()
    for index, given in experts().items():
        found = made.weights(index)
        assert torch.equal(found.A, given.A)
        assert torch.equal(found.B, given.B)
        assert (found.alpha, found.rslora) == (given.alpha, given.rslora)
        assert found.A.untyped_storage().data_ptr() == made.A.untyped_storage().data_ptr()
    assert made.weights(1) is None


def test_fused_bank_equals_the_loops_in_output_and_gradients():
    found = []
    for kernel in (stacked, loop):
        made = bank(train=True, kernel=kernel.__name__, expert_dropout="off")
        base_out, x, routing = inputs()
        weights = routing.weights.requires_grad_()
        out = made(base_out, x.requires_grad_(), Routing(weights))
        out.square().sum().backward()
        found.append([out.detach(), x.grad, weights.grad, made.A.grad, made.B.grad])
    for mine, want in zip(*found, strict=True):
        assert (mine - want).abs().max() <= 1e-6 * want.abs().max()


class Scatters(TorchDispatchMode):
    """Counts how often weights are spread over all experts."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.scatter_add.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["xlora_top_k", "xlora_top_k_softmax"])  # the second has gates for each layer
def test_weights_of_the_k_chosen_are_spread_over_all_experts_once_in_a_forward(name):
    model = mixture(name)
    with Scatters() as found, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert len(model.sites) > 1
    assert found.count == 1
