"""Mixtures of branches: one-hot is the expert alone, the sum is the formula, no branch touches another."""

import copy
from dataclasses import replace

import pytest
import torch
from branch_cases import BATCH, BUILD, EXPERTS, alone, backbone, ending, expert, experts, mixture, noted
from torch.nn import functional as F

from mole.adapters import BottleneckWeights, NormWeights
from mole.data import Sample
from mole.merging.mixture import one_expert
from mole.mixtures import MultiExpertModel
from mole.mixtures.banks import OutputBank
from mole.mixtures.banks.branches import Ending, Member
from mole.mixtures.output_mixture import OutputMixture
from mole.mixtures.preparing.activations import module_inputs
from mole.routers import ArrowConfig, SpectralConfig, TaskConfig, TopKConfig, UniformConfig
from mole.routers.multi_adapter import MultiAdapterConfig
from mole.routing import Routing

ACTIVATE = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", BUILD)
@torch.no_grad()
def test_one_hot_weights_with_an_experts_head_are_that_expert_alone_bit_for_bit(family, dtype):
    given = experts(family)
    plain = backbone(family, dtype)(**BATCH).logits
    for name, adapter in given.items():
        want = alone(family, adapter, dtype)(**BATCH).logits
        model = mixture(family, dtype=dtype, whole=f"take:{name}", given=given)
        with model.fixed_weights(**{name: 1.0}):
            assert torch.equal(model(**BATCH).logits, want), name
        with model.fixed_routing({name: 1.0}):
            assert torch.equal(model(**BATCH).logits, want), name
        assert not torch.equal(plain, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", BUILD)
@torch.no_grad()
def test_all_weight_on_the_base_is_the_backbone_bit_for_bit(family, dtype):
    want = backbone(family, dtype)(**BATCH, output_hidden_states=True)
    model = mixture(family, dtype=dtype)
    with model.fixed_weights(base=1.0):
        got = model(**BATCH, output_hidden_states=True)
    assert torch.equal(got.logits, want.logits)
    for mine, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        assert torch.equal(mine, theirs)
    with model.experts_off():
        assert torch.equal(model(**BATCH).logits, want.logits)
    assert torch.equal(model.unload()(**BATCH).logits, want.logits)


def test_a_branch_that_is_not_there_is_refused_with_those_that_are():
    model = mixture("bert", names=("rte", "mrpc"))
    with (
        pytest.raises(ValueError, match="unknown branch 'sst2' .known: base, mrpc, rte"),
        model.fixed_weights(sst2=1.0),
    ):
        pass


def layer_norm(z, weight, bias, eps):
    mean, variance = z.mean(-1, keepdim=True), z.var(-1, keepdim=True, unbiased=False)
    return (z - mean) / (variance + eps).sqrt() * weight + bias


def update(weights, z):
    """s g (U φ(D z + b) + c) with plain products."""
    part = {name: tensor.double() for name, tensor in weights.tensors().items()}
    hidden = ACTIVATE[weights.activation](z @ part["down"].T + part["down_bias"])
    return weights.scale * part.get("gain", 1.0) * (hidden @ part["up"].T + part["up_bias"])


def with_norm(base, weights):
    """A copy of a norm with other numbers."""
    made = copy.deepcopy(base)
    for name, tensor in weights.tensors().items():
        getattr(made, name).data = tensor.to(getattr(made, name).dtype)
    return made


def wanted(layer, given, members, weights, own):
    """y of section 5 at one site, one expert after another; a whole sub-layer with what ends it."""
    base, site = layer.base, layer.site
    if isinstance(layer, OutputMixture):
        (h, x), first = ending(layer, given), layer.norm
        total = own * layer_norm(h + x, first.weight, first.bias, first.eps)
        for weight, adapter in zip(weights, members.values(), strict=True):
            small, norm = (adapter.modules.get(name) for name in (layer.bottleneck_path, layer.norm_path))
            scale, shift = (norm.weight.double(), norm.bias.double()) if norm else (first.weight, first.bias)
            u = 0.0
            if small is not None:
                normed = layer_norm(h + x, scale, shift, first.eps)
                u = update(small, {"h": h, "x": x, "normed": normed}[small.reads])
            total = total + weight * layer_norm(h + u + x, scale, shift, first.eps)
        return total
    plain = base(given[0])
    total = own * plain
    for weight, adapter in zip(weights, members.values(), strict=True):
        branch = plain
        for path, part in adapter.modules.items():
            if path == site and isinstance(part, NormWeights):
                branch = with_norm(base, part)(given[0])
            elif path == site or path.startswith(f"{site}."):
                branch = branch + update(part, given[0] if part.reads == "input" else plain)
        total = total + weight * branch
    return total


MIXES = [
    MultiAdapterConfig(),
    MultiAdapterConfig(normalise="sigmoid", temperature=0.7),
    MultiAdapterConfig(normalise="none", num_groups=None, site="module"),
    MultiAdapterConfig(num_groups=None, site="block"),
    MultiAdapterConfig(mode="flex", flex_norm=False),
    MultiAdapterConfig(mode="flex", flex_norm=False, normalise="none"),
]
COUNTED = [(config, count) for config in MIXES for count in (1, 2, 3, 4) if count > 1 or config.has_base]


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize(
    ("config", "count"), COUNTED, ids=lambda value: value if isinstance(value, int) else value.normalise
)
@torch.no_grad()
def test_every_site_gives_the_weighted_sum_of_its_branches(family, config, count):
    names = tuple(EXPERTS)[:count]
    members = experts(family, names)
    model, seen = mixture(family, config, dtype=torch.float64, given=members), {}
    noted(model, seen)
    model(**BATCH)
    router, found = model.router, dict(seen)
    assert set(found) == set(model.sites)
    own = router.base_weights()
    group_of = {index: group for group, sites in enumerate(router.groups.values()) for index in sites}
    with model.experts_off():
        for site, (given, out) in found.items():
            group = group_of[model.sites.index(site)]
            weights = router.weights()[group]
            base = 0.0 if own is None else own[group]
            want = wanted(model.layers[site], given, members, weights, base)
            torch.testing.assert_close(out, want, rtol=0, atol=1e-12, msg=lambda m, site=site: f"{site}: {m}")


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def member(seed, width=8, size=3):
    shapes = ((size, width), (size,), (width, size), (width,))
    small = BottleneckWeights(*(random(*s, seed=seed + i) for i, s in enumerate(shapes)), activation="gelu", reads="h")
    return Member(
        small, NormWeights(1 + random(width, seed=seed + 5), random(width, seed=seed + 6)), torch.float64, 0.0
    )


def test_a_branch_stays_as_it_is_when_another_expert_changes():
    h, x, norm = random(2, 3, 8, seed=1), random(2, 3, 8, seed=2), torch.nn.LayerNorm(8).double()
    end = Ending(h, x, h + x, norm, norm(h + x))
    bank = OutputBank({0: member(10), 1: member(20)}, 2)
    routing = Routing(torch.tensor([[[0.3, 0.5]]]).double(), base=torch.tensor([[[0.2]]]).double())
    with torch.no_grad():
        before, first, second = bank.mixed(end, routing), *(one.branch(end) for one in bank.members)
        for parameter in bank.members[1].parameters():
            parameter.mul_(10.0)
        assert torch.equal(bank.members[0].branch(end), first)
        change = 0.5 * (bank.members[1].branch(end) - second)
        torch.testing.assert_close(bank.mixed(end, routing) - before, change, rtol=0, atol=1e-12)
        assert change.abs().max() > 0.1


@pytest.mark.parametrize("family", ["roberta", "llama"])
@torch.no_grad()
def test_one_hot_logits_stay_when_another_expert_changes(family):
    model = mixture(family, names=("rte", "cola"))
    with model.fixed_weights(rte=1.0):
        want = model(**BATCH).logits
        for layer in model.layers.values():
            for bank in getattr(layer.bank, "banks", [layer.bank]):
                for index in bank.present:
                    part = bank.weights(index)
                    for tensor in part.tensors().values() if index == 1 and part is not None else ():
                        tensor.mul_(5.0)
        assert torch.equal(model(**BATCH).logits, want)


@pytest.mark.parametrize("family", BUILD)
@torch.no_grad()
def test_an_expert_averaged_with_itself_is_that_expert(family):
    adapter = expert(family, "rte")
    given = dict.fromkeys("abcd", adapter)
    want = alone(family, adapter, torch.float64)(**BATCH).logits
    model = mixture(family, UniformConfig(), dtype=torch.float64, whole="take:a", given=given)
    torch.testing.assert_close(model(**BATCH).logits, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", BUILD)
def test_experts_come_back_as_they_were_given(family):
    given = experts(family)
    for name, now in mixture(family, given=given).adapters().items():
        assert now.tensors().keys() == given[name].tensors().keys()
        assert all(torch.equal(tensor, given[name].tensors()[key]) for key, tensor in now.tensors().items())


READERS = {
    "bert": ("self.query", "intermediate.dense"),
    "distilbert": ("q_lin", "lin1"),
    "mpnet": ("attn.q", "intermediate.dense"),
}


@pytest.mark.parametrize("family", READERS)
@torch.no_grad()
def test_what_data_tells_of_a_router_is_the_residual_that_it_reads(family):
    model, plain, want = mixture(family, TopKConfig(top_k=2), names=("rte", "mrpc")), backbone(family), []
    sites = [site for site, layer in model.layers.items() if isinstance(layer, OutputMixture)]
    for path, module in plain.named_modules():
        if path.endswith(READERS[family]):
            module.register_forward_hook(lambda m, given, out: want.append(given[0][0]))
    ids = [3, 4, 5, 6]
    plain(torch.tensor([ids]))
    (seen,) = module_inputs(model, [Sample(ids, [-100] * 4, "rte", "", "", [3, 4])])
    assert len(want) == len(sites) == 4
    for site, x in zip(sites, want, strict=True):
        assert torch.equal(seen[site], x)


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


@pytest.mark.parametrize("family", ["distilbert", "mpnet"])
@torch.no_grad()
def test_mixtures_at_split_sites_copy_whole_and_leave_no_hook(family):
    plain = backbone(family)
    modules = dict(plain.named_modules())
    model = MultiExpertModel(plain, experts(family), MultiAdapterConfig(), modules_to_save="base").eval()
    want, other = model(**BATCH).logits, copy.deepcopy(model)
    model.unload()
    assert dict(plain.named_modules()) == modules
    assert not hooks(plain)
    assert torch.equal(other(**BATCH).logits, want)
    assert not hooks(other.unload())
    with pytest.raises(ValueError, match="router.num_groups=9"):
        MultiExpertModel(plain, experts(family), MultiAdapterConfig(num_groups=9), modules_to_save="base")
    assert dict(plain.named_modules()) == modules
    assert not hooks(plain)


@pytest.mark.parametrize("family", BUILD)
def test_a_mixture_that_one_expert_has_to_itself_is_merged_into_that_expert(family):
    given = {"rte": expert(family, "rte", head=False)}
    model = mixture(family, UniformConfig(), given=given)
    merged = one_expert(model.adapters(), model.routers(), backbone=backbone(family)).adapter.tensors()
    assert merged.keys() == given["rte"].tensors().keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in given["rte"].tensors().items())


@torch.no_grad()
def test_each_example_of_a_batch_gets_its_own_expert():
    given, tasks = experts("roberta"), {name: (name,) for name in EXPERTS}
    model = MultiExpertModel(backbone("roberta"), given, TaskConfig(), tasks=tasks, modules_to_save="take:rte").eval()
    got = model(**BATCH, task_names=["rte", "cola"]).logits
    head = {"classifier": given["rte"].full_modules["classifier"]}
    for row, name in enumerate(("rte", "cola")):
        single = alone("roberta", replace(given[name], full_modules=head))
        torch.testing.assert_close(got[row], single(**BATCH).logits[row], rtol=0, atol=1e-5)


def test_parameters_of_branches_are_not_combined_and_the_reason_is_told():
    with pytest.raises(ValueError, match="combine=parameters: .* are mixed as branches: use combine=outputs"):
        mixture("bert", UniformConfig(combine="parameters"))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_routers_that_go_by_low_rank_changes_refuse_bottlenecks_and_norms(family):
    for config in (ArrowConfig(), SpectralConfig()):
        with pytest.raises(ValueError, match="has (Bottleneck|Norm)Weights at .*: leave that expert out"):
            mixture(family, config)
