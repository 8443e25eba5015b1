"""Data to classify on the command line: experts with heads, multi-adapters over them, weights, scores, refusals."""

import json
from pathlib import Path

import pytest
import torch
from walk import files, mole

from mole import backbones, data, mixtures
from mole.analysis import get_latest_log
from mole.backbones import TinyEncoderConfig
from mole.cli.main import main
from mole.config.seeds import seed_for
from mole.data.majority import MajorityAConfig
from mole.evaluation import predict, scores
from mole.experts import load_expert
from mole.head import Head

FEW = ["dataset.examples=96", "dataset.validation_examples=20", "dataset.test_examples=12"]
SHORT = ["training.batch_size=8", "training.checkpoint_every=null", "training.learning_rate=2e-3"]
ON = ["backbone=tiny_encoder", "backbone.device=cpu"]
HEAD = Head("classification", ("no", "yes"))


def expert(task: str, folder: Path, *words: str) -> None:
    settings = ["adapter=houlsby", "adapter.size=4", "training.max_steps=6", "training.evaluate_every=3"]
    mole("train-expert", *ON, f"dataset={task}", *FEW, *SHORT, *settings, f"run.folder={folder}", *words)


def mix(root: Path, folder: Path, *words: str) -> None:
    experts = [f"library={root / 'library'}", "router=multi_adapter", "log_examples=2"]
    steps = ["training.max_steps=5", "training.evaluate_every=null"]
    mole("build-moe", *ON, "dataset=majority_a", *FEW, *SHORT, *steps, *experts, f"run.folder={folder}", *words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two experts and a multi-adapter over them."""
    root = tmp_path_factory.mktemp("multi")
    for task in ("majority_a", "majority_b"):
        expert(task, root / task, f"name={task}", f"library={root / 'library'}")
    mix(root, root / "multi")
    return root


def facts(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def validation(folder: Path):
    """The validation samples of the run in `folder`, and its backbone anew."""
    backbone = backbones.load(TinyEncoderConfig(device="cpu"), head=HEAD, seed=seed_for("head", 0))
    config = MajorityAConfig(examples=96, validation_examples=20, test_examples=12)
    return backbone, data.load(config, backbone.tokenizer, seed=0).validation


class TestExpertsWithHeads:
    def test_a_run_leaves_an_expert_its_predictions_and_nothing_else(self, runs):
        found = {name for name in files(runs / "majority_a") if not name.startswith(("checkpoints/", "plots/"))}
        expert_files = {"README.md", "adapter_model.safetensors", "expert.json", "mole_adapter.json"}
        kept = {"config.yaml", "run.json", "metrics.jsonl", "log.txt", "samples.jsonl", "predictions.jsonl"}
        assert found == {*kept, *(f"expert/{name}" for name in expert_files)}

    def test_the_card_tells_of_head_and_scores(self, runs):
        card = load_expert(runs / "majority_a").card
        assert card.head == {"type": "classification", "labels": ["no", "yes"]}
        assert card.adapter["full_modules"] == ["classifier"]
        assert [row["metric"] for row in card.scores] == ["accuracy", "loss"]  # the main one first

    def test_the_score_of_the_best_step_is_that_of_the_weights_that_were_kept(self, runs):
        told = facts(runs / "majority_a")
        lines = map(json.loads, (runs / "majority_a" / "metrics.jsonl").read_text().splitlines())
        best = [line for line in lines if line["step"] == told["result"]["best_step"] and "validation_score" in line]
        assert told["validation"]["score"] == best[0]["validation_score"] == told["result"]["best_score"]

    def test_the_library_shows_the_main_score_and_the_labels(self, runs, capsys):
        mole("library", "list", str(runs / "library"))
        assert "accuracy" in capsys.readouterr().out
        mole("library", "show", str(runs / "library"), "majority_a")
        assert "no, yes" in capsys.readouterr().out

    def test_predictions_are_those_of_the_expert_in_a_fresh_model(self, runs):
        backbone, samples = validation(runs)
        model = mixtures.open_model(str(runs / "majority_a"), backbone)
        logits = predict(model, samples, lambda part: data.collate(part, pad_token_id=1), batch_size=8)
        lines = [json.loads(line) for line in (runs / "majority_a" / "predictions.jsonl").read_text().splitlines()]
        assert torch.equal(torch.tensor([line["logits"] for line in lines]), logits)
        told = scores("accuracy", HEAD, logits, [sample.target for sample in samples])["score"]
        assert told == facts(runs / "majority_a")["validation"]["score"]

    def test_a_head_alone_is_a_baseline_and_leaves_no_expert(self, tmp_path):
        expert("majority_a", tmp_path / "head", "train=head")
        assert not (tmp_path / "head" / "expert").exists()
        assert (tmp_path / "head" / "predictions.jsonl").is_file()

    def test_an_expert_is_trained_further_with_its_head(self, runs, tmp_path):
        expert("majority_a", tmp_path / "more", f"expert={runs / 'majority_a' / 'expert'}", "training.max_steps=1")
        before, after = (load_expert(place).adapter.full_modules for place in (runs / "majority_a", tmp_path / "more"))
        moved = (after["classifier"]["out_proj.weight"] - before["classifier"]["out_proj.weight"]).abs().max()
        fresh, _ = validation(runs)
        start = fresh.model.classifier.out_proj.weight - before["classifier"]["out_proj.weight"]
        assert 0 <= moved < start.abs().max()


class TestMultiAdapter:
    def test_a_run_leaves_a_mixture_and_its_weights_over_time(self, runs):
        log = get_latest_log(runs / "multi")
        assert [row["tgs"]["global_step"] for row in log["weights"]] == list(range(6))
        assert set(log["weights"][0]["weights"]["layer_00"]) == {"majority_a", "majority_b", "base"}
        assert log["weights"][0]["weights"]["layer_00"]["base"] == pytest.approx(1 / 3)
        for row in log["weights"]:
            assert sum(row["weights"]["layer_07"].values()) == pytest.approx(1)
        assert "layer_08" not in log["weights"][0]["weights"]  # eight sub-layers, the embeddings' norm is none

    def test_experts_are_as_they_were(self, runs):
        backbone, _ = validation(runs)
        model = mixtures.open_model(str(runs / "multi"), backbone)
        for name, adapter in model.adapters().items():
            own = load_expert(runs / name).adapter
            for path, part in own.modules.items():
                for key, tensor in part.tensors().items():
                    assert torch.equal(adapter.modules[path].tensors()[key], tensor), (name, path, key)

    def test_a_mixture_that_is_loaded_predicts_what_the_run_did(self, runs):
        backbone, samples = validation(runs)
        model = mixtures.open_model(str(runs / "multi"), backbone)
        logits = predict(model, samples, lambda part: data.collate(part, pad_token_id=1), batch_size=8)
        lines = [json.loads(line) for line in (runs / "multi" / "predictions.jsonl").read_text().splitlines()]
        assert torch.equal(torch.tensor([line["logits"] for line in lines]), logits)

    def test_with_its_head_one_hot_weights_are_the_single_expert_bit_for_bit(self, runs, tmp_path):
        mix(runs, tmp_path / "taken", "mixing.modules_to_save=train:majority_a", "training.learning_rate=1e-30")
        backbone, samples = validation(runs)
        batch = data.collate(samples[:6], pad_token_id=1)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        alone = mixtures.open_model(str(runs / "majority_a"), backbone)
        wanted = alone(**inputs).logits
        alone.unload()
        model = mixtures.open_model(str(tmp_path / "taken"), backbone)
        with model.fixed_weights(majority_a=1.0):
            assert torch.equal(model(**inputs).logits, wanted)
        with model.fixed_weights(majority_b=1.0):
            assert not torch.equal(model(**inputs).logits, wanted)

    def test_experts_are_named_by_a_file_with_paths_relative_to_it(self, runs, tmp_path, monkeypatch):
        monkeypatch.setenv("MULTI_ROOT", str(runs))
        (tmp_path / "somewhere").symlink_to(runs / "majority_b")
        named = {"one": "${MULTI_ROOT}/majority_a", "two": "somewhere/expert"}
        (tmp_path / "names.json").write_text(json.dumps(named))
        mix(runs, tmp_path / "run", f"experts={tmp_path / 'names.json'}", "router.mode=flex")
        log = get_latest_log(tmp_path / "run")
        assert set(log["weights"][-1]["weights"]["layer_00"]) == {"one", "two"}

    def test_everything_that_is_wrong_with_the_names_is_said_at_once(self, runs, tmp_path, capsys):
        (tmp_path / "names.json").write_text('{"one": "nowhere", "two": "${NO_SUCH_VARIABLE}/x"}')
        words = [*ON, "dataset=majority_a", *FEW, "router=multi_adapter", f"run.folder={tmp_path / 'run'}"]
        assert main(["build-moe", *words, f"experts={tmp_path / 'names.json'}"]) == 2
        said = capsys.readouterr().err
        assert "one: " in said
        assert "nowhere" in said
        assert "no variable NO_SUCH_VARIABLE" in said
        assert not (tmp_path / "run").exists()

    def test_a_name_that_is_there_twice_is_refused(self, runs, tmp_path, capsys):
        (tmp_path / "names.json").write_text('{"one": "a", "one": "b"}')
        words = [*ON, "dataset=majority_a", *FEW, "router=multi_adapter", f"run.folder={tmp_path / 'run'}"]
        assert main(["build-moe", *words, f"experts={tmp_path / 'names.json'}"]) == 2
        assert "appears twice" in capsys.readouterr().err

    def test_a_pickle_among_the_experts_is_refused_with_the_way_to_convert_it(self, tmp_path, capsys):
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "model.p").write_bytes(b"\x80\x04.")
        (tmp_path / "names.json").write_text('{"rte": "old"}')
        words = [*ON, "dataset=majority_a", *FEW, "router=multi_adapter", f"run.folder={tmp_path / 'run'}"]
        assert main(["build-moe", *words, f"experts={tmp_path / 'names.json'}"]) == 2
        assert "pickle_to_safetensors.py" in capsys.readouterr().err

    def test_the_bound_is_told_and_too_few_steps_are_warned_of(self, runs, tmp_path, caplog, capsys):
        mix(runs, tmp_path / "short")
        assert "a weight can reach about 0.3" in capsys.readouterr().out
        assert "no branch can get half of the weight" in (tmp_path / "short" / "log.txt").read_text()

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["router.include_base=true", "router.mode=flex"], "contradicts router.mode=flex"),
            (["router.num_groups=-1"], "router.site=block"),
            (["router.num_groups=20"], "router.num_groups=20"),
            (["router.exclude=[majority_a,majority_b]"], "names every expert"),
            (["router.exclude=[law]"], "unknown expert 'law'"),
            (["router.lr=0"], "router.lr"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_settings_that_cannot_be_meant_are_refused(self, runs, tmp_path, capsys, words, said):
        fixed = [*ON, "dataset=majority_a", *FEW, f"library={runs / 'library'}", f"run.folder={tmp_path / 'run'}"]
        assert main(["build-moe", *fixed, "router=multi_adapter", *words]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_fusion_over_experts_with_norms_wants_to_be_asked_for(self, runs, tmp_path, capsys):
        fixed = [*ON, "dataset=majority_a", *FEW, *SHORT, f"library={runs / 'library'}"]
        steps = ["training.max_steps=3", "training.evaluate_every=null", "router=adapter_fusion"]
        assert main(["build-moe", *fixed, *steps, f"run.folder={tmp_path / 'refused'}"]) == 2
        assert "router.norms=base" in capsys.readouterr().err
        mole("build-moe", *fixed, *steps, "router.norms=base", f"run.folder={tmp_path / 'fusion'}")
        lines = [json.loads(line) for line in (tmp_path / "fusion" / "metrics.jsonl").read_text().splitlines()]
        assert any("loss/value_reg" in line for line in lines)


class TestEvaluate:
    def test_the_table_scores_experts_and_mixture_under_its_own_head(self, runs, tmp_path):
        words = [*ON, "dataset=majority_a", *FEW, f"model={runs / 'multi'}", f"run.folder={tmp_path / 'table'}"]
        mole("evaluate", *words)
        table = json.loads((tmp_path / "table" / "evaluation.json").read_text())
        assert table["metric"] == "accuracy"
        assert list(table["rows"]) == ["majority_a", "majority_b", "uniform", "oracle", "mixture"]
        lines = (tmp_path / "table" / "predictions.jsonl").read_text().splitlines()
        right = sum(json.loads(line)["prediction"] == json.loads(line)["label"] for line in lines)
        assert right / len(lines) == pytest.approx(table["rows"]["mixture"]["majority_a"])

    def test_a_metric_that_the_data_has_not_is_refused(self, runs, tmp_path, capsys):
        words = [*ON, "dataset=majority_a", *FEW, f"model={runs / 'multi'}", f"run.folder={tmp_path / 'table'}"]
        assert main(["evaluate", *words, "metric=exact_match"]) == 2
        assert "loss or score" in capsys.readouterr().err

    def test_a_head_of_other_labels_is_refused_though_it_has_as_many(self, runs, tmp_path, capsys):
        (tmp_path / "other.jsonl").write_text('{"text": "w10", "label": "x"}\n{"text": "w20", "label": "y"}\n' * 5)
        words = [*ON, "dataset=classification", f"dataset.path={tmp_path / 'other.jsonl'}"]
        for model in ("multi", "majority_a", "library"):
            place = [f"model={runs / model}", f"run.folder={tmp_path / 'table'}"]
            assert main(["evaluate", *words, *place]) == 2
            assert "labels and their order have to be the same" in capsys.readouterr().err

    def test_the_random_encoder_writes_no_text(self, tmp_path, capsys):
        words = ["train-expert", *ON, "dataset=reverse", f"run.folder={tmp_path / 'run'}"]
        assert main(words) == 2
        assert "majority_a" in capsys.readouterr().err


@pytest.mark.parametrize("router", ["xlora", "top_k", "arrow", "uniform"])
def test_lora_experts_of_an_encoder_are_mixed_under_any_router(tmp_path, router):
    for task in ("majority_a", "majority_b"):
        words = [*ON, f"dataset={task}", *FEW, *SHORT, "training.max_steps=2", "training.evaluate_every=null"]
        place = [f"name={task}", f"library={tmp_path / 'library'}", f"run.folder={tmp_path / task}"]
        mole("train-expert", *words, "adapter=lora", *place)
    words = [*ON, "dataset=majority_a", *FEW, *SHORT, "training.max_steps=2", "training.evaluate_every=null"]
    mole("build-moe", *words, f"router={router}", f"library={tmp_path / 'library'}", f"run.folder={tmp_path / 'run'}")
    assert facts(tmp_path / "run")["result"]["steps"] == 2  # its head at least is trained


@pytest.mark.parametrize("backbone", [ON, ["backbone=tiny"], ["backbone=tiny", "backbone.head=linear"]], ids=" ".join)
def test_a_head_stays_float32_on_a_backbone_in_bfloat16(tmp_path, backbone):
    words = [*backbone, "backbone.dtype=bfloat16", "dataset=majority_a", *FEW, *SHORT, "training.max_steps=2"]
    mole("train-expert", *words, "adapter=houlsby", "adapter.size=4", f"run.folder={tmp_path / 'run'}")
    adapter = load_expert(tmp_path / "run").adapter
    assert {tensor.dtype for part in adapter.full_modules.values() for tensor in part.values()} == {torch.float32}


def test_a_library_of_experts_with_heads_is_compared_each_under_its_own(runs, tmp_path):
    tasks = ["majority_a", "majority_b"]
    few = [f"datasets.{task}.{setting.removeprefix('dataset.')}" for task in tasks for setting in FEW]
    words = [*ON, f"dataset=[{','.join(tasks)}]", *few, f"model={runs / 'library'}"]
    mole("evaluate", *words, f"run.folder={tmp_path / 'matrix'}")
    rows = json.loads((tmp_path / "matrix" / "evaluation.json").read_text())["rows"]
    assert list(rows) == [*tasks, "uniform", "oracle"]
    backbone, _ = validation(runs)
    config = MajorityAConfig(examples=96, validation_examples=20, test_examples=12)
    samples = data.load(config, backbone.tokenizer, seed=0).test
    alone = mixtures.open_model(str(runs / "majority_a"), backbone)
    logits = predict(alone, samples, lambda part: data.collate(part, pad_token_id=1), batch_size=8)
    wanted = scores("accuracy", HEAD, logits, [sample.target for sample in samples])["score"]
    assert rows["majority_a"]["majority_a"] == rows["oracle"]["majority_a"] == pytest.approx(wanted)
