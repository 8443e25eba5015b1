"""How a bank spends a routing: whose weight counts, which kernel works, outputs or parameters, scores of outputs."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from mole.adapters import LoraWeights
from mole.kernels import KERNELS
from mole.mixtures.banks import (
    BankOfBanks,
    ConvolutionBank,
    DoraBank,
    EmbeddingBank,
    LoraBank,
    ModuleBank,
    OffsetBank,
)
from mole.routing import Routing

EXPERTS, D_IN, D_OUT = 5, 6, 4
PRESENT = (0, 2, 3)
DOUBLE = torch.float64


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)), dtype=DOUBLE)


def factors(index, rank, d_in=D_IN, *, dora=False, embedding=False) -> LoraWeights:
    magnitude = random(D_OUT, seed=50 + index).abs() + 1 if dora else None
    A, B = random(rank, d_in, seed=index), random(D_OUT, rank, seed=9 + index)
    return LoraWeights(A=A, B=B, alpha=1.0 + index, magnitude=magnitude, embedding=embedding)


def lora(ranks=(2, 2, 2), present=PRESENT, **options) -> LoraBank:
    experts = {e: factors(e, rank) for e, rank in zip(present, ranks, strict=True)}
    return LoraBank(experts, EXPERTS, dtype=DOUBLE, **options)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D_IN, D_OUT, dtype=DOUBLE).requires_grad_(False)


def dora(present=(1, 4)) -> DoraBank:
    return DoraBank({e: factors(e, 2, dora=True) for e in present}, EXPERTS, base=linear(), dtype=DOUBLE)


def offsets(present=PRESENT) -> OffsetBank:
    vectors, scales = {e: random(D_OUT, seed=70 + e) for e in present}, {e: 0.5 + e for e in present}
    return OffsetBank(vectors, EXPERTS, dtype=DOUBLE, scales=scales)


def inputs():
    return linear()(random(2, 7, D_IN)), random(2, 7, D_IN)


def chosen(count=2, tokens=7, batch=2) -> Routing:
    """A choice of any of the experts, of which the bank has some; one slot of nobody, one null expert."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(0, EXPERTS, (batch, tokens, count), generator=generator)
    ids[0, 0, 0], ids[-1, -1, 0] = -1, EXPERTS
    return Routing(torch.rand(batch, tokens, count, generator=generator, dtype=DOUBLE) * (ids >= 0), ids)


BANKS = {
    "lora": lora,
    "lora of unequal ranks": lambda: lora((1, 5, 2)),
    "all present": lambda: lora((2,) * EXPERTS, range(EXPERTS)),
    "dora": dora,
    "offsets": offsets,
    "lora and offsets": lambda: BankOfBanks([lora(), offsets()]),
    "dora and lora": lambda: BankOfBanks([dora(), lora()]),
    "lora and dora": lambda: BankOfBanks([lora(), dora()]),
    "whole modules": lambda: ModuleBank(
        {e: {"weight": random(D_OUT, D_IN, seed=e), "bias": random(D_OUT, seed=e)} for e in PRESENT},
        EXPERTS,
        base=linear(),
    ),
}


def alone(bank, expert) -> torch.Tensor:
    """What one expert adds by itself, in full weight."""
    base_out, x = inputs()
    one = torch.zeros(1, 1, EXPERTS, dtype=DOUBLE)
    one[..., expert] = 1
    return bank(base_out, x, Routing(one)) - base_out


@pytest.mark.parametrize("name", BANKS)
def test_a_choice_of_experts_is_the_sum_of_what_each_adds_alone(name):
    base_out, x = inputs()
    for routing in (chosen(), chosen(1), chosen(3, tokens=1), chosen(1, tokens=1), chosen(2, tokens=1, batch=1)):
        weights = routing.dense(EXPERTS).expand(2, 7, -1)
        want = sum(weights[..., e, None] * alone(BANKS[name](), e) for e in range(EXPERTS))
        for bank in (BANKS[name](), BANKS[name]().requires_grad_(True)):
            assert (bank(base_out, x, routing) - base_out - want).abs().max() < 1e-12
            assert (bank.delta(base_out, x, routing) - want).abs().max() < 1e-12


@pytest.mark.parametrize("name", BANKS)
def test_inner_products_are_those_of_what_each_expert_adds(name):
    base_out, x = inputs()
    direction = random(2, 7, D_OUT, seed=3)
    found = BANKS[name]().inner(base_out, x, direction)
    assert found.shape == (2, 7, EXPERTS)
    want = torch.stack([(alone(BANKS[name](), e) * direction).sum(-1) for e in range(EXPERTS)], dim=-1)
    assert (found - want).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["lora", "lora of unequal ranks", "dora", "offsets", "lora and offsets"])
def test_inner_products_of_any_bank_agree_with_its_experts_one_by_one(name):
    from mole.mixtures.banks.bank import Bank

    bank, (base_out, x), direction = BANKS[name](), inputs(), random(2, 7, D_OUT, seed=3)
    parts = bank.banks if isinstance(bank, BankOfBanks) else [bank]
    want = sum(Bank.inner(part, base_out, x, direction) for part in parts)
    assert (bank.inner(base_out, x, direction) - want).abs().max() < 1e-12


# ---- which kernel
@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
def test_every_kernel_spends_a_routing_that_it_serves_alike(kernel):
    routing = {"segments": chosen(1, tokens=1), "folded": chosen(2, tokens=1, batch=1)}.get(kernel, chosen())
    base_out, x = inputs()
    want = lora((1, 5, 2), kernel="loop")(base_out, x, Routing(routing.dense(EXPERTS)))
    assert (lora((1, 5, 2), kernel=kernel)(base_out, x, routing) - want).abs().max() < 1e-12


class Shapes(TorchDispatchMode):
    """The last sizes of all tensors made."""

    def __init__(self):
        super().__init__()
        self.last = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 3:
            self.last.add(out.shape[-1])
        return out


def test_a_sparse_routing_reaches_the_grouped_kernel_without_weights_of_all_experts():
    bank = LoraBank({e: factors(e, 2) for e in range(60)}, 61, dtype=DOUBLE)
    routing = chosen(tokens=200)
    x = random(2, 200, D_IN)
    with Shapes() as seen:
        bank(random(2, 200, D_OUT), x, routing)
    assert not seen.last & {60, 61, 120}


def test_the_kernel_that_auto_chose_is_logged_once(caplog):
    bank, (base_out, x) = lora(), inputs()
    with caplog.at_level("DEBUG", logger="mole.mixtures.banks.lora"):
        for _ in range(3):
            bank(base_out, x, chosen())
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["kernel stacked"]


# ---- whose weight counts
@pytest.mark.parametrize("name", ["lora", "lora and dora", "lora and offsets", "whole modules"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_weight_of_absent_experts_goes_to_those_present_in_proportion(name, sparse):
    bank = BANKS[name]()
    bank.spend(missing="renormalise")
    for part in bank.modules():
        if sparse and isinstance(part, LoraBank):
            part.kernel = "grouped"  # which works by the ids
    base_out, x = inputs()
    routing = chosen(3)
    weights = routing.dense(EXPERTS)
    here = torch.zeros(EXPERTS, dtype=DOUBLE)
    here[list(bank.present)] = 1
    mass = weights.sum(-1, keepdim=True) / (weights * here).sum(-1, keepdim=True)
    scaled = torch.where((weights * here).sum(-1, keepdim=True) > 0, weights * here * mass, 0.0)
    want = BANKS[name]()(base_out, x, Routing(scaled))
    got = bank(base_out, x, routing if sparse else Routing(weights))
    assert (got - want).abs().max() < 1e-12
    if bank.present != tuple(range(EXPERTS)):
        assert (got - BANKS[name]()(base_out, x, routing)).abs().max() > 1e-3


def test_gradients_stay_finite_where_a_token_chose_absent_experts_only():
    bank, (base_out, x) = lora(), inputs()
    bank.spend(missing="renormalise")
    weights = torch.zeros(2, 7, EXPERTS, dtype=DOUBLE)
    weights[..., 1] = 1.0
    weights.requires_grad_()
    out = bank(base_out, x, Routing(weights))
    assert torch.equal(out, base_out)
    out.square().sum().backward()
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize(("setting", "value"), [("combine", "outptus"), ("missing", "dorp")])
def test_an_unknown_way_to_spend_is_an_error_that_names_the_known_ones(setting, value):
    for bank in (lora(), BankOfBanks([lora(), offsets()])):
        with pytest.raises(ValueError, match=f"unknown {setting} '{value}'; did you mean (outputs|drop)"):
            bank.spend(**{setting: value})


# ---- outputs or parameters
def test_parameters_are_mixed_for_whole_examples_and_for_tokens():
    bank, (base_out, x) = lora(), inputs()
    bank.spend(combine="parameters")
    for routing in (chosen(3, tokens=1), chosen(3)):
        weights = routing.dense(EXPERTS).expand(2, 7, -1)
        parts = [factors(e, 2) for e in PRESENT]
        gates = weights[..., list(PRESENT)]
        mean = sum(gates[..., i, None] * (x @ part.A.T) for i, part in enumerate(parts))
        want = sum(gates[..., i, None] * part.scale * (mean @ part.B.T) for i, part in enumerate(parts))
        assert (bank(base_out, x, routing) - base_out - want).abs().max() < 1e-12
        assert (bank.delta(base_out, x, routing) - want).abs().max() < 1e-12


def test_blocks_of_features_have_weights_of_their_own_under_parameters_only():
    weights = random(2, 1, 2, EXPERTS)
    base_out, x = inputs()
    bank = BankOfBanks([lora(), offsets()])
    with pytest.raises(ValueError, match="weights for 2 blocks of features: they belong to combine=parameters"):
        bank(base_out, x, Routing(weights))
    bank.spend(combine="parameters")
    got = bank(base_out, x, Routing(weights))
    same = Routing(weights[:, :, :1].expand(-1, -1, 2, -1))
    assert (bank(base_out, x, same) - bank(base_out, x, Routing(weights[:, :, 0]))).abs().max() < 1e-12
    assert (got - bank(base_out, x, same)).abs().max() > 1e-2


def embedding(ranks=(2, 2, 2)) -> EmbeddingBank:
    experts = {e: factors(e, r, 11, embedding=True) for e, r in zip(PRESENT, ranks, strict=True)}
    return EmbeddingBank(experts, EXPERTS, base=nn.Embedding(11, D_OUT), dtype=DOUBLE)


def convolution(ranks=(2, 2, 2), magnitude=False) -> ConvolutionBank:
    base = nn.Conv1d(D_IN, D_OUT, 1, dtype=DOUBLE).requires_grad_(False)
    made = {}
    for e, rank in zip(PRESENT, ranks, strict=True):
        plain = factors(e, rank)
        length = torch.ones(1, D_OUT, 1, dtype=DOUBLE) if magnitude else None
        made[e] = LoraWeights(A=plain.A[..., None], B=plain.B[..., None], alpha=plain.alpha, magnitude=length)
    return ConvolutionBank(made, EXPERTS, base=base, dtype=DOUBLE)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_convolution_of_kernel_1_mixes_parameters_as_a_linear_module_does(tokens):
    base_out, x = inputs()
    routing = chosen(3, tokens=tokens)
    for combine in ("outputs", "parameters"):
        plain, bank = lora(), convolution()
        plain.spend(combine=combine)
        bank.spend(combine=combine)
        got = bank(base_out.transpose(1, 2), x.transpose(1, 2), routing)
        assert (got.transpose(1, 2) - plain(base_out, x, routing)).abs().max() < 1e-12


@pytest.mark.parametrize("tokens", [1, 7])
def test_an_embedding_mixes_parameters_as_a_linear_module_of_one_hot_tokens_does(tokens):
    ids = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0))
    onehot = nn.functional.one_hot(ids, 11).double()
    plain = LoraBank({e: factors(e, 2, 11) for e in PRESENT}, EXPERTS, dtype=DOUBLE)
    base_out = random(2, 7, D_OUT)
    routing = chosen(3, tokens=tokens)
    for combine in ("outputs", "parameters"):
        bank = embedding()
        bank.spend(combine=combine)
        plain.spend(combine=combine)
        assert (bank(base_out, ids, routing) - plain(base_out, onehot, routing)).abs().max() < 1e-12


@pytest.mark.parametrize("base", [linear(), Conv1D(D_OUT, D_IN).double()], ids=["Linear", "Conv1D"])
def test_modules_that_are_linear_in_their_parameters_are_the_same_either_way(base):
    base = base.requires_grad_(False)
    tensors = {e: {name: random(*p.shape, seed=e) for name, p in base.named_parameters()} for e in PRESENT}
    bank = ModuleBank(tensors, EXPERTS, base=base)
    x, routing = random(2, 7, D_IN), chosen(3, tokens=1, batch=1)
    by_outputs = bank(base(x), x, routing)
    bank.spend(combine="parameters")
    weights = routing.dense(EXPERTS)[0, 0]
    mixed = ModuleBank({0: mixed_parameters(base, tensors, weights)}, 1, base=base).members[0]
    assert (bank(base(x), x, routing) - by_outputs).abs().max() == 0
    assert (mixed(x) - by_outputs).abs().max() < 1e-12


def mixed_parameters(base, tensors, weights):
    start = dict(base.named_parameters())
    return {n: p + sum(weights[e] * (tensors[e][n] - p) for e in PRESENT) for n, p in start.items()}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: lora((1, 5, 2)), "one rank, here are 1, 2, 5"),
        (lambda: embedding((1, 2, 2)), "one rank, here are 1, 2"),
        (lambda: convolution((1, 2, 2)), "one rank, here are 1, 2"),
        (lambda: convolution(magnitude=True), "DoRA's experts are not linear"),
        (dora, "DoRA's experts do is not linear"),
        (BANKS["dora and lora"], "experts of different kinds, dora and lora"),
        (
            lambda: ModuleBank({0: {}}, 1, base=nn.GELU()),
            "a GELU is not known to be linear in its parameters",
        ),
    ],
    ids=["ranks", "embedding", "convolution", "dora convolution", "dora", "kinds", "module"],
)
def test_experts_without_common_parameters_are_refused_with_the_way_out(build, reason):
    bank = build()
    with pytest.raises(ValueError, match=reason) as refused:
        bank.spend(combine="parameters")
    assert "combine=outputs" in str(refused.value)
    bank.spend(combine="outputs")


def test_parameters_have_one_mask_of_dropout_or_none():
    base_out, x = inputs()
    for options in ({"expert_dropout": "independent"}, {"dropout": {0: 0.5, 2: 0.1}}):
        bank = lora(**{"dropout": dict.fromkeys(PRESENT, 0.5), **options}).requires_grad_(True).train()
        bank.spend(combine="parameters")
        with pytest.raises(ValueError, match="one mask of dropout: set expert_dropout=off"):
            bank(base_out, x, chosen(3))
        assert torch.equal(bank.eval()(base_out, x, chosen(3)), bank.requires_grad_(False)(base_out, x, chosen(3)))
    shared = lora(dropout=dict.fromkeys(PRESENT, 0.5)).requires_grad_(True).train()
    shared.spend(combine="parameters")
    torch.manual_seed(0)
    got = shared(base_out, x, chosen(3))
    torch.manual_seed(0)
    assert torch.allclose(got, shared.eval()(base_out, nn.functional.dropout(x, 0.5), chosen(3)))
