"""What every registered way of merging promises, without a line for any single one."""

from dataclasses import replace

import peft
import pytest
import torch
from merging_cases import SHAPES, dense, experts, rotated
from transformers import LlamaConfig, LlamaForCausalLM

import mole.merging  # noqa: F401  fills the registry
from mole.adapters import Adapter, LoraWeights, peft_format
from mole.merging import merge
from mole.mixtures import MultiExpertModel
from mole.registry import MERGES
from mole.routers import UniformConfig

CONFIGS = [pytest.param(variant.config(), id=variant.name) for variant in MERGES]
SPACES = [
    pytest.param(variant.config(space=space), id=f"{variant.name}-{space}")
    for variant in MERGES
    if "space" in variant.config.__pydantic_fields__
    for space in ("delta", "core", "knots")
    if space in str(variant.config.__pydantic_fields__["space"].annotation)
]


def fitting(config, adapters=None) -> dict[str, Adapter]:
    """As many experts as the method takes."""
    adapters = adapters or experts()
    count = MERGES[config.name].implementation.exactly or len(adapters)
    return dict(list(adapters.items())[:count])


def merged(config, adapters, **options):
    rank = "exact" if MERGES[config.name].implementation.keeps_rank else "full"
    return dense(merge(adapters, config, **{"rank": rank, "dtype": "float64", **options}).adapter)


def assert_same(found, wanted, tolerance=1e-9):
    assert list(found) == list(wanted)
    for path in wanted:
        torch.testing.assert_close(found[path], wanted[path], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_module_of_every_expert_is_in_the_result(config):
    result = merge(fitting(config), config)
    assert list(result.adapter.modules) == list(SHAPES)
    assert [layer.path for layer in result.layers] == list(SHAPES)
    for path, weights in result.adapter.modules.items():
        assert (weights.B.shape[0], weights.A.shape[1]) == SHAPES[path]
        assert weights.A.dtype == weights.B.dtype == torch.float32
        assert weights.A.isfinite().all()
        assert weights.scale == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_the_experts_are_not_changed(config):
    adapters = fitting(config)
    before = {name: {k: t.clone() for k, t in adapter.tensors().items()} for name, adapter in adapters.items()}
    merge(adapters, config)
    assert all(torch.equal(t, before[name][k]) for name, a in adapters.items() for k, t in a.tensors().items())


@pytest.mark.parametrize("config", [*CONFIGS, *SPACES])
def test_a_second_time_gives_the_same_bits(config):
    adapters = fitting(config)
    first, second = merge(adapters, config), merge(adapters, config)
    assert all(torch.equal(t, second.adapter.tensors()[k]) for k, t in first.adapter.tensors().items())


@pytest.mark.parametrize("config", [*CONFIGS, *SPACES])
def test_the_order_of_experts_changes_nothing(config):
    adapters = fitting(config)
    turned = dict(reversed(adapters.items()))
    assert_same(merged(config, turned), merged(config, adapters), tolerance=1e-12)


@pytest.mark.parametrize("config", [*CONFIGS, *SPACES])
def test_the_rotation_of_an_experts_factors_changes_nothing(config):
    # DARE's mask lies over numbers, and those of a core may change their sign: what is left of them may not.
    adapters = fitting(config)
    assert_same(merged(config, rotated(adapters)), merged(config, adapters))


@pytest.mark.parametrize("config", CONFIGS)
def test_the_names_of_experts_may_be_any_where_no_seed_is_drawn(config):
    if "seed" in type(config).__pydantic_fields__:
        pytest.skip("what is drawn depends on the names")
    adapters = fitting(config)
    renamed = dict(zip(("z", "b", "a"), adapters.values(), strict=False))
    assert_same(merged(config, renamed), merged(config, adapters))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rank", [2, "max", "energy:0.9"])
def test_the_reported_error_is_what_the_rank_lost(config, rank):
    if MERGES[config.name].implementation.keeps_rank:
        pytest.skip("keeps every rank")
    adapters = fitting(config)
    whole, result = merged(config, adapters), merge(adapters, config, rank=rank, dtype="float64")
    found = dense(result.adapter)
    for layer in result.layers:
        sigma = torch.linalg.svdvals(whole[layer.path])
        lost = (found[layer.path] - whole[layer.path]).norm()
        assert layer.norm == pytest.approx(float(whole[layer.path].norm()))
        assert layer.error == pytest.approx(float(lost / whole[layer.path].norm()), abs=1e-9)
        assert layer.error == pytest.approx(float(sigma[layer.rank :].norm() / sigma.norm()), abs=1e-9)
        assert layer.next_sigma == pytest.approx(float(sigma[layer.rank] if layer.error > 1e-9 else 0), abs=1e-9)
        if rank == "energy:0.9":
            held = sigma.square().cumsum(0) / sigma.square().sum()
            assert held[layer.rank - 1] >= 0.9 - 1e-12
            assert layer.rank == 1 or held[layer.rank - 2] < 0.9


@pytest.mark.parametrize("config", CONFIGS)
def test_updates_of_zero_become_an_update_of_zero(config):
    adapters = {
        name: replace(adapter, modules={p: replace(w, B=torch.zeros_like(w.B)) for p, w in adapter.modules.items()})
        for name, adapter in fitting(config).items()
    }
    result = merge(adapters, config)
    assert result.error == 0
    assert not any(delta.any() for delta in dense(result.adapter).values())


@pytest.mark.parametrize("config", [p for p in CONFIGS if "weights" in type(p.values[0]).__pydantic_fields__])
def test_weights_for_nobody_and_experts_without_a_weight_are_refused(config):
    with pytest.raises(ValueError, match=r"weights: unknown expert 'sum'; did you mean sums\?"):
        merge(fitting(config), replace(config, weights={"sum": 1.0}))
    with pytest.raises(ValueError, match="weights: none for dates: give every expert its weight"):
        merge(fitting(config), replace(config, weights={"sums": 1.0, "words": 0.5}))


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_to_merge_and_unknown_settings_are_refused(config):
    with pytest.raises(ValueError, match="nothing to merge: name at least one expert"):
        merge({}, config)
    for options, told in (
        ({"rank": 0}, "rank=0: wanted"),
        ({"rank": "energy"}, "energy:0.99"),
        ({"dtype": "int8"}, "int8"),
    ):
        with pytest.raises(ValueError, match=told):
            merge(fitting(config), config, **options)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def experts_of_llama(model) -> dict[str, Adapter]:
    """On query, value (not square) and down projections; unequal ranks and targets."""
    made = {}
    for place, (name, ends) in enumerate(
        {"a": ("q_proj", "v_proj"), "b": ("v_proj", "down_proj"), "c": ("q_proj",)}.items()
    ):
        generator = torch.Generator().manual_seed(place)
        modules = {
            path: LoraWeights(
                A=0.3 * torch.randn(place + 2, module.in_features, generator=generator),
                B=0.3 * torch.randn(module.out_features, place + 2, generator=generator),
                alpha=4.0,
            )
            for path, module in model.named_modules()
            if path.endswith(ends)
        }
        made[name] = Adapter("lora", modules, targets=ends)
    return made


@pytest.mark.parametrize("config", CONFIGS)
def test_peft_loads_the_result_and_gives_the_logits_of_the_backbone_with_the_update_in_its_weights(config, tmp_path):
    model = llama()
    result = merge(
        fitting(config, experts_of_llama(model)), config, rank=4 if config.name in ("ties", "dare") else "auto"
    )
    peft_format.write(result.adapter, tmp_path, "llama")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)(input_ids=ids).logits
        mine = MultiExpertModel(llama(), {"one": result.adapter}, UniformConfig()).eval()(input_ids=ids).logits
        for path, delta in dense(result.adapter).items():
            model.get_submodule(path).weight += delta.to(torch.float32)
        added = model(input_ids=ids).logits
    assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (added - theirs).abs().max() <= 1e-5 * theirs.abs().max()
