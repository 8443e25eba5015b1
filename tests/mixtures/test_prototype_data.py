"""Routers made from data: what modules are given, PHATGOOSE's gates by the one loop, counts, calibration, texts."""

from functools import partial

import pytest
import torch
from mixture_cases import TASKS, llama, three_experts

from mole import data
from mole.adapters import LoraWeights
from mole.commands import preparing
from mole.commands.preparing import prepare
from mole.data import Sample
from mole.experts import BackboneRef, Expert, ExpertLibrary, describe
from mole.mixtures import MultiExpertModel
from mole.mixtures.preparing import prototype_data
from mole.mixtures.preparing.activations import mean_inputs, module_inputs
from mole.mixtures.preparing.gating import gated
from mole.mixtures.preparing.kept import KeptPrototypes
from mole.mixtures.preparing.prototype_data import (
    flatness,
    needs_data,
    prepare_average_activations,
    samples_of,
    unprepared,
)
from mole.registry import ROUTERS
from mole.routers import (
    ArrowConfig,
    AverageActivationConfig,
    HashConfig,
    PhatgooseConfig,
    PredictorConfig,
    SpectralConfig,
    UniformConfig,
)
from mole.run_folder import RunFolder
from mole.training import TrainingConfig, make_accelerator

COLLATE = partial(data.collate, pad_token_id=0)
LEAD = "add", "spell", "upper", "date"


def samples(tasks=LEAD, each=6) -> list[Sample]:
    """Of unequal lengths; the first tokens tell the task."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for place, task in enumerate(tasks):
        for number in range(each):
            ids = torch.randint(3, 100, (6 + number % 3,), generator=generator).tolist()
            ids = (3 + place, 3 + place, *ids)
            found.append(Sample(ids, (-100,) * 4 + ids[4:], task, f"{task} please {number}", "x", ids[:4]))
    return found


def mixture(config, train="none") -> MultiExpertModel:
    return MultiExpertModel(llama(), three_experts(llama()), config, tasks=TASKS, train=train).eval()


def prepared(config, tmp_path, given=None):
    model = mixture(config)
    training = TrainingConfig()
    accelerator = make_accelerator(training, torch.device("cpu"))
    facts = prepare(model, given or samples(), COLLATE, training, accelerator, RunFolder(tmp_path))
    return model, facts


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- what modules are given
@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("expert", [None, "words"])
def test_mean_inputs_are_those_of_the_backbone_s_own_hidden_states(pool, expert):
    """The input of q_proj is the normalised input of its block: transformers gives that as a hidden state."""
    model, given = mixture(AverageActivationConfig()), samples()[:5]
    found = mean_inputs(model, given, pool=pool, expert=expert)
    block = model.backbone.model.layers[1]
    total = torch.zeros(32, dtype=torch.float64)
    for sample in given:
        with torch.no_grad(), model.experts_off() if expert is None else model.fixed_routing({expert: 1.0}):
            states = model(input_ids=torch.tensor([sample.input_ids]), output_hidden_states=True).hidden_states
        x = block.input_layernorm(states[1])[0].double().detach()
        total += x[-1] if pool == "last" else x.mean(0)
    want = torch.nn.functional.normalize(total, dim=0)
    torch.testing.assert_close(found["model.layers.1.self_attn.q_proj"], want, rtol=0, atol=1e-6)
    assert not torch.allclose(want, mean_inputs(model, given, pool=pool, expert="dates")["model.layers.1.mlp.up_proj"])


def test_looking_at_inputs_leaves_the_model_as_it_was():
    model = mixture(AverageActivationConfig(), train="experts").train()
    before, flags = snapshot(model), [m.training for m in model.modules()]
    hooks = [list(m._forward_pre_hooks) for m in model.modules()]
    list(module_inputs(model, samples()[:2]))
    assert [m.training for m in model.modules()] == flags
    assert [list(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_average_activations_take_some_samples_of_each_task_of_an_expert(tmp_path):
    model, facts = prepared(AverageActivationConfig(max_samples=2), tmp_path)
    assert facts == {"samples": {"sums": 2, "words": 4, "dates": 2}}
    own = [sample for sample in samples() if sample.task == "date"]
    want = mean_inputs(model, [own[0], own[3]])
    for site, router in model.routers().items():
        torch.testing.assert_close(router.prototypes[2].double(), want[site], rtol=0, atol=1e-6)
        assert float(router.prototypes[2].norm()) == pytest.approx(1.0, abs=1e-6)
    assert unprepared(model) == ()


def test_experts_that_are_known_are_not_looked_at_again(tmp_path):
    model = mixture(AverageActivationConfig())
    for router in model.routers().values():
        router.take_prototypes({0: torch.ones(router.input_dim), 2: torch.ones(router.input_dim)})
    assert unprepared(model) == ("words",)
    assert prepare_average_activations(model, samples(["spell", "upper"])) == {"samples": {"words": 12}}


def test_an_expert_without_data_is_named():
    with pytest.raises(ValueError, match=r"'words', whose card lists spell, upper \(the data has: add, date\)"):
        samples_of(mixture(AverageActivationConfig()), samples(["add", "date"]), ["sums", "words"])


# ---- PHATGOOSE's gates
def test_gates_lower_the_loss_of_each_expert_and_nothing_else_changes(tmp_path):
    model = mixture(PhatgooseConfig(gate_steps=12, gate_lr=0.02))
    before = snapshot(model)
    requires = {name: p.requires_grad for name, p in model.named_parameters()}
    training = TrainingConfig()
    accelerator = make_accelerator(training, torch.device("cpu"))
    facts = prepare(model, samples(), COLLATE, training, accelerator, RunFolder(tmp_path))["gates"]
    assert {name: one["samples"] for name, one in facts.items()} == {"sums": 6, "words": 12, "dates": 6}
    for one in facts.values():
        assert one["after"]["loss"] < one["before"]["loss"]
        assert one["before"]["mean_gate"] == pytest.approx(0.5)
        assert one["after"]["mean_gate"] != pytest.approx(0.5, abs=1e-6)
    after = model.state_dict()
    assert before.keys() == after.keys()
    changed = {name.rsplit(".", 1)[-1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"prototypes", "present"}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires
    assert {p.name for p in (tmp_path / "preparing").iterdir()} == {"sums", "words", "dates"}
    assert not list((tmp_path / "preparing").rglob("step-*"))


def test_a_gate_is_there_where_the_expert_adapts_something(tmp_path):
    model, _ = prepared(PhatgooseConfig(gate_steps=2), tmp_path)
    for site, router in model.routers().items():
        assert router.present.tolist() == [index in model.layers[site].bank.present for index in range(3)]
        assert bool((router.prototypes[router.present] != 0).any(-1).all())


def test_the_same_seed_trains_the_same_gates(tmp_path):
    first, second = (prepared(PhatgooseConfig(gate_steps=3), tmp_path / str(i))[0] for i in range(2))
    for one, two in zip(first.routers().values(), second.routers().values(), strict=True):
        assert torch.equal(one.prototypes, two.prototypes)


def test_under_gates_the_model_is_the_expert_alone_at_half_strength_at_first():
    model = mixture(PhatgooseConfig())
    ids = torch.tensor([samples()[0].input_ids])
    with torch.no_grad():
        with model.fixed_routing({"words": 0.5}):
            want = model(input_ids=ids).logits
        with gated(model, "words") as gates:
            assert {name for name, p in model.named_parameters() if p.requires_grad} == {
                f"backbone.{site}.router.v" for site in gates if 1 in model.layers[site].bank.present
            }
            torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=0, atol=1e-5)


def test_modules_of_a_block_share_a_gate(tmp_path):
    model, _ = prepared(PhatgooseConfig(gate_steps=2, scope="block"), tmp_path)
    assert len(model.routers()) == 2
    assert all(router.present.all() for router in model.routers().values())


# ---- the others
def test_flat_spectra_are_told_by_expert(caplog):
    experts = three_experts(llama())
    model = MultiExpertModel(llama(), experts, ArrowConfig(), tasks=TASKS, train="none")
    with caplog.at_level("INFO"):
        found = flatness(model)
    for name, adapter in experts.items():
        sigmas = [torch.linalg.svdvals(part.B @ part.A) for part in adapter.modules.values()]
        assert found[name] == pytest.approx(sum(float(s[1] / s[0]) for s in sigmas) / len(sigmas), rel=1e-4)
    assert not caplog.records
    even = torch.linalg.qr(torch.randn(32, 2)).Q
    for path, part in experts["sums"].modules.items():
        rows = torch.linalg.qr(torch.randn(part.B.shape[0], 2)).Q
        experts["sums"].modules[path] = LoraWeights(A=even.T.contiguous(), B=rows, alpha=2.0)
    with caplog.at_level("INFO"):
        found = flatness(MultiExpertModel(llama(), experts, ArrowConfig(), tasks=TASKS, train="none"))
    assert found["sums"] == pytest.approx(1.0, abs=1e-5)
    assert "sums: the second direction" in caplog.text
    assert flatness(mixture(UniformConfig())) == {}


def test_norms_are_calibrated_over_all_tokens(tmp_path):
    model, facts = prepared(SpectralConfig(calibrate="zscore"), tmp_path)
    assert facts == {"samples": 24}
    site, router = next(iter(model.routers().items()))
    norms = torch.cat([router.norms(inputs[site]) for inputs in module_inputs(model, samples())]).double()
    present = router.present
    torch.testing.assert_close(router.mean.double()[present], norms.mean(0)[present], rtol=1e-5, atol=1e-6)
    deviation = norms.std(0, correction=0)[present]
    torch.testing.assert_close(router.deviation.double()[present], deviation, rtol=1e-4, atol=1e-5)


def test_token_counts_make_the_table_of_a_hash_router(tmp_path):
    model, facts = prepared(HashConfig(balanced=True), tmp_path)
    table = model.router.table
    assert len(table) == 101
    loads = [0, 0, 0]
    for sample in samples():
        for token in sample.input_ids:
            loads[int(table[token])] += 1
    assert sum(loads) == facts["tokens"]
    assert max(loads) - min(loads) <= 3
    assert prepare(model, samples(), COLLATE, TrainingConfig(), None, RunFolder(tmp_path)) == {}


@pytest.mark.parametrize("head", ["centroid", "nearest", "knn", "classifier"])
def test_a_predictor_finds_the_experts_of_new_prompts(head, tmp_path):
    config = PredictorConfig(head=head, classifier_steps=40, neighbours=3, examples_per_expert=5)
    model, facts = prepared(config, tmp_path)
    assert facts["texts"] == dict.fromkeys(LEAD, 5)
    from mole.routing import Frame, RoutingInputs

    texts = ("add please 77", "date please 77", "spell please 77", "upper please 77")
    routing = model.router(None, Frame(inputs=RoutingInputs(texts=texts)))
    assert routing.dense(3)[:, 0].argmax(-1).tolist() == [0, 2, 1, 1]


def test_a_predictor_can_read_the_backbone_s_embeddings(tmp_path):
    model, _ = prepared(PredictorConfig(encoder="backbone", head="centroid"), tmp_path)
    batch = COLLATE([samples()[0], samples()[-1]])
    seen = []
    model.listeners.append(type("Seen", (), {"record": lambda self, scalings, **facts: seen.append(scalings)})())
    with torch.no_grad():
        model(**{name: value for name, value in batch.items() if name not in ("labels", "texts")})
    assert seen[0][:, 0, 0].argmax(-1).tolist() == [0, 2]


def test_a_task_without_texts_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no text of the task 'upper' of words \(the data has: add, spell, date\)"):
        prepared(PredictorConfig(), tmp_path, samples(["add", "spell", "date"]))


def test_which_routers_need_data_is_known_from_their_configs():
    built = {
        v.name: v.config() for v in ROUTERS if not any(f.is_required() for f in v.config.__pydantic_fields__.values())
    }
    assert {name for name, config in built.items() if needs_data(config)} == {
        "average_activation",
        "phatgoose",
        "predictor",
    }
    for config in (SpectralConfig(calibrate="zscore"), HashConfig(balanced=True)):
        assert needs_data(config)
    assert not needs_data(ArrowConfig())
    assert not needs_data(UniformConfig())


# ---- what the library keeps
@pytest.mark.parametrize("config", [AverageActivationConfig(max_samples=3), PhatgooseConfig(gate_steps=3)])
def test_prototypes_are_made_once_for_the_same_expert_and_data(config, tmp_path, monkeypatch):
    library = ExpertLibrary.open(str(tmp_path / "lib"))
    cards = {}
    for name, adapter in three_experts(llama()).items():
        card = describe(adapter, BackboneRef("llama"), tasks=list(TASKS[name]))
        cards[name] = library.add_expert(Expert(card, adapter), name)
    kept = KeptPrototypes(library, cards, "ab" * 32)
    calls = []
    for module, what in ((preparing, "_gates"), (prototype_data, "mean_inputs")):
        real = getattr(module, what)
        monkeypatch.setattr(module, what, lambda *a, real=real, **k: calls.append(1) or real(*a, **k))

    def made(given, known=kept):
        model, training = mixture(config), TrainingConfig()
        accelerator = make_accelerator(training, torch.device("cpu"))
        preparing.prepare(model, given, COLLATE, training, accelerator, RunFolder(tmp_path / "run"), kept=known)
        return {site: router.prototypes.clone() for site, router in model.routers().items()}, len(calls)

    first, second, without = made(samples()), made(samples()), made(samples(), None)
    assert (first[1], second[1], without[1]) == (3, 3, 6)
    assert all(torch.equal(first[0][site], v) and torch.equal(without[0][site], v) for site, v in second[0].items())
    assert made(samples(each=7))[1] > 6  # of other samples
    assert {row.card.kind for row in library.artefacts()} == {config.name}
