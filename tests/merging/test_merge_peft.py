"""PEFT's `add_weighted_adapter` as the oracle: the same updates where its way of merging is right."""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mole.adapters import Adapter, peft_format
from mole.merging import ConcatConfig, DareConfig, LinearConfig, TaskArithmeticConfig, TiesConfig, merge
from mole.merging.dare import thinned
from mole.merging.spaces import Grid

TARGETS = ["q_proj", "v_proj", "down_proj"]
NAMES = ("a", "b", "c")
WEIGHTS = {"a": 0.7, "b": 0.4, "c": 1.3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three LoRAs of equal rank, saved by PEFT, with scales that differ."""
    made = []
    for place, name in enumerate(NAMES):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        options = {"r": 3, "lora_alpha": (6, 12, 3)[place], "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(**options))
        generator = torch.Generator().manual_seed(place)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        made.append(tmp_path_factory.mktemp("peft") / name)
        model.save_pretrained(made[-1])
        model.unload().save_pretrained(made[-1].parent / "backbone")
    return made


def read(folders) -> dict[str, Adapter]:
    return {name: peft_format.read(folder) for name, folder in zip(NAMES, folders, strict=True)}


def pefts(folders, how, weights, **options) -> dict[str, torch.Tensor]:
    """Path → ΔW of PEFT's merge."""
    backbone = LlamaForCausalLM.from_pretrained(folders[0].parent / "backbone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own: a density of 1, several adapters
        model = peft.PeftModel.from_pretrained(backbone, folders[0], adapter_name="a")
        for name, folder in zip(NAMES[1:], folders[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
        model.add_weighted_adapter(list(NAMES), weights, "out", combination_type=how, **options)
    found = {}
    for path, module in model.base_model.model.named_modules():
        if "out" in getattr(module, "lora_A", {}):
            found[path] = module.get_delta_weight("out")
    return found


def assert_equal(config, folders, how, weights=None, rank="exact", **options):
    result = merge(read(folders), config, rank=rank, dtype="float64")
    theirs = pefts(folders, how, list((weights or dict.fromkeys(NAMES, 1.0)).values()), **options)
    assert set(theirs) == set(result.adapter.modules)
    for path, wanted in theirs.items():
        part = result.adapter.modules[path]
        found = (part.scale * part.B @ part.A).to(wanted.dtype)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_concat_is_pefts_cat(folders):
    assert_equal(ConcatConfig(weights=WEIGHTS), folders, "cat", WEIGHTS)


@pytest.mark.parametrize("weights", [WEIGHTS, {"a": 0.7, "b": -0.4, "c": 1.3}], ids=["positive", "signed"])
def test_linear_in_split_factors_is_pefts_linear(folders, weights):
    assert_equal(LinearConfig(weights=weights, space="split_factors"), folders, "linear", weights)


def test_task_arithmetic_of_a_lower_rank_is_pefts_svd(folders):
    assert_equal(TaskArithmeticConfig(weights=WEIGHTS), folders, "svd", WEIGHTS, rank=4, svd_rank=4)


def test_ties_before_its_svd_is_pefts_ties_svd(folders):
    assert_equal(TiesConfig(density=0.37), folders, "ties_svd", density=0.37, svd_rank=16)


def test_ties_by_frequency_is_pefts_but_where_as_many_experts_say_plus_as_minus(folders):
    # There PEFT takes plus, mole the majority of the module, as the paper's code does.
    adapters = read(folders)
    options = {"density": 0.37, "majority_sign_method": "frequency", "svd_rank": 16}
    theirs = pefts(folders, "ties_svd", [1.0] * 3, **options)
    mine = merge(adapters, TiesConfig(density=0.37, sign="frequency"), rank="exact", dtype="float64").adapter.modules
    for path, wanted in theirs.items():
        deltas = torch.stack([a.modules[path].scale * a.modules[path].B @ a.modules[path].A for a in adapters.values()])
        kept = [d * (d.abs() >= d.abs().flatten().sort().values[-int(0.37 * d.numel())]) for d in deltas]
        decided = torch.stack(kept).sign().sum(0) != 0
        found = (mine[path].B @ mine[path].A).to(wanted.dtype)
        assert 0.3 < decided.float().mean() < 0.99
        assert (found - wanted)[decided].abs().max() <= 1e-5 * wanted.abs().max()


@pytest.fixture
def one_scale(folders, tmp_path):
    """The same experts with one scale: PEFT elects the sign without weights, and in factors a scale is one."""
    for name, adapter in read(folders).items():
        modules = {path: replace(weights, alpha=6.0) for path, weights in adapter.modules.items()}
        (tmp_path / name).mkdir()
        peft_format.write(replace(adapter, modules=modules), tmp_path / name, "backbone")
    LlamaForCausalLM.from_pretrained(folders[0].parent / "backbone").save_pretrained(tmp_path / "backbone")
    return [tmp_path / name for name in NAMES]


def test_ties_in_split_factors_is_pefts_ties(one_scale):
    assert_equal(TiesConfig(density=0.5, space="split_factors"), one_scale, "ties", density=0.5)


def masks(calls: Iterator[tuple[str, str]]):
    """PEFT's random pruning with mole's masks; the calls come module by module, expert by expert."""

    def prune(tensor, density, rescale):
        assert rescale
        key, name = next(calls)
        grid = Grid(key, tuple(tensor.shape), {name: lambda start, stop: tensor.double()[start:stop]})
        return thinned(grid, density, 5).entries[name](0, tensor.shape[0]).to(tensor.dtype)

    return prune


@pytest.mark.parametrize(("then", "how"), [("linear", "dare_linear_svd"), ("ties", "dare_ties_svd")])
def test_dare_with_one_mask_is_pefts_before_its_svd(folders, then, how, monkeypatch):
    paths = pefts(folders, "cat", [1.0] * 3)
    calls = iter([(path, name) for path in paths for name in NAMES])
    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", masks(calls))
    ones = dict.fromkeys(NAMES, 1.0)
    config = DareConfig(density=0.6, seed=5, then=then, weights=ones)
    assert_equal(config, folders, how, density=0.6, svd_rank=16)


@pytest.mark.parametrize(
    ("then", "how", "weights"),
    [("linear", "dare_linear", WEIGHTS), ("ties", "dare_ties", dict.fromkeys(NAMES, 1.0))],
)
def test_dare_in_split_factors_with_one_mask_is_pefts(one_scale, then, how, weights, monkeypatch):
    paths = pefts(one_scale, "cat", [1.0] * 3)
    calls = iter([(f"{path}.{factor}", name) for path in paths for factor in "AB" for name in NAMES])
    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", masks(calls))
    config = DareConfig(density=0.6, seed=5, then=then, space="split_factors", weights=weights)
    assert_equal(config, one_scale, how, weights, density=0.6)
