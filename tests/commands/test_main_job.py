"""train-expert → library → build-moe, xlora-train → evaluate → generate, in process: what each leaves."""

import json
import math

import pytest
import torch
from walk import SHORT, SMALL, data, files, mole, train

from mole import adapters, backbones
from mole.backbones.tiny_backbone import TinyConfig
from mole.cli.main import main
from mole.experts import ExpertLibrary, load_expert
from mole.mixtures import load_mixture, open_model
from mole.routing.log import load_routing_log

EXPERT = {"expert/README.md", "expert/expert.json", "expert/adapter_config.json", "expert/adapter_model.safetensors"}
RUN = {"config.yaml", "run.json", "log.txt"}


@pytest.fixture
def backbone():
    return backbones.load(TinyConfig(device="cpu"))


def checkpoints(found: set[str]) -> set[str]:
    return {name for name in found if name.startswith("checkpoints/")}


# ---- train-expert
def test_train_expert_leaves_a_run_with_an_expert(walk):
    found = {name for name in files(walk / "reverse") if name != "plots/loss.png"}
    assert found - checkpoints(found) == {*RUN, *EXPERT, "metrics.jsonl", "samples.jsonl"}
    facts = json.loads((walk / "reverse" / "run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["result"]["steps"] == 4
    assert facts["seed"] == 0


def test_the_expert_in_the_library_is_the_run_s_own(walk):
    library = ExpertLibrary.open(str(walk / "library"))
    assert library.names() == ["reverse", "shouting"]
    card = library.card("reverse")
    assert card.tasks == ("reverse",)
    assert card.backbone.name == "mole/tiny"
    assert card.content == load_expert(walk / "reverse").card.content
    assert card.data[0]["examples"] == 24


def test_every_lora_b_has_learnt(walk):
    adapter = load_expert(walk / "reverse").adapter
    assert all(part.B.abs().sum() > 0 for part in adapter.modules.values())


def test_a_taken_name_is_found_before_training(walk, capsys, tmp_path):
    before = files(walk / "library")
    words = [*SMALL, *SHORT, *data("reverse"), "name=reverse", f"library={walk / 'library'}"]
    assert main(["train-expert", *words, f"run.folder={tmp_path / 'run'}"]) == 2
    assert "expert 'reverse' is taken" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert files(walk / "library") == before


def test_an_expert_is_continued_from_its_weights(walk, tmp_path):
    word = f"expert={walk / 'library' / 'reverse'}"
    mole("train-expert", *SMALL, *SHORT, *data("reverse"), word, "name=more", f"run.folder={tmp_path / 'run'}")
    start, end = load_expert(walk / "reverse"), load_expert(tmp_path / "run")
    assert end.card.derived_from[0]["relation"] == "continued"
    assert end.card.derived_from[0]["content"] == start.card.content
    path = next(iter(start.adapter.modules))
    moved = (end.adapter.modules[path].A - start.adapter.modules[path].A).abs().max()
    assert 0 < moved < 0.5 * start.adapter.modules[path].A.abs().max()


def test_the_same_command_twice_gives_the_same_bytes(walk, tmp_path):
    train("reverse", tmp_path / "library", tmp_path / "again")
    weights = "expert/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (walk / "reverse" / weights).read_bytes()


def test_several_datasets_make_one_expert(tmp_path):
    mole("train-expert", *SMALL, *SHORT, *data("reverse", "shouting"), "name=both", f"run.folder={tmp_path / 'run'}")
    assert set(load_expert(tmp_path / "run").card.tasks) == {"reverse", "shouting"}


def test_the_run_can_be_run_again_from_its_folder(walk, tmp_path):
    mole("train-expert", "--from", str(walk / "reverse"), "library=null", f"run.folder={tmp_path / 'again'}")
    weights = "expert/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (walk / "reverse" / weights).read_bytes()


# ---- build-moe, xlora-train
def test_xlora_train_leaves_a_mixture_and_its_log(walk):
    found = files(walk / "mixture")
    mixture = {f"mixture/expert-00{i}.{end}" for i in range(2) for end in ("json", "safetensors")}
    mixture |= {"mixture/mixture.json", "mixture/router.safetensors", "mixture/expert.json", "mixture/README.md"}
    scalings = {name for name in found if name.startswith("scalings/")}
    plots = {name for name in found if name.startswith("plots/")}
    assert found - checkpoints(found) - scalings - plots == {*RUN, *mixture, "metrics.jsonl", "samples.jsonl"}
    assert "scalings/index.json" in scalings


def test_the_log_holds_training_and_the_finished_mixture(walk, backbone):
    log = load_routing_log(walk / "mixture" / "scalings")
    model = load_mixture(walk / "mixture" / "mixture", backbone)
    assert log.expert_names == ("reverse", "shouting")
    assert log.layer_names == model.sites
    assert [entry.phase for entry in log.entries] == ["train", "train", "eval", "eval"]
    assert {name for entry in log.entries[2:] for name in entry.task_names} == {"reverse", "shouting"}
    for entry in log.entries:
        assert abs(entry.weights.sum(-1) - 1).max() < 1e-5
    last = log.entries[-1]
    ids, mask = torch.tensor(last.tokens).clamp_min(0), torch.tensor(last.mask).long()
    with torch.no_grad():
        hidden = backbone.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    want = model.router.scalings(hidden)[..., 0, :].detach()
    assert (torch.tensor(last.weights[:, :, 0]) - want)[mask.bool()].abs().max() < 1e-4


def test_the_router_is_trained_and_the_experts_are_not(walk):
    from safetensors.torch import load_file

    kept = load_file(walk / "mixture" / "mixture" / "expert-000.safetensors")
    source = load_file(walk / "reverse" / "expert" / "adapter_model.safetensors")
    assert kept.keys() == source.keys()
    assert all(torch.equal(kept[name], source[name]) for name in kept)
    log = [json.loads(line) for line in (walk / "mixture" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in row for row in log)


@pytest.mark.parametrize("router", ["uniform", "task"])
def test_build_moe_needs_no_training_for_routers_that_learn_nothing(walk, tmp_path, backbone, router):
    mole("build-moe", *SMALL, f"library={walk / 'library'}", f"router={router}", f"run.folder={tmp_path / 'run'}")
    assert {name for name in files(tmp_path / "run") if not name.startswith("mixture/")} == RUN
    assert open_model(str(tmp_path / "run"), backbone).router_config.name == router


def test_build_moe_trains_a_router_per_layer(walk, tmp_path, backbone):
    words = [*SMALL, *SHORT, *data("reverse", "shouting"), f"library={walk / 'library'}", "router=top_k"]
    mole("build-moe", *words, "experts=[shouting,reverse]", f"run.folder={tmp_path / 'run'}")
    model = open_model(str(tmp_path / "run"), backbone)
    assert model.expert_names == ("shouting", "reverse")
    assert len(model.routers()) == len(model.sites)


def test_a_router_that_learns_needs_data(walk, capsys):
    assert main(["build-moe", *SMALL, f"library={walk / 'library'}", "router=top_k"]) == 2
    assert "dataset: not chosen" in capsys.readouterr().err


def test_kept_hidden_states_give_the_same_router(walk, tmp_path):
    from safetensors.torch import load_file

    words = [*SMALL, *SHORT, *data("reverse", "shouting"), f"library={walk / 'library'}", "router.dropout=0.0"]
    words += ["router.depth=2", "router.size=16", "log_examples=0", "log_every=null", "training.max_steps=16"]
    mole("xlora-train", *words, f"run.folder={tmp_path / 'each'}")
    mole("xlora-train", *words, "keep_hidden_states=float32", f"run.folder={tmp_path / 'kept'}")
    each, kept = (load_file(tmp_path / name / "mixture" / "router.safetensors") for name in ("each", "kept"))
    assert all((kept[name] - each[name]).abs().max() < 1e-4 for name in each)
    assert files(tmp_path / "kept") == files(tmp_path / "each")


@pytest.mark.parametrize(
    ("words", "says"),
    [(["router=top_k"], "router=top_k has no routing pass"), (["router.scaling_pass_value=0.5"], "without experts")],
)
def test_hidden_states_that_are_no_constants_are_not_kept(walk, tmp_path, capsys, words, says):
    command = "build-moe" if words[0].startswith("router=") else "xlora-train"
    given = [*SMALL, *SHORT, *data("reverse"), f"library={walk / 'library'}", *words, "keep_hidden_states=float32"]
    assert main([command, *given, f"run.folder={tmp_path / 'run'}"]) == 2
    assert says in capsys.readouterr().err


# ---- evaluate
def test_evaluate_compares_every_row(walk, tmp_path, capsys):
    words = [*SMALL, *data("reverse", "shouting"), f"model={walk / 'mixture'}"]
    mole("evaluate", *words, f"run.folder={tmp_path / 'run'}")
    assert files(tmp_path / "run") == {*RUN, "evaluation.json", "table.md", "table.csv"}
    table = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert table["metric"] == "loss"
    assert list(table["rows"]) == ["base", "reverse", "shouting", "uniform", "oracle", "mixture"]
    rows = table["rows"]
    assert all(set(row) == {"reverse", "shouting"} for row in rows.values())
    assert rows["oracle"]["reverse"] == pytest.approx(rows["reverse"]["reverse"], rel=1e-6)
    assert rows["reverse"]["reverse"] < rows["base"]["reverse"]
    assert "mixture" in capsys.readouterr().out
    routing = table["routing"]
    assert 0 < routing["router/entropy"] <= math.log(2) + 1e-6
    for task in ("reverse", "shouting"):
        assert sum(routing[f"router/{task}/load"].values()) == pytest.approx(1.0)


def test_the_row_of_an_expert_is_what_its_adapter_alone_gives(walk, tmp_path, backbone):
    words = [*SMALL, *data("reverse"), "rows=[experts]"]
    mole("evaluate", *words, f"model={walk / 'mixture'}", f"run.folder={tmp_path / 'run'}")
    row = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]["shouting"]
    from functools import partial

    from mole import data as sources
    from mole.evaluation import mean_loss
    from mole.registry import DATASETS

    config = DATASETS["reverse"].config(examples=24, validation_examples=4, test_examples=4)
    splits = sources.load(config, backbone.tokenizer, seed=0, context_length=backbone.context_length)
    adapters.attach_weights(backbone.model, load_expert(walk / "shouting").adapter)
    collate = partial(sources.collate, pad_token_id=backbone.tokenizer.pad_token_id)
    alone = mean_loss(backbone.model, splits.test, collate, batch_size=4)["reverse"].loss
    assert row["reverse"] == pytest.approx(alone, rel=1e-5)


def test_evaluation_is_the_same_in_any_batch_size(walk, tmp_path):
    found = []
    for size in (1, 3, 64):
        words = [*SMALL, *data("reverse"), f"model={walk / 'mixture'}", f"batch_size={size}"]
        mole("evaluate", *words, f"run.folder={tmp_path / str(size)}")
        found.append(json.loads((tmp_path / str(size) / "evaluation.json").read_text())["rows"]["mixture"]["reverse"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_evaluate_by_exact_match_generates(walk, tmp_path):
    words = [*SMALL, *data("shouting"), f"model={walk / 'library'}", "metric=exact_match", "rows=[base,uniform]"]
    mole("evaluate", *words, f"run.folder={tmp_path / 'run'}")
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    assert list(rows) == ["base", "uniform"]
    assert all(0 <= row["shouting"] <= 1 for row in rows.values())


def test_evaluate_takes_a_single_expert(walk, tmp_path):
    mole("evaluate", *SMALL, *data("reverse"), f"model={walk / 'reverse'}", f"run.folder={tmp_path / 'run'}")
    assert list(json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]) == ["base", "reverse"]


# ---- generate
def test_generate_writes_text_and_the_routing_of_every_token(walk, tmp_path, capsys):
    words = [
        *SMALL,
        f"model={walk / 'mixture'}",
        *data("reverse", "shouting"),
        "limit=2",
        "max_new_tokens=6",
        "log=true",
    ]
    mole("generate", *words, f"run.folder={tmp_path / 'run'}")
    rows = [json.loads(line) for line in (tmp_path / "run" / "generations.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["reverse", "reverse", "shouting", "shouting"]
    assert all(row["prompt"] in capsys.readouterr().out for row in rows[:1])
    log = load_routing_log(tmp_path / "run" / "scalings")
    assert log.entries[0].phase == "prefill"
    assert {entry.phase for entry in log.entries[1:]} <= {"decode"}
    assert all(entry.weights.shape[1] == 1 for entry in log.entries[1:])


def test_generate_equals_the_model_s_own_generate(walk, tmp_path, backbone):
    words = [*SMALL, f"model={walk / 'mixture'}", "prompt=Shout now", "max_new_tokens=5"]
    mole("generate", *words, f"run.folder={tmp_path / 'run'}")
    row = json.loads((tmp_path / "run" / "generations.jsonl").read_text())
    mole("generate", *words, "self_speculation=true", f"run.folder={tmp_path / 'drafted'}")
    assert json.loads((tmp_path / "drafted" / "generations.jsonl").read_text()) == row
    model = open_model(str(walk / "mixture"), backbone)
    ids = backbone.tokenizer("Shout now", return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
    assert row["completion"] == backbone.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give exactly one"),
        (["prompt=a", "prompts=b.txt"], "give exactly one"),
        (["prompts=no.txt"], "there is no such file"),
        (["prompt=a", "temperature=0.5"], "set do_sample=true"),
        (["prompt=a", "self_speculation=true", "num_beams=2"], "set num_beams=1"),
        (["prompt=a", "max_new_tokens=100000"], "context"),
    ],
)
def test_generate_says_what_it_cannot_do(walk, tmp_path, capsys, words, says):
    assert main(["generate", *SMALL, f"model={walk / 'mixture'}", *words, f"run.folder={tmp_path / 'run'}"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- bad input: found before anything starts, exit 2, nothing left
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["training.learning_rat=1"], "did you mean training.learning_rate"),
        (["adapter=lorra"], "did you mean adapter=lora"),
        (["training.max_steps=many"], "training.max_steps: must be"),
        (["dataset=jsonl", "dataset.path=no.jsonl"], "no.jsonl"),
        (["dataset=jsonl", "dataset.path=empty.jsonl"], "empty"),
        (["dataset=jsonl", "dataset.path=broken.jsonl"], "broken.jsonl:2"),
        (["dataset=jsonl", "dataset.path=silent.jsonl"], "no supervised token"),
        (["adapter.targets=[q_prj]"], "did you mean q_proj"),
        (["backbone.device=cuda:9"], "no such device"),
        (["backbone=pretrained", "backbone.path=no/such/folder"], "no/such/folder"),
        (["library=./a-file.txt"], "is a file"),
        (["library=a-file.txt/inside"], "cannot be written"),
        (["run.folder=a-file.txt/run"], "cannot be written"),
        (["name=Not A Name"], "how about 'not-a-name'"),
        (["expert=no/such"], "no library there"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_said_before_anything_starts(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    (tmp_path / "silent.jsonl").write_text('{"prompt": "a", "completion": ""}\n' * 4)
    (tmp_path / "a-file.txt").write_text("a file")
    before = files(tmp_path)
    dataset = [] if any(word.startswith("dataset=") for word in words) else data("reverse")
    folder = [] if any(word.startswith("run.folder=") for word in words) else ["run.folder=run"]
    backbone = ["backbone.device=cpu"] if not any("device" in word for word in words) else []
    assert main(["train-expert", *backbone, *SHORT, *dataset, *folder, *words]) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert "Traceback" not in shown
    assert len(shown.splitlines()) < 24
    assert files(tmp_path) == before


def test_damaged_weights_in_a_library_are_named(walk, tmp_path, capsys):
    import shutil

    shutil.copytree(walk / "library", tmp_path / "library")
    weights = tmp_path / "library" / "reverse" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7] + b"damaged")
    words = [*SMALL, f"library={tmp_path / 'library'}", "router=uniform", f"run.folder={tmp_path / 'run'}"]
    assert main(["build-moe", *words]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["library", "verify", str(tmp_path / "library")]) == 1


def test_an_expert_of_another_backbone_is_refused_showing_both(walk, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    other = tmp_path / "other"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(other)
    backbones.load(TinyConfig(device="cpu")).tokenizer.save_pretrained(other)
    words = ["backbone=pretrained", f"backbone.path={other}", "backbone.device=cpu", f"library={walk / 'library'}"]
    assert main(["build-moe", *words, "router=uniform", f"run.folder={tmp_path / 'run'}"]) == 2
    shown = capsys.readouterr().err
    assert "'mole/tiny'" in shown
    assert "'other'" in shown
    assert not (tmp_path / "run").exists()


def test_a_missing_library_is_named(tmp_path, capsys):
    words = [*SMALL, f"library={tmp_path / 'nowhere'}", "router=uniform", f"run.folder={tmp_path / 'run'}"]
    assert main(["build-moe", *words]) == 2
    assert "no library there" in capsys.readouterr().err


# ---- two processes
@pytest.mark.slow
def test_two_processes_train_the_same_router(walk, tmp_path):
    words = [
        *SMALL,
        *SHORT,
        *data("reverse", "shouting"),
        f"library={walk / 'library'}",
        "router.depth=2",
        "router.size=16",
    ]
    words += ["router.dropout=0.0", "log_examples=0", "log_every=null"]
    mole("xlora-train", *words, f"run.folder={tmp_path / 'one'}")
    mole("xlora-train", *words, "launcher.num_processes=2", f"run.folder={tmp_path / 'two'}")
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "mixture" / "router.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < 1e-4, name
