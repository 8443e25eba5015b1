"""Mixtures under routers that are not trained: beside dense algebra and PEFT; saved, loaded, generating."""

import copy
import json

import peft
import pytest
import torch
from mixture_cases import TASKS, expert, llama, three_experts
from peft.tuners.lora.config import ArrowConfig as PeftArrowConfig

from mole.adapters import Adapter, LoraWeights
from mole.backbones import Backbone
from mole.backbones.load import shapes_digest
from mole.mixtures import MultiExpertModel, load_mixture, save_mixture
from mole.mixtures.preparing.prototype_data import give_prototypes
from mole.routers import (
    ArrowConfig,
    AverageActivationConfig,
    HashConfig,
    PhatgooseConfig,
    PredictorConfig,
    SingleConfig,
    SpectralConfig,
    UniformConfig,
)
from mole.untrusted import Damaged

PADDED = ("input_ids", "attention_mask", "prompt_mask")
CASES = {
    "single": SingleConfig(expert="words"),
    "hash": HashConfig(),
    "hash_task": HashConfig(by="task", num_hashes=2),
    "hash_example": HashConfig(by="example"),
    "hash_balanced": HashConfig(balanced=True),
    "arrow": ArrowConfig(top_k=2),
    "arrow_groups": ArrowConfig(scope="group", group_by=r"layers\.(\d+)\.self_attn", rest="layer"),
    "arrow_general": ArrowConfig(general_experts=("dates",)),
    "spectral": SpectralConfig(calibrate="zscore"),
    "spectral_truncated": SpectralConfig(general_experts=("dates",), subtract_rank=2, prefilter=4),
    "phatgoose": PhatgooseConfig(),
    "average_activation": AverageActivationConfig(),
    "predictor": PredictorConfig(min_confidence=0.4),
    "predictor_embeddings": PredictorConfig(encoder="backbone", head="nearest", top_k=2),
}
TEXTS = {"add": "2 plus 3", "spell": "spell the word", "upper": "shout it loud", "date": "which day is it"}


def mixture(config, experts=None, dtype=torch.float32) -> MultiExpertModel:
    """Over the three experts, with made-up data where the router needs some."""
    model = MultiExpertModel(llama(dtype), experts or three_experts(llama(), dtype), config, tasks=TASKS, train="none")
    generator = torch.Generator().manual_seed(3)
    for site, router in model.routers().items():
        if "prototypes" in router.needs and router.scope == "layer":
            for name in model.expert_names:
                give_prototypes(model, name, {site: torch.randn(router.input_dim, generator=generator)})
        if getattr(config, "calibrate", "") == "zscore":
            router.take_calibration({e: (float(e), 0.5 + e) for e in range(3)})
    if config.name == "hash" and config.balanced:
        model.router.take_counts({token: 200 - token for token in range(0, 90, 2)}, 101)
    if config.name == "predictor":
        model.router.learn_frequencies(list(TEXTS.values()))
        embedded = model.router.embedded if config.encoder == "tfidf" else lambda texts: torch.randn(len(texts), 32)
        model.router.take_examples({task: embedded([text]) for task, text in TEXTS.items()})
    return model.to(dtype).eval()


def backbone(model) -> Backbone:
    return Backbone(model, None, "tests/llama", None, shapes_digest(llama()))


def batch(rows=2, length=7):
    ids = torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(1))
    names = ["add", "date", "spell"][:rows]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "prompt_mask": torch.arange(length).expand(rows, -1) < 4,
        "task_names": names,
        "texts": [f"please: {TEXTS[name]}" for name in names],
    }


def dense_model(changes: dict[str, torch.Tensor], dtype=torch.float32):
    """The plain backbone with ΔW added to the weights of the modules at these paths."""
    model = llama(dtype)
    for path, change in changes.items():
        model.get_submodule(path).weight.data += change.to(dtype)
    return model


def dense(weights) -> torch.Tensor:
    return weights.scale * weights.B.double() @ weights.A.double()


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded_logits_are_equal_bit_for_bit(name, tmp_path):
    model = mixture(CASES[name])
    save_mixture(model, tmp_path / "mixture", backbone(model.backbone))
    loaded = load_mixture(tmp_path / "mixture", backbone(llama()))
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    for (path, adapter), kept in zip(three_experts(llama()).items(), loaded.adapters().values(), strict=True):
        for site, weights in adapter.modules.items():
            assert torch.equal(kept.modules[site].A, weights.A), path


def test_a_saved_state_of_other_experts_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from mole.experts.card import file_facts

    model = mixture(CASES["hash_balanced"])
    save_mixture(model, tmp_path / "mixture", backbone(model.backbone))
    state = load_file(tmp_path / "mixture" / "router.safetensors")
    state["table"][3] = 7
    save_file(state, tmp_path / "mixture" / "router.safetensors")
    from mole.experts.folder import read_card, write_card

    card = read_card(tmp_path / "mixture")
    facts = {**card.files, "router.safetensors": file_facts(tmp_path / "mixture" / "router.safetensors")}
    for name in ("expert.json", "README.md"):
        (tmp_path / "mixture" / name).unlink()
    write_card(card.edited(files=facts), tmp_path / "mixture")
    with pytest.raises(Damaged, match="does not have"):
        load_mixture(tmp_path / "mixture", backbone(llama()))


@pytest.mark.parametrize("name", CASES)
def test_cached_generation_equals_generation_without_cache(name):
    model = mixture(CASES[name], dtype=torch.float64)
    ids = batch(3, 6)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :1] = 0, 0
    given = {name: batch(3)[name] for name in ("task_names", "texts")}
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, **given}
    cached = model.generate(input_ids=ids, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))
    alone = {key: value[:1] if key != "attention_mask" else mask[:1, 3:] for key, value in given.items()}
    row = model.generate(input_ids=ids[:1, 3:], max_new_tokens=6, do_sample=False, **alone)
    ends = (cached[0, 6:] == 2).nonzero()
    length = int(ends[0]) if len(ends) else 6
    assert torch.equal(row[0, 3 : 3 + length], cached[0, 6 : 6 + length])
    options |= {"num_beams": 3, "num_return_sequences": 2}
    beams = model.generate(input_ids=ids, **options)
    assert torch.equal(beams, model.generate(input_ids=ids, use_cache=False, **options))


@pytest.mark.parametrize("name", CASES)
def test_padding_on_either_side_changes_nothing(name):
    model, given = mixture(CASES[name], dtype=torch.float64), batch()
    want = model(**given).logits
    for left, right in ((3, 0), (0, 4)):
        padded = {key: torch.nn.functional.pad(given[key], (left, right)) for key in PADDED}
        positions = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
        found = model(**{**given, **padded}, position_ids=positions).logits
        torch.testing.assert_close(found[:, left : left + 7], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_copies_compute_the_same(name):
    model = mixture(CASES[name])
    want = model(**batch()).logits
    assert torch.equal(copy.deepcopy(model)(**batch()).logits, want)


def test_single_is_that_expert_alone_bit_for_bit():
    experts = three_experts(llama())
    for name, adapter in experts.items():
        alone = MultiExpertModel(llama(), {name: adapter}, UniformConfig(), train="none").eval()
        model = mixture(SingleConfig(expert=name))
        assert torch.equal(model(**batch()).logits, alone(**batch()).logits)
        assert model.router.mergeable().tolist() == [float(name == other) for other in experts]


# ---- general knowledge
def same_modules(count=4, rank=3):
    """Experts that all adapt the same modules."""
    return {
        f"e{i}": expert(llama(), ["q_proj", "v_proj", "down_proj"], rank=rank, alpha=4.0, seed=10 + i)
        for i in range(count)
    }


@pytest.mark.parametrize("subtract_rank", [None, 9])
def test_general_knowledge_comes_off_as_from_dense_weights(subtract_rank):
    """With one expert to choose, the mixture is the backbone + ΔW_e − mean ΔW_g; a rank that holds all is exact."""
    experts = same_modules(3)
    config = ArrowConfig(general_experts=("e1", "e2"), top_k=1, subtract_rank=subtract_rank)
    model = MultiExpertModel(llama(), experts, config, train="none").eval()
    changes = {
        site: dense(experts["e0"].modules[site]) - sum(dense(experts[g].modules[site]) for g in ("e1", "e2")) / 2
        for site in experts["e0"].modules
    }
    given = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**given).logits, dense_model(changes)(**given).logits, rtol=0, atol=3e-4)


def test_truncated_differences_are_the_nearest_of_their_rank():
    experts = same_modules(2)
    config = ArrowConfig(general_experts=("e1",), subtract_rank=2)
    model = MultiExpertModel(llama(), experts, config, train="none").eval()
    changes = {}
    for site, weights in experts["e0"].modules.items():
        U, S, V = torch.linalg.svd(dense(weights) - dense(experts["e1"].modules[site]), full_matrices=False)
        changes[site] = U[:, :2] * S[:2] @ V[:2]
    given = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**given).logits, dense_model(changes)(**given).logits, rtol=0, atol=3e-4)


def test_experts_without_general_knowledge_do_not_train():
    config = ArrowConfig(general_experts=("e1",), subtract="factors")
    with pytest.raises(ValueError, match="do not train"):
        MultiExpertModel(llama(), same_modules(2), config, train="experts")


# ---- PEFT's Arrow
@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four LoRA folders saved by PEFT, of one rank and alpha, each with a leading direction far above the others."""
    made = []
    for index, adapter in enumerate(same_modules().values()):
        options = {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        for path, weights in adapter.modules.items():
            module = model.base_model.model.get_submodule(path)
            module.lora_A["default"].weight.data = steep(weights).A
            module.lora_B["default"].weight.data = steep(weights).B
        made.append(str(tmp_path_factory.mktemp("experts") / str(index)))
        model.save_pretrained(made[-1])
    return made


def steep(weights) -> LoraWeights:
    """The same with a first direction 20 times as large: 15 power iterations find it."""
    U, S, V = torch.linalg.svd(weights.B @ weights.A, full_matrices=False)
    S = torch.tensor([3.0, 0.15, 0.1])
    return LoraWeights(A=S.sqrt()[:, None] * V[:3], B=U[:, :3] * S.sqrt(), alpha=weights.alpha)


def steep_experts(count=4):
    return {
        name: Adapter(method="lora", modules={path: steep(w) for path, w in adapter.modules.items()})
        for name, adapter in same_modules(count).items()
    }


@pytest.mark.parametrize("general", [0, 1])
def test_logits_are_those_of_peft_s_arrow(folders, general):
    from peft import create_arrow_model

    task, gks = folders[: 4 - general], folders[4 - general :]
    settings = PeftArrowConfig(top_k=2, router_temperature=0.7, use_gks=bool(general))
    oracle = create_arrow_model(llama(torch.float64), task, settings, general_adapter_paths=gks or None).eval()
    oracle.double()
    names = tuple(f"e{i}" for i in range(4 - general, 4))
    config = ArrowConfig(top_k=2, temperature=0.7, general_experts=names, subtract="factors" if names else None)
    model = MultiExpertModel(llama(torch.float64), steep_experts(), config, train="none").eval()
    given = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        oracle(**given)  # which is when it makes its prototypes
        if general:  # the differences have no gap: its iterations are given the exact vectors
            for path, router in model.routers().items():
                layer = oracle.base_model.model.get_submodule(path).lora_arrow["arrow_router"]
                layer.prototypes.copy_(router.prototypes[: 4 - general])
        torch.testing.assert_close(model(**given).logits, oracle(**given).logits, rtol=0, atol=1e-5)


def test_what_an_expert_adapts_of_another_kind_is_refused_where_the_router_is_built():
    experts = three_experts(llama())
    site = next(iter(experts["sums"].modules))
    experts["sums"].modules[site] = LoraWeights(
        A=experts["sums"].modules[site].A,
        B=experts["sums"].modules[site].B,
        alpha=4.0,
        magnitude=torch.ones(experts["sums"].modules[site].B.shape[0]),
    )
    with pytest.raises(ValueError, match="DoRA"):
        mixture(ArrowConfig(general_experts=("sums",)), experts)
    assert mixture(ArrowConfig(), experts).routers()  # its low-rank part is what Arrow goes by


def test_the_description_names_the_general_experts(tmp_path):
    model = mixture(CASES["arrow_general"])
    save_mixture(model, tmp_path / "mixture", backbone(model.backbone))
    described = json.loads((tmp_path / "mixture" / "mixture.json").read_text())
    assert described["router"]["general_experts"] == ["dates"]
