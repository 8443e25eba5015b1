"""`mole config ls` and `mole config show`, end to end."""

import json

import pytest

from mole.cli.main import main
from mole.config.yaml_files import conf_dir


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOLE_CONFIG_DIR", raising=False)


def test_ls_lists_every_option_with_its_sentence(capsys, tmp_path):
    assert main(["config", "ls", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    files = {(f.parent.name, f.stem) for f in conf_dir().glob("*/*.yaml")}
    assert {(group, option) for group, members in found.items() for option in members} == files
    assert found["launcher"]["auto"].startswith("How many processes")
    assert found["experiment"]["debug"].startswith("A first look")
    assert list(tmp_path.iterdir()) == []


def test_ls_of_one_group_shows_that_one(capsys):
    assert main(["config", "ls", "experiment"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "experiment"
    assert main(["config", "ls", "experiment", "format=names"]) == 0
    assert "experiment/debug" in capsys.readouterr().out.splitlines()


def test_ls_counts_the_users_folders(capsys, tmp_path):
    (tmp_path / "mine" / "adapter").mkdir(parents=True)
    (tmp_path / "mine" / "adapter" / "wide.yaml").write_text("# My wide one.\nname: lora\n")
    assert main(["config", "ls", "adapter", "--config-dir", "mine"]) == 0
    assert "My wide one." in capsys.readouterr().out
    assert main(["config", "show", "adapter/wide", "--config-dir", "mine"]) == 0
    assert "name: lora" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["launcher/auto", "doctor", "launcher/auto.yaml"])
def test_show_prints_the_file_with_its_comments(what, capsys):
    assert main(["config", "show", what]) == 0
    text = (conf_dir() / f"{what.removesuffix('.yaml')}.yaml").read_text()
    assert capsys.readouterr().out.endswith(text)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ls", "launchr"], "did you mean launcher?"),
        (["show", "launcher/autoo"], "did you mean launcher/auto?"),
        (["show", "trane-expert"], "unknown configuration 'trane-expert'"),
        (["show"], "what: required"),
        (["ls", "format=xml"], 'format: must be table, json or names, got "xml"'),
        (["shwo"], "unknown command 'config shwo'; did you mean config show?"),
    ],
)
def test_what_is_not_there_is_named(words, says, capsys):
    assert main(["config", *words]) == 2
    assert says in capsys.readouterr().err
