"""`mole moefy` end to end in process, and the pictures of what it leaves: the files, the facts, what is refused."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from walk import SHORT, SMALL, data, files, mole

from mole import backbones, moe
from mole.backbones import TinyConfig
from mole.cli.main import main
from mole.moe.surgery import blocks_of
from mole.routing.log_files import load_routing_log

MLPS = r"moe.pattern=model\.layers\.\d+\.mlp"
FOLDER = {"mixture/config.json", "mixture/model.safetensors", "mixture/moe.json"}
RUN = {"config.yaml", "run.json", "log.txt", "metrics.jsonl", "samples.jsonl"}


def tiny():
    return backbones.load(TinyConfig(device="cpu")).model


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("moefy") / "run"
    words = ("log_every=2", "log_examples=2", "statistics_every=1", "moe.num_experts=3", f"run.folder={run}")
    mole("moefy", *SMALL, *SHORT, *data("reverse", "shouting"), MLPS, *words)
    return run


def test_a_run_leaves_the_blocks_the_log_and_pictures(trained):
    left = files(trained)
    checkpoints = {name for name in left if name.startswith("checkpoints/")}
    scalings = {name for name in left if name.startswith("scalings/")}
    plots = {f"plots/{name}.png" for name in ("layers", "loss", "tasks", "tokens")}
    assert left - checkpoints - scalings == {*RUN, *FOLDER, *plots}
    assert "scalings/index.json" in scalings
    facts = json.loads((trained / "run.json").read_text())
    dense = tiny()
    count = dense.config.num_hidden_layers
    mlp = sum(p.numel() for p in dense.model.layers[0].mlp.parameters())
    router = 3 * dense.config.hidden_size
    assert facts["surgery"]["blocks"] == [f"model.layers.{i}.mlp" for i in range(count)]
    assert facts["surgery"]["parameters"] == {
        "before": count * mlp,
        "after": count * (3 * mlp + router),
        "active": count * (mlp + router),
    }
    assert facts["status"] == "finished"
    assert facts["dense_loss"]["validation_loss"] > 0


def test_only_the_blocks_have_learnt_and_the_folder_gives_them_back(trained):
    dense, model = tiny(), moe.load(tiny(), trained / "mixture")
    state = model.state_dict()
    for name, tensor in dense.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(state[name], tensor)
    for name, block in blocks_of(model).items():
        before = dense.get_submodule(name).state_dict()
        for expert in block.experts:
            assert not any(torch.equal(tensor, before[key]) for key, tensor in expert.state_dict().items())


def test_the_log_has_the_routing_of_every_block_and_the_metrics_the_losses_by_name(trained):
    log = load_routing_log(trained / "scalings")
    dense = tiny()
    assert log.layer_names == tuple(f"model.layers.{i}.mlp" for i in range(dense.config.num_hidden_layers))
    assert log.expert_names == ("0", "1", "2")
    assert [entry.phase for entry in log.entries].count("train") == 2
    for entry in log.entries:
        assert np.allclose(entry.weights[entry.mask].sum(-1), 1)
        assert ((entry.weights[entry.mask] > 0).sum(-1) == 1).all()
        assert set(entry.task_names) <= {"reverse", "shouting"}
    steps = [row for row in metrics(trained) if row["phase"] == "train"]
    assert all({"loss/balance_entropy", "auxiliary_loss", "router/load"} <= set(row) for row in steps)
    assert steps[-1]["auxiliary_loss"] == pytest.approx(0.01 * steps[-1]["loss/balance_entropy"], rel=1e-4)


def test_without_training_the_surgery_alone_is_done_and_needs_no_data(tmp_path):
    run = tmp_path / "run"
    mole("moefy", *SMALL, MLPS, "train=none", "moe.init_noise=0.0", f"run.folder={run}")
    assert files(run) == {*(RUN - {"metrics.jsonl", "samples.jsonl"}), *FOLDER}
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = tiny()(ids).logits
        found = moe.load(tiny(), run / "mixture")(ids).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert json.loads((run / "run.json").read_text())["surgery"]["equals_dense"] is True


def test_a_run_is_evaluated_beside_its_backbone(trained, tmp_path):
    run = tmp_path / "evaluated"
    mole("evaluate", *SMALL, f"model={trained}", *data("reverse"), "split=validation", f"run.folder={run}")
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    facts = json.loads((trained / "run.json").read_text())
    assert list(rows) == ["base", "mixture"]
    assert rows["base"]["reverse"] == pytest.approx(facts["dense_loss"]["validation_loss/reverse"], rel=1e-4)
    assert rows["mixture"]["reverse"] != rows["base"]["reverse"]
    words = (f"model={trained}/mixture", *data("reverse"), "metric=exact_match", "limit=2", "rows=[mixture]")
    mole("evaluate", *SMALL, *words, f"run.folder={tmp_path / 'matched'}")


def test_a_run_generates_and_logs_who_worked_on_every_token(trained, tmp_path):
    run = tmp_path / "generated"
    words = ("prompt=ab", "max_new_tokens=3", "log=true", f"run.folder={run}")
    mole("generate", *SMALL, f"model={trained}", *words)
    assert json.loads((run / "generations.jsonl").read_text())["prompt"] == "ab"
    log = load_routing_log(run / "scalings")
    assert log.expert_names == ("0", "1", "2")
    assert [entry.phase for entry in log.entries] == ["prefill", *["decode"] * (len(log.entries) - 1)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["library", "convert", "{run}", "lib"], "mole.moe.load"),
        (["generate", *SMALL, "model={run}", "prompt=ab", "self_speculation=true"], "self_speculation"),
        (["generate", *SMALL, "model={run}", "prompt=ab", "num_beams=2", "log=true"], "num_beams=1"),
        (["evaluate", *SMALL, "model={run}", *data("reverse"), "publish_scores=true"], "no experts"),
        (["evaluate", *SMALL, "model={run}", *data("reverse"), "rows=[oracle]"], "base, mixture"),
    ],
)
def test_what_blocks_cannot_do_is_said(trained, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main([word.format(run=trained) for word in words]) == 2
    assert said in capsys.readouterr().err


def test_the_bias_moves_once_for_each_step_under_accumulation(tmp_path):
    run = tmp_path / "run"
    words = ("moe=deepseek", "moe.num_experts=4", "training.micro_batch_size=1", f"run.folder={run}")
    mole("moefy", *SMALL, *SHORT, *data("reverse"), MLPS, *words)
    rate = 1e-3
    for block in blocks_of(moe.load(tiny(), run / "mixture")).values():
        bias = block.router.bias
        assert bias.any()
        assert float((bias.max() - bias.min()) / rate) <= 2 * 4 + 1e-3
        assert abs(float(bias.sum())) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("train", ["router", "experts"])
def test_what_is_not_trained_stays(tmp_path, train):
    run = tmp_path / "run"
    words = (f"train={train}", "moe.num_experts=2", "moe.k=2", "moe.init_noise=0.1", f"run.folder={run}")
    mole("moefy", *SMALL, *SHORT, *data("reverse"), MLPS, *words)
    fresh = tmp_path / "fresh"
    mole("moefy", *SMALL, MLPS, "train=none", *words[1:-1], f"run.folder={fresh}")
    after, before = (moe.load(tiny(), folder / "mixture").state_dict() for folder in (run, fresh))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all((".router." in name) == (train == "router") for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["switch", "mixtral"])
def test_every_preset_trains_with_gradient_checkpointing(tmp_path, preset):
    run = tmp_path / "run"
    words = (f"moe={preset}", "moe.num_experts=2", "training.gradient_checkpointing=true", f"run.folder={run}")
    mole("moefy", *SMALL, *SHORT, *data("reverse", "shouting"), MLPS, *words)
    assert files(run) >= FOLDER


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*SMALL, *data("reverse"), MLPS, "moe.num_experts=3", "moe.k=2", "moe.router.bias_rate=1e-3"]
    words += ["training.batch_size=4", "training.evaluate_every=null", "training.max_steps=4", "schedule=constant"]
    mole("moefy", *words, "training.checkpoint_every=2", "training.best_metric=null", f"run.folder={whole}")
    wanted = moe.load(tiny(), whole / "mixture").state_dict()
    shutil.copytree(whole, parts)
    for left in ("mixture", "scalings", "plots", "checkpoints/step-4"):
        shutil.rmtree(parts / left)
    facts = json.loads((parts / "run.json").read_text())
    (parts / "run.json").write_text(json.dumps({**facts, "status": "stopped"}))
    assert (parts / "checkpoints" / "step-2" / "complete").is_file()
    assert main(["moefy", "--resume", str(parts)]) == 0
    found = moe.load(tiny(), parts / "mixture").state_dict()
    assert any(tensor.any() for name, tensor in found.items() if name.endswith("router.bias"))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "moe.pattern"),
        ((r"moe.pattern=model\.layer\.0\.mlp",), "matches no module"),
        ((MLPS, "moe.k=9"), "k=9: valid are 1 … 4"),
        ((MLPS, "moe.router.name=soft"), "soft"),
        (("moe.pattern='*mlp'",), "is no regular expression"),
        ((MLPS, "training.max_steps=0"), "train=none"),
        ((MLPS, "moe=switche"), "moe=switche: no such option; did you mean moe=switch?"),
        ((MLPS,), "dataset: not chosen"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(tmp_path, capsys, words, told):
    given = ["dataset=reverse"] if words != (MLPS,) else []
    assert main(["moefy", *SMALL, *given, *words, f"run.folder={tmp_path / 'run'}"]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- pictures
def test_experts_load_draws_every_layer_and_leaves_the_counts(trained, tmp_path, capsys):
    mole("plot", "experts-load", str(trained), f"to={tmp_path / 'out'}")
    layers = tiny().config.num_hidden_layers
    pictures = {"experts-load.png", *(f"experts-load-{index}.png" for index in range(layers))}
    assert files(tmp_path / "out") == {*pictures, "experts-load.json", "experts-load.csv"}
    assert len(capsys.readouterr().out.split()) == len(pictures) + 2
    log = load_routing_log(trained / "scalings")
    counts = sum((entry.weights * entry.mask[..., None, None] > 0).sum(0) for entry in shown(log))
    told = json.loads((tmp_path / "out" / "experts-load.json").read_text())
    assert told["tokens"] == sum(int(entry.mask.sum()) for entry in shown(log))
    for index, row in enumerate(told["layers"]):
        assert row["layer"] == log.layer_names[index]
        assert list(row["loads"].values()) == counts[:, index].sum(0).tolist()
        assert sum(row["loads"].values()) == told["tokens"]
    with (tmp_path / "out" / "experts-load.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(float(row["load"]) for row in rows) == layers * told["tokens"]


def shown(log):
    """The evaluation in a log, cut to one length."""
    entries = [entry for entry in log.entries if entry.phase == "eval"]
    length = max(entry.mask.shape[1] for entry in entries)
    for entry in entries:
        assert entry.mask.shape[1] <= length
        yield type(entry)(
            weights=np.pad(entry.weights, ((0, 0), (0, length - entry.mask.shape[1]), (0, 0), (0, 0))),
            mask=np.pad(entry.mask, ((0, 0), (0, length - entry.mask.shape[1]))),
            phases=entry.phases,
        )


def test_one_layer_as_a_drawing_of_lines(trained, tmp_path):
    mole("plot", "experts-load", str(trained), "layer=1", "format=svg", f"to={tmp_path / 'out'}")
    names = {"experts-load.svg", "experts-load-1.svg", "experts-load.json", "experts-load.csv"}
    assert files(tmp_path / "out") == names
    assert len(json.loads((tmp_path / "out" / "experts-load.json").read_text())["layers"]) == 1
    assert main(["plot", "experts-load", str(trained), "layer=99"]) == 2


def test_the_other_plots_are_where_they_were(trained, tmp_path):
    mole("plot", str(trained), "plots=[layers]", f"to={tmp_path / 'out'}")
    assert files(tmp_path / "out") == {"layers.png"}


@pytest.fixture
def vit(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(image_size=24, patch_size=8, **sizes)).eval()
    moe.moefy(model, r"vit\.layers\.\d+\.mlp", num_experts=3)
    return moe.save(model, tmp_path / "vit")


def test_an_image_goes_through_a_saved_model(vit, tmp_path):
    image = pytest.importorskip("PIL.Image")
    photo = tmp_path / "photo.png"
    image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)).save(photo)
    mole("plot", "image-routing", str(vit), str(photo), f"to={tmp_path / 'out'}")
    assert files(tmp_path / "out") == {"image-routing-0.png", "image-routing-1.png"}
    mole("plot", "image-routing", f"model={vit}", f"image={photo}", "patch_size=8", "format=pdf")
    assert {"plots/image-routing-0.pdf", "plots/image-routing-1.pdf"} <= files(vit)


@pytest.mark.parametrize(
    ("image", "words", "told"),
    [
        ("none.png", (), "there is no such file"),
        ("text.png", (), "not an image"),
        (None, ("patch_size=5",), "patches of 5"),
        (None, ("model=text", "patch_size=4"), "takes input_ids, not images"),
    ],
)
def test_what_cannot_be_drawn_is_said(vit, tmp_path, capsys, image, words, told):
    pil = pytest.importorskip("PIL.Image")
    (tmp_path / "text.png").write_text("no picture")
    pil.new("RGB", (24, 24)).save(tmp_path / "photo.png")
    photo = tmp_path / (image or "photo.png")
    if "model=text" in words:
        model = tiny()
        moe.moefy(model, MLPS.removeprefix("moe.pattern="), num_experts=2)
        vit, words = moe.save(model, tmp_path / "text", whole=True), words[1:]
    assert main(["plot", "image-routing", str(vit), str(photo), *words]) == 2
    assert told in capsys.readouterr().err
