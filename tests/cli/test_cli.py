"""The command line: what each way of calling it does, says, leaves behind, and returns."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_command
import yaml
from toy_command import CONF, main

from mole.cli import main as cli
from mole.cli import runs
from mole.cli.completion import SHELLS, complete
from mole.config import yaml_files
from mole.config.engine import engine

CREAM = "topping=cream"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MOLE_CONFIG_DIR", "MOLE_FULL_ERROR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def files() -> list[str]:
    return sorted(str(p) for p in Path(".").rglob("*") if p.is_file())


def only_run() -> Path:
    runs = list(Path("outputs/toy").iterdir())
    assert len(runs) == 1
    return runs[0]


def tab(line: str) -> list[str]:
    flags = [flag for action in cli.parser("")._actions for flag in action.option_strings]
    return complete(
        f"{line[: line.rindex(' ')]} --config-dir {CONF} {line[line.rindex(' ') + 1 :]}", toy_command.COMMANDS, flags
    )


# What is printed without running anything


def test_overview_lists_every_command_once(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert sum(line.strip().partition("  ")[0] == name for line in text.splitlines()) == 1
        assert command.phrase in text


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["trian-expert"], ["library"]])
def test_what_needs_no_command_imports_nothing_heavy(words):
    heavy = {"torch", "hydra", "omegaconf", "rich", "pydantic", "transformers", "numpy", "yaml"}
    code = (
        f"import sys; from mole.cli.main import main; main({words!r}); "
        f"print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "words", [["train-expert", "--help"], ["train-expert", "--cfg", "job"], ["train-expert", "x=1"]]
)
def test_help_and_composition_import_no_torch(words):
    code = (
        f"import sys; from mole.cli.main import main; main({words!r}); print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False"


def test_help_shows_the_groups_and_settings_of_what_is_chosen(capsys):
    assert main("toy", "--help") == 0
    text = capsys.readouterr().out
    assert "flavour     sweet     of sour, sweet" in text
    assert "topping     required  of cream, nuts_chopped" in text
    assert "flavour.sugar" in text
    assert "spoons, at least 0" in text
    assert "flavour.lemons" not in text
    assert "adapter" not in text
    assert main("toy", "flavour=sour", "--help", "--all") == 0
    text = capsys.readouterr().out
    assert "flavour.lemons" in text
    assert "flavour.sugar" not in text
    assert "hydra/launcher" in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_if_it_has_a_configuration(name, capsys):
    if not (Path(cli.__file__).parents[2] / "conf" / f"{name.replace(' ', '-')}.yaml").is_file():
        pytest.skip(f"conf/{name}.yaml is not written yet")
    assert cli.main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mole {name}")
    assert "settings" in text


def test_every_example_of_a_help_text_composes():
    from mole.config.overrides import fill_operands, rewrite

    for command in cli.COMMANDS.values():
        for example in command.examples:
            words = example.replace("'", "").split(" ")  # what a shell would leave, but for spaces in a value
            given = fill_operands([w for w in words[1 + len(command.name.split()) :] if "=" in w], (), command.name)
            with engine(command.config_name) as tree:
                tree.compose(rewrite(given, tree))


def test_cfg_prints_yaml_and_nothing_else(capsys):
    assert main("toy", "--cfg", "job", "--resolve", "run.folder=x", "flavour.sugar=5") == 0
    node = yaml.safe_load(capsys.readouterr().out)
    assert node["flavour"] == {"name": "sweet", "sugar": 5, "layers": "all", "extras": {}}
    assert node["run"]["folder"] == "x"
    assert files() == []


@pytest.mark.parametrize("what", [[], ["defaults"], ["searchpath"]])
def test_info_shows_the_views_of_the_engine(what, capsys):
    assert main("toy", "--info", *what, "flavour=sour") == 0
    assert "flavour" in capsys.readouterr().out or what == ["searchpath"]


def test_the_engine_has_what_is_called_of_it():
    with engine("config-ls") as found:
        for name in ("run", "multirun", "show_cfg", "show_info"):
            assert callable(getattr(found.hydra, name))
        for name in ("compute_defaults_list", "get_group_options", "load_configuration"):
            assert callable(getattr(found.hydra.config_loader, name))


def test_version_names_mole_and_its_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= {"mole", "python", "torch", "peft"}


# Mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tyo"], "unknown command 'tyo'; did you mean toy?"),
        (["toy", "--reusme", "x"], "did you mean --resume?"),
        (["toy"], "topping: not chosen; choose one: topping=cream, topping=nuts_chopped"),
        (["toy", CREAM, "trainig.learning_rate=1"], "did you mean training.learning_rate?"),
        (
            ["toy", CREAM, "flavour=sweat"],
            "flavour=sweat: no such option; did you mean flavour=sweet?   known: sour, sweet",
        ),
        (["toy", "topping=nuts_chopped"], "topping.path: required (where the nuts are); give it with topping.path=…"),
        (
            ["toy", "topping=[nuts_chopped]"],
            "toppings.nuts_chopped.path: required (where the nuts are); give it with toppings.nuts",
        ),
        (["toy", "topping=[nuts_chopped]", "toppings.nuts_chopped.paht=3"], "did you mean toppings.nuts_chopped.path?"),
        (["toy", "topping=[nuts_chopped]", "topping.path=3"], "say which: toppings.nuts_chopped.path=…"),
        (["toy", CREAM, "--resolve"], "--resolve says how --cfg prints"),
        (["toy", CREAM, "--package", "run"], "--package says how --cfg prints"),
        (["toy", CREAM, "hydra.run.dir=x"], "hydra.run.dir cannot act; give run.folder=…"),
        (["toy", "topping.path=x"], "topping is not chosen yet; add topping=nuts_chopped"),
        (["toy", CREAM, "seed=1,2"], "a comma makes a sweep: add -m, or quote the value twice: \"seed='1,2'\""),
        (["toy", CREAM, "seed=a"], 'seed: must be a whole number, got "a"'),
        (["toy", CREAM, "seed=1.5"], "seed: must be a whole number, got 1.5"),
        (["toy", CREAM, "name=3"], "name: must be text, got 3"),
        (["toy", CREAM, "flavour.layers=3"], "flavour.layers: must be a list or text, got 3"),
        (["toy", CREAM, "flavour=sour", "flavour.lemon=3"], "did you mean flavour.lemons?"),
        (["toy", CREAM, "flavour=sour", "flavour.sugar=3"], "known: flavour.name, flavour.lemons"),
        (["toy", "topping=nuts_chopped", "topping.paht=3"], "did you mean topping.path?"),
        (["toy", CREAM, "training={rate: 3}"], "Could not override 'training'"),
        (["toy", "toppings={nuts: 3}"], "it is filled by topping=[…]"),
        (["toy", CREAM, "flavour.extras={clove: much}"], 'flavour.extras.clove: must be a number, got "much"'),
        (["toy", CREAM, "spices=3"], "spices: must be a mapping of names to values, got 3"),
        (["toy", CREAM, "flavour=[sweet,sour]"], "this command takes one flavour"),
        (["toy", "topping=[cream,cream]"], "cream is named twice"),
        (["toy", CREAM, "flavour.sugar=1000"], "flavour.sugar is above 100 * training.max_steps"),
        (["toy", CREAM, "cake", "pie"], "takes name; what is 'pie'?"),
        (["toy", CREAM, "+seed=3"], "seed is there already"),
        (["toy", CREAM, "~flavor"], "there is no flavor to take away"),
        (["toy", CREAM, "+hub_token=abcdefgh"], "a secret has no place in a configuration"),
        (["toy", CREAM, "name=${oc.env:HUB_TOKEN}"], "reads $HUB_TOKEN"),
        (["toy", "topping=nuts_chopped", "topping.path='https://me:pw@host/x'"], "holds a user, password or signature"),
        (["toy", CREAM, "--from", "nowhere"], "nowhere is no run"),
        (["toy", CREAM, "--json"], "prints no listing"),
        (["toy", CREAM, "experiment=small", "name=early", "flavour.lemons=0"], "greater than or equal to 1"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(words, says, capsys):
    assert main(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("mole: ")
    assert says in said
    assert "Traceback" not in said
    assert len(said.splitlines()) < 12
    assert files() == []
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["spices={clove: 0.5}", "flavour.extras.nutmeg=1"],
        ["flavour=sweet", "spices.clove=0.5", "flavour.extras={nutmeg: 1}"],
    ],
)
def test_mappings_whose_names_the_user_chooses_take_new_ones_on_the_line(words):
    assert main("toy", CREAM, *words) == 0
    saved = yaml.safe_load((only_run() / "config.yaml").read_text())
    assert (saved["spices"], saved["flavour"]["extras"]) == ({"clove": 0.5}, {"nutmeg": 1.0})


def test_such_a_mapping_takes_new_names_in_a_sweep_and_from_a_saved_run():
    assert main("toy", CREAM, "flavour.extras={nutmeg: 1}", "name=first") == 0
    assert main("toy", "--from", str(only_run()), "flavour.extras.clove=2", "spices={}", "name=second") == 0
    second = next(run for run in Path("outputs/toy").iterdir() if "second" in run.name)
    assert yaml.safe_load((second / "config.yaml").read_text())["flavour"]["extras"] == {"nutmeg": 1.0, "clove": 2.0}
    assert main("toy", CREAM, "-m", "spices={clove: 1},{clove: 2}", "name=third") == 0


def test_all_problems_come_at_once(capsys):
    assert main("toy", "seed=a", "+flavour.sugr=3", "training.learning_rate=-1.0") == 2
    said = capsys.readouterr().err
    assert "toy: 4 problem(s) in the configuration" in said
    assert "flavour.sugr: unknown key; did you mean flavour.sugar? (known: name, sugar, layers, extras)" in said
    assert "training.learning_rate: must be greater than 0, got -1.0" in said


def test_error_of_a_file_of_the_user_says_file_and_line(capsys):
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/x.yaml").write_text("# @package _global_\n# Mine.\nflavour: {sugr: 3}\n")
    assert main("toy", CREAM, "experiment=x", "--config-dir", "mine") == 2
    said = capsys.readouterr().err
    assert "did you mean flavour.sugar?" in said
    assert "experiment/x.yaml:3" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["train-expert", "experiment=mhr"],
            "experiment=mhr: a preset for build-moe, xlora-train, not for train-expert",
        ),
        (["evaluate", "experiment=debug"], "experiment=debug: a preset for build-moe, moefy, train-expert"),
        (["train-expert", "experiment=mean"], "known: debug, transfer-mean, transfer-nearest\n"),
        (
            ["train-expert", "dataset=[reverse,cipher]", "datasets.reverse.exampls=3"],
            "did you mean datasets.reverse.exa",
        ),
        (["train-expert", "dataset=jsonl", "dataset.pth=x"], "did you mean dataset.path?"),
        (
            ["train-expert", "adapter=ia3", "adapter.rank=4"],
            "known: adapter.name, adapter.targets, adapter.feedforward",
        ),
        (["train-expert", "schedule=constant", "schedule.warmup=3"], "known: schedule.name"),
    ],
)
def test_hints_are_for_this_command_and_this_line(words, says, capsys):
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert says in said, said


def test_the_first_file_that_counts_is_blamed():
    """A preset stands over the file of a group, which gives the same key."""
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/x.yaml").write_text("# @package _global_\n# Mine.\nflavour:\n  sugar: -3\n")
    with engine("toy", ["mine", CONF]) as tree:
        for overrides, place in ((["experiment=x"], "experiment/x.yaml:4"), ([], "flavour/sweet.yaml:3")):
            assert tree.locate("flavour.sugar", overrides) == place
        assert tree.locate("flavour.sugar", ["experiment=x", "flavour.sugar=2"]) == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# @package _global_\na: [1\n", "experiment/x.yaml"),
        ("# @package _global_\ndefaults:\n  - override /flavour: sauer\n", "did you mean flavour=sour?"),
        ("# @package _global_\ndefaults:\n  - override /flavor: sour\n", "did you mean flavour?"),
        ("seed: 1\n", "its first line should be: # @package _global_"),
        ("# @package _global_\nname: ${nothing.here}\n", "name: Interpolation key 'nothing.here' not found"),
    ],
)
def test_a_preset_that_cannot_be_composed_is_explained(text, says, capsys):
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/x.yaml").write_text(text)
    assert main("toy", CREAM, "experiment=x", "--config-dir", "mine") == 2
    assert says in capsys.readouterr().err


def test_an_error_of_the_engine_itself_is_told_without_a_traceback(capsys):
    assert main("toy", CREAM, "hydra.verbose=1") == 1
    said = capsys.readouterr().err
    assert "MOLE_FULL_ERROR=1" in said
    assert "Traceback" not in said


def test_folders_of_the_user_come_in_order_line_environment_package(monkeypatch, capsys):
    for folder, sugar in (("line", 7), ("environment", 8)):
        Path(folder, "flavour").mkdir(parents=True)
        Path(folder, "flavour", "sweet.yaml").write_text(f"name: sweet\nsugar: {sugar}\nlayers: all\n")
    monkeypatch.setenv("MOLE_CONFIG_DIR", "environment")
    for words, sugar in ((["--config-dir", "line"], 7), ([], 2)):  # `main` adds the toy's folder last on the line
        assert main("toy", "--cfg", "job", *words) == 0
        assert yaml.safe_load(capsys.readouterr().out)["flavour"]["sugar"] == sugar
    monkeypatch.setenv("MOLE_CONFIG_DIR", f"environment{os.pathsep}{CONF}")
    assert cli.main(["toy", "--cfg", "job"], toy_command.COMMANDS) == 0
    assert yaml.safe_load(capsys.readouterr().out)["flavour"]["sugar"] == 8
    assert main("toy", "--config-dir", "nowhere") == 2
    assert "no such folder of configurations: nowhere" in capsys.readouterr().err


# Runs


def test_a_run_leaves_its_configuration_and_its_record():
    assert main("toy", CREAM, "training.learning_rate=1e-3") == 0
    run = only_run()
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "log.txt", "metrics.jsonl", "run.json"]
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["command"] == "toy"
    assert record["processes"] == 1
    assert record["choices"] == {"flavour": "sweet", "topping": "cream", "launcher": "auto"}
    assert record["objective"] == pytest.approx(3e-3)
    assert record["wall_seconds"] >= 0
    assert not Path(".hydra").exists()
    assert not Path("multirun.yaml").exists()


def test_the_saved_configuration_is_what_cfg_prints(capsys):
    assert main("toy", "topping=[cream]", "run.folder=r", "name='3'") == 0
    capsys.readouterr()
    assert main("toy", "topping=[cream]", "run.folder=r", "name='3'", "--cfg", "job", "--resolve") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    saved = yaml.safe_load(Path("r/config.yaml").read_text())
    assert saved.pop("run") == {**printed.pop("run"), "folder": str(Path("r").absolute())}
    assert saved == printed
    assert list(saved) == list(printed)


def test_a_list_of_options_fills_the_plural_key():
    assert main("toy", "topping=[cream,nuts/chopped]", "toppings.nuts_chopped.path=p", "run.folder=r") == 0
    node = yaml.safe_load(Path("r/config.yaml").read_text())
    assert node["toppings"] == {"cream": {"name": "cream"}, "nuts_chopped": {"name": "nuts_chopped", "path": "p"}}
    assert node.get("topping") is None


@pytest.mark.parametrize("value", ["s3://a/b?c=d#é", "a=b", "x & y!", "it's", "back\\slash\\", "50 % [of] {it}"])
def test_values_outside_the_grammar_pass_as_they_are(value):
    assert main("toy", "topping=nuts_chopped", f"topping.path={value}", "run.folder=r") == 0
    assert yaml.safe_load(Path("r/config.yaml").read_text())["topping"]["path"] == value


def test_an_operand_fills_its_key_whatever_is_in_it():
    assert main("toy", "it's a # cake", CREAM, "run.folder=r") == 0
    assert yaml.safe_load(Path("r/config.yaml").read_text())["name"] == "it's a # cake"


def test_a_folder_that_is_not_empty_is_refused(capsys):
    Path("r").mkdir()
    Path("r/mine.txt").write_text("mine")
    assert main("toy", CREAM, "run.folder=r") == 2
    assert "--resume" in capsys.readouterr().err
    assert files() == ["r/mine.txt"]


def test_a_folder_that_cannot_be_made_is_an_error_of_the_users(capsys):
    Path("file").write_text("")
    assert main("toy", CREAM, "run.folder=file/r") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert files() == ["file"]


def test_an_input_error_before_the_first_step_takes_the_folder_away(capsys):
    assert main("toy", CREAM, "name=early") == 2
    assert "no flour in the house" in capsys.readouterr().err
    assert files() == []
    assert not Path("outputs").exists()
    Path("kept").mkdir()
    assert main("toy", CREAM, "name=early", "run.folder=kept") == 2
    assert Path("kept").is_dir()
    assert files() == []


def test_an_error_after_the_first_step_is_a_failed_run_without_secrets(capsys, monkeypatch):
    monkeypatch.setenv("TOY_TOKEN", "hf_verysecret")
    assert main("toy", CREAM, "name=late", "run.folder=r") == 1
    said = capsys.readouterr().err
    assert "the run failed: RuntimeError: burnt" in said
    assert "Traceback" not in said
    assert json.loads(Path("r/run.json").read_text())["status"] == "failed"
    assert "Traceback" in Path("r/error.txt").read_text()
    for text in [said, *(Path(f).read_text() for f in files())]:
        assert "hf_verysecret" not in text
    assert "<$TOY_TOKEN>" in Path("r/error.txt").read_text()
    assert main("toy", CREAM, "name=input", "run.folder=v") == 1


def test_the_value_of_a_secret_in_a_plain_field_is_refused_and_not_shown(monkeypatch, capsys):
    monkeypatch.setenv("TOY_TOKEN", "hf_verysecret")
    assert main("toy", CREAM, "name=hf_verysecret") == 2
    said = capsys.readouterr().err
    assert "name: holds the value of $TOY_TOKEN" in said
    assert "hf_verysecret" not in said
    assert files() == []


def test_full_errors_are_raised_on_request(monkeypatch):
    monkeypatch.setenv("MOLE_FULL_ERROR", "1")
    with pytest.raises(RuntimeError, match="burnt"):
        main("toy", CREAM, "name=late")


def test_a_run_says_device_and_dtype_before_it_loads(tmp_path):
    node = {"backbone": {"name": "tiny", "device": "cpu", "dtype": "bfloat16"}, "run": {"folder": str(tmp_path)}}
    assert runs._Life(runs.Plan(toy_command.COMMANDS["toy"], node))._place() == ", device cpu, dtype bfloat16"
    node["backbone"]["device"] = "abacus"  # loading says what is wrong with it
    assert "device abacus" in runs._Life(runs.Plan(toy_command.COMMANDS["toy"], node))._place()


def test_quiet_says_nothing_and_verbose_more(capsys):
    assert main("toy", CREAM, "-q") == 0
    assert capsys.readouterr().err == ""
    assert main("toy", CREAM, "run.folder=r") == 0
    assert "flavour=sweet topping=cream" in capsys.readouterr().err


# Again


def test_from_takes_the_saved_configuration_and_composes_switched_groups_anew():
    assert (
        main("toy", "topping=[cream]", "flavour.sugar=9", "training.max_steps=4", "run.folder=a", "name=one${x}") == 2
    )
    assert main("toy", "topping=[cream]", "flavour.sugar=9", "training.max_steps=4", "run.folder=a", "name=one") == 0
    assert main("toy", "--from", "a", "flavour=sour", "seed=5", "run.folder=b") == 0
    node = yaml.safe_load(Path("b/config.yaml").read_text())
    assert node["flavour"] == {"name": "sour", "lemons": 1}
    assert node["training"]["max_steps"] == 4
    assert node["seed"] == 5
    assert node["name"] == "one"
    assert node["toppings"] == {"cream": {"name": "cream"}}
    assert json.loads(Path("b/run.json").read_text())["from"] == "a"
    assert main("toy", "--from", "b", "topping=cream") == 0
    node = yaml.safe_load((only_run() / "config.yaml").read_text())
    assert node["topping"] == {"name": "cream"}
    assert node["toppings"] == {}
    assert node["flavour"]["name"] == "sour"


def test_from_names_the_version_that_wrote_what_is_unknown_now(capsys):
    assert main("toy", CREAM, "run.folder=a") == 0
    file = Path("a/config.yaml")
    file.write_text(file.read_text() + "eggs: 3\n")
    assert main("toy", "--from", "a") == 2
    said = capsys.readouterr().err
    assert "eggs: unknown key" in said
    assert f"a/config.yaml:{len(file.read_text().splitlines())}" in said
    assert "written by mole" not in said  # it was this one
    record = json.loads(Path("a/run.json").read_text())
    record["versions"]["mole"] = "0.0.1"
    Path("a/run.json").write_text(json.dumps(record))
    assert main("toy", "--from", "a") == 2
    assert "written by mole 0.0.1; this is mole" in capsys.readouterr().err
    assert main("toy", "--from", "a", "experiment=small") == 2


def test_from_fills_in_keys_that_are_newer_than_the_run():
    assert main("toy", CREAM, "run.folder=a") == 0
    node = yaml.safe_load(Path("a/config.yaml").read_text())
    del node["flavour"]["sugar"], node["spices"], node["training"]["learning_rate"]
    Path("a/config.yaml").write_text(yaml.safe_dump(node))
    assert main("toy", "--from", "a", "flavour.sugar=7", "training.learning_rate=0.25", "run.folder=b") == 0
    node = yaml.safe_load(Path("b/config.yaml").read_text())
    assert (node["flavour"]["sugar"], node["spices"], node["training"]["learning_rate"]) == (7, {}, 0.25)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["evaluate", "limit=8"], {"limit": 8, "metric": "auto", "name": "evaluation", "seed": 5}),
        (["generate", "model=r3"], {"limit": 3, "model": "r3", "name": "text", "seed": 5}),
        (["xlora-train", "router.depth=1"], {"library": {"name": "local", "url": "./lib"}, "name": "mixture"}),
    ],
)
def test_from_takes_from_a_run_of_another_command_what_the_two_share(words, expected, capsys):
    Path("x1").mkdir()
    node = {"dataset": {"name": "reverse"}, "name": "sums", "seed": 5, "adapter": {"name": "lora"}}
    node |= {"library": {"name": "local", "url": "./lib"}, "run": {"folder": "x1"}}
    Path("x1/config.yaml").write_text(yaml.safe_dump(node))
    Path("x1/run.json").write_text(json.dumps({"command": "train-expert"}))
    assert cli.main([words[0], "--from", "x1", *words[1:], "--cfg", "job", "--resolve"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert {key: found[key] for key in expected} == expected
    assert found["run"]["folder"].startswith(f"outputs/{words[0]}/")
    assert found["dataset"]["name"] == "reverse"
    assert "adapter" not in found
    if words[0] == "evaluate":
        assert found["model"] == str(Path("x1").absolute())


def test_resume_goes_on_with_what_may_change_and_refuses_the_rest(capsys):
    assert main("toy", CREAM, "name=stop", "run.folder=r") == 75
    assert "toy --resume" in capsys.readouterr().err
    before = json.loads(Path("r/run.json").read_text())
    assert before["status"] == "stopped"
    assert main("toy", "--resume", "r", "seed=3") == 2
    assert "seed cannot change when a run goes on; use --from" in capsys.readouterr().err
    assert main("toy", "--resume", "r", "training.max_steps=9") == 75
    assert yaml.safe_load(Path("r/config.yaml").read_text())["training"]["max_steps"] == 9
    after = json.loads(Path("r/run.json").read_text())
    assert after["started"] == before["started"]
    assert len(after["continued"]) == 1
    assert Path("r/checkpoints/step-1/complete").is_file()


def test_resume_of_a_finished_run_has_nothing_to_do(capsys):
    assert main("toy", CREAM, "run.folder=r") == 0
    record = Path("r/run.json").read_bytes()
    assert main("toy", "--resume", "r") == 0
    assert "finished already" in capsys.readouterr().out
    assert Path("r/run.json").read_bytes() == record


def test_resume_auto_starts_where_there_is_no_checkpoint_and_keeps_what_is_not_its_own(capsys):
    words = ["toy", CREAM, "run.folder=r", "run.resume=auto"]
    assert main(*words, "name=late") == 1
    Path("r/mine.txt").write_text("mine")
    assert main(*words, "name=cake") == 2
    assert "another value of name" in capsys.readouterr().err
    assert main(*words, "name=late") == 1
    assert Path("r/mine.txt").is_file()


def test_a_command_that_starts_anew_each_time_refuses_to_go_on(capsys, monkeypatch):
    monkeypatch.setitem(toy_command.COMMANDS, "toy", dataclasses.replace(toy_command.COMMANDS["toy"], resumes=False))
    assert main("toy", CREAM, "run.resume=auto") == 2
    assert "run.resume=auto cannot act: mole toy starts anew each time; leave it at never" in capsys.readouterr().err
    assert files() == []
    assert main("toy", CREAM, "name=stop", "run.folder=r") == 75
    assert "toy --from" in capsys.readouterr().err
    assert main("toy", "--resume", "r") == 2
    assert "run it again with --from" in capsys.readouterr().err
    assert json.loads(Path("r/run.json").read_text())["status"] == "stopped"
    assert main("toy", "--help") == 0
    assert "--resume" not in capsys.readouterr().out


def test_commands_that_do_not_go_on_are_those_whose_comment_says_so():
    for command in cli.COMMANDS.values():
        entry = yaml_files.entries(yaml_files.conf_dir() / f"{command.config_name}.yaml").get("run.resume")
        assert entry is None or entry.comment.startswith("auto") == command.resumes, command.name


def test_an_input_error_on_resuming_keeps_the_run(capsys):
    assert main("toy", CREAM, "name=stop", "run.folder=r") == 75
    file = Path("r/config.yaml")
    file.write_text(file.read_text().replace("name: stop", "name: early"))
    assert main("toy", "--resume", "r") == 2
    assert Path("r/checkpoints/step-1/complete").is_file()
    assert json.loads(Path("r/run.json").read_text())["status"] == "stopped"


# Sweeps


def test_a_sweep_runs_every_job_and_keeps_a_record(capsys):
    assert main("toy", CREAM, "flavour=sweet,sour", "seed=1,2", "-m", "run.folder=s") == 0
    lines = [json.loads(line) for line in Path("s-sweep/sweep.jsonl").read_text().splitlines()]
    assert [line["job"] for line in lines] == [0, 1, 2, 3]
    assert {line["status"] for line in lines} == {"finished"}
    nodes = [yaml.safe_load(Path(f"s-sweep/{i}/config.yaml").read_text()) for i in range(4)]
    assert [(n["flavour"]["name"], n["seed"]) for n in nodes] == [("sweet", 1), ("sweet", 2), ("sour", 1), ("sour", 2)]
    assert not Path("s-sweep/multirun.yaml").exists()
    text = capsys.readouterr().out
    assert "flavour=sour seed=2" in text
    assert "topping=cream" not in text


def test_a_failing_job_does_not_stop_the_others(capsys):
    assert main("toy", CREAM, "name=late,cake", "-m", "run.folder=s") == 1
    lines = [json.loads(line) for line in Path("s-sweep/sweep.jsonl").read_text().splitlines()]
    assert [(line["status"], line["code"]) for line in lines] == [("failed", 1), ("finished", 0)]
    assert "job 0: the run failed" in capsys.readouterr().out


def test_every_job_is_checked_before_the_first_starts(capsys):
    assert main("toy", CREAM, "training.max_steps=1,0", "-m") == 2
    assert "training.max_steps: must be greater than or equal to 1" in capsys.readouterr().err
    assert files() == []
    assert main("toy", CREAM, "flavour=sweet,sour", "+flavour.lemons=2", "-m") == 2
    assert main("toy", CREAM, "flavour=sweet,sauer", "-m") == 2
    assert "did you mean" in capsys.readouterr().err
    assert files() == []


def test_a_sweep_kept_in_yaml_counts():
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/two.yaml").write_text(
        "# @package _global_\n# Two.\nhydra:\n  sweeper:\n    params:\n      seed: 1,2\n"
    )
    assert main("toy", CREAM, "experiment=two", "-m", "run.folder=s", "--config-dir", "mine") == 0
    assert sorted(p.name for p in Path("s-sweep").iterdir()) == ["0", "1", "sweep.jsonl"]


# Completion


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("mole t", ["toy"]),
        ("mole toy --re", ["--resolve", "--resume"]),
        ("mole toy fl", ["flavour.extras=", "flavour.layers=", "flavour.name=", "flavour.sugar=", "flavour="]),
        ("mole toy flavour=s", ["flavour=sour", "flavour=sweet"]),
        ("mole toy flavour=sour flavour.", ["flavour.lemons=", "flavour.name="]),
        ("mole toy flavour=sweat flavour.s", ["flavour.sugar="]),
        ("mole toy topping=[cream,", ["topping=[cream,nuts_chopped"]),
        ("mole toy flavour=sour,s", ["flavour=sour,sweet"]),
        ("mole toy training.l", ["training.learning_rate="]),
    ],
)
def test_tab_offers_what_may_stand_next(line, found):
    if line == "mole t":
        assert complete(line, toy_command.COMMANDS, []) == found
    else:
        assert tab(line) == sorted(found)


def test_tab_offers_folders_after_flags_that_take_one():
    Path("runs/one").mkdir(parents=True)
    Path("runs/file").write_text("")
    assert complete("mole toy --from runs/", toy_command.COMMANDS, []) == ["runs/one/"]
    assert tab("mole toy run.folder=ru") == ["run.folder=runs/"]


def test_tab_offers_runs_names_of_a_library_and_files_of_conf():
    for run in ("outputs/toy/one", "outputs/train-expert/two"):
        Path(run).mkdir(parents=True)
        Path(run, "run.json").write_text("{}")
    for expert in ("sums", "sorts"):
        Path("lib", expert).mkdir(parents=True)
        Path("lib", expert, "expert.json").write_text("{}")
    both = ["outputs/toy/one/", "outputs/train-expert/two/"]
    assert [c for c in complete("mole plot ", cli.COMMANDS, []) if not c.endswith("=")] == both
    assert set(both) <= set(complete("mole doctor outputs/", cli.COMMANDS, []))
    assert set(both) <= set(complete("mole train-expert --from outputs/t", cli.COMMANDS, []))
    assert complete("mole library show ./lib s", cli.COMMANDS, []) == ["sorts", "sums"]
    assert complete("mole library remove ./lib sums s", cli.COMMANDS, []) == ["sorts"]
    assert complete("mole config show adapter/l", cli.COMMANDS, []) == ["adapter/lora"]
    assert complete("mole config show xl", cli.COMMANDS, []) == ["xlora-train"]
    assert complete("mole config ls ad", cli.COMMANDS, []) == ["adapter"]


def test_operands_that_may_be_left_out_are_shown_so(capsys):
    for name, usage in (("config ls", "config ls [<group>]"), ("doctor", "doctor [<places…>]"), ("plot", "plot <run>")):
        assert cli.main([*name.split(), "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: mole {usage} ")


def test_completion_of_the_real_commands_needs_no_torch():
    env = {**os.environ, "COMP_LINE": "mole train-expert dataset=ar"}
    code = "import sys; from mole.cli.main import main; main(['__complete']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines() == ["dataset=arithmetic", "False"]
    assert complete("mole library a", cli.COMMANDS, []) == ["add", "artefacts"]
    assert complete("mole compl", cli.COMMANDS, []) == ["completion"]


def test_a_completer_that_fails_prints_nothing(monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", "mole toy --config-dir nowhere fl")
    assert cli.main(["__complete"], toy_command.COMMANDS) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_script_is_printed(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    assert "mole __complete" in capsys.readouterr().out
    assert cli.main(["completion", "csh"]) == 2


def test_bash_completes_after_equals(tmp_path):
    """In a real bash: the word is cut at `=`, as readline does, and a whole candidate gets its space."""
    mole = tmp_path / "bin" / "mole"
    mole.parent.mkdir()
    mole.write_text(f'#!/bin/sh\nexec {sys.executable} -m mole "$@"\n')
    mole.chmod(0o755)
    script = f"""
{SHELLS["bash"]}
COMP_LINE="mole train-expert dataset=arith"; COMP_POINT=${{#COMP_LINE}}; _mole; printf '<%s>' "${{COMPREPLY[@]}}"
COMP_LINE="mole train-ex"; COMP_POINT=${{#COMP_LINE}}; _mole; printf '<%s>' "${{COMPREPLY[@]}}"
COMP_LINE="mole train-expert training.max_"; COMP_POINT=${{#COMP_LINE}}; _mole; printf '<%s>' "${{COMPREPLY[@]}}"
"""
    env = {**os.environ, "PATH": f"{mole.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "<arithmetic ><train-expert ><training.max_steps=>"


def test_a_reader_that_leaves_early_is_no_error():
    code = "import sys; from mole.cli.main import main; sys.exit(main(['config', 'ls', '--json']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        said = run.stderr.read().decode()
    assert "Traceback" not in said
    assert "Error" not in said


def test_two_runs_in_one_second_get_two_folders(monkeypatch):
    frozen = time.strptime("2026-01-02 03:04:05", "%Y-%m-%d %H:%M:%S")
    assert frozen
    assert main("toy", CREAM, "run.folder=outputs/${now:%Y}") == 0
    assert main("toy", CREAM, "run.folder=outputs/${now:%Y}") == 0
    assert len(list(Path("outputs").iterdir())) == 2
