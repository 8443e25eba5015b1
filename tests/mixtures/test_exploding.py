"""Experts as their parts of rank one: exact in sum, refused where there is no such sum, saved and loaded."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mixture_cases import TASKS, expert, llama, three_experts

from mole.adapters import LoraWeights
from mole.backbones import Backbone
from mole.backbones.load import shapes_digest
from mole.mixtures import MultiExpertModel, Origin, load_mixture, mixture_of, save_mixture
from mole.mixtures.exploding import exploded, parent_of
from mole.routers import UniformConfig


def held(model) -> Backbone:
    return Backbone(model, None, "tests/llama", None, shapes_digest(llama()))


IDS = torch.tensor([[5, 17, 33, 60, 8], [9, 2, 71, 44, 3]])


def logits(experts, weights, biases=()):
    model = llama(torch.float64)
    made = experts(model)
    for name in biases:
        part = made[name].modules
        made[name] = replace(made[name], modules={p: biased(w) for p, w in part.items()})
    parts = exploded(made) if weights == "parts" else made
    share = {"sums": 0.7, "words": -0.2, "dates": 0.4}
    mixture = MultiExpertModel(model, parts, UniformConfig(), train="none").eval()
    with torch.no_grad(), mixture.fixed_routing({name: share[parent_of(name)] for name in parts}):
        return mixture(input_ids=IDS, use_cache=False).logits


def biased(weights: LoraWeights) -> LoraWeights:
    return replace(weights, bias=torch.arange(weights.B.shape[0], dtype=torch.float64) / 10)


@pytest.mark.parametrize("biases", [(), ("words",)], ids=["factors", "and biases"])
def test_equal_weights_of_all_parts_are_the_expert(biases):
    whole, parts = (logits(lambda m: three_experts(m, torch.float64), kind, biases) for kind in ("whole", "parts"))
    assert (whole - parts).abs().max() < 1e-12


def test_parts_are_named_after_their_expert_and_absent_above_its_rank():
    model = llama()
    two, three = (expert(model, ["q_proj"], rank=rank, alpha=1.0) for rank in (2, 3))
    mixed = replace(three, modules={**three.modules, **expert(model, ["v_proj"], rank=1, alpha=1.0).modules})
    parts = exploded({"a": two, "b": mixed})
    assert list(parts) == ["a#0", "a#1", "b#0", "b#1", "b#2"]
    assert {path.rsplit(".", 1)[-1] for path in parts["b#0"].modules} == {"q_proj", "v_proj"}
    assert {path.rsplit(".", 1)[-1] for path in parts["b#1"].modules} == {"q_proj"}
    assert {weights.rank for part in parts.values() for weights in part.modules.values()} == {1}
    assert [parent_of(name) for name in ("a#1", "a")] == ["a", "a"]


def test_parts_hold_no_copies():
    (path, weights), *_ = (made := expert(llama(), ["q_proj"], rank=3, alpha=1.0)).modules.items()
    part = exploded({"a": made})["a#2"].modules[path]
    assert part.A.untyped_storage().data_ptr() == weights.A.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: replace(a, biases={"model.norm": torch.zeros(1)}), "it trained biases or whole modules"),
        (
            lambda a: replace(a, modules={p: replace(w, magnitude=torch.ones(len(w.B))) for p, w in a.modules.items()}),
            "q_proj it is DoRA",
        ),
        (lambda a: replace(a, modules=dict.fromkeys(a.modules, object())), "q_proj it is no LoRA"),
    ],
    ids=["biases", "dora", "kind"],
)
def test_what_is_no_sum_of_parts_is_refused_with_the_name_of_the_expert(change, reason):
    made = change(expert(llama(), ["q_proj"], rank=2, alpha=1.0))
    with pytest.raises(ValueError, match=f"explode=rank_one: expert 'a' is no sum .*{reason}"):
        exploded({"a": made})


def test_a_mixture_of_parts_is_saved_with_the_origin_of_each_expert(tmp_path):
    model = llama()
    parts = exploded({"sums": three_experts(model)["sums"]})
    mixture = MultiExpertModel(model, parts, UniformConfig(), train="none").eval()
    want = mixture(input_ids=IDS, use_cache=False).logits
    revision, content = "a" * 64, "b" * 64
    origin = Origin(name="sums", tasks=("add",), library="s3://here", revision=revision, content=content)
    card = save_mixture(mixture, tmp_path / "mixture", held(model), origins={"sums": origin})
    assert [made["name"] for made in card.derived_from] == ["sums"]
    fresh = load_mixture(tmp_path / "mixture", held(llama()))
    assert fresh.expert_names == ("sums#0", "sums#1")
    assert fresh.shape.expert_tasks == (("add",), ("add",))
    assert torch.equal(fresh(input_ids=IDS, use_cache=False).logits, want)


def test_a_mixture_of_parts_is_built_by_name_with_the_tasks_of_each_expert(monkeypatch):
    monkeypatch.setattr("mole.mixtures.opening.check_backbone", lambda *args, **options: None)
    model = llama()
    experts: dict = {
        name: SimpleNamespace(adapter=adapter, card=SimpleNamespace(tasks=TASKS[name]))
        for name, adapter in three_experts(model).items()
    }
    built = mixture_of(experts, held(model), UniformConfig(), train="none", explode="rank_one")
    assert built.expert_names[:3] == ("sums#0", "sums#1", "words#0")
    assert built.shape.expert_tasks[:3] == (("add",), ("add",), ("spell", "upper"))
    with pytest.raises(ValueError, match="unknown explode 'rank_noe'; did you mean rank_one"):
        mixture_of(experts, held(llama()), UniformConfig(), explode="rank_noe")
