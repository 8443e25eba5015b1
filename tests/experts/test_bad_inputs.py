"""Foreign folders, files and texts that are bad on purpose: one named error each, nothing run, no secret told."""

import json
import logging
import os
import pickle
import re
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from mole.adapters import peft_format
from mole.experts import Damaged, ExpertLibrary, LibraryError, Refused, load_expert
from mole.experts.importing import Hints, import_expert
from mole.experts.readme import readme

CANARY = "hf_canaryAAAABBBBCCCC"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(make, tmp_path):
    """An expert's folder."""
    make().save(tmp_path / "x")
    return tmp_path / "x"


def special(kind, place, tmp_path):
    """Puts something that is no regular file of its own at `place`."""
    if kind == "link to a file":
        (tmp_path / "secret").write_text(CANARY)
        place.symlink_to(tmp_path / "secret")
    elif kind == "link to itself":
        place.symlink_to(place)
    elif kind == "hard link":
        (tmp_path / "other").write_bytes(b"x")
        os.link(tmp_path / "other", place)
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(place.parent)  # the name of a socket is short
            try:
                server.bind(place.name)
            finally:
                os.chdir(here)
    elif kind == "folder":
        place.mkdir()


SPECIAL = ["link to a file", "link to itself", "hard link", "pipe", "socket", "folder"]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "expert.json"])
def test_what_is_no_file_of_its_own_is_not_taken(folder, tmp_path, kind, name):
    (folder / name).unlink()
    special(kind, folder / name, tmp_path)
    with pytest.raises(LibraryError) as caught:
        ExpertLibrary.open(str(tmp_path / "lib")).add_expert(load_expert(folder), "x")
    assert CANARY not in str(caught.value)
    assert not (tmp_path / "lib" / "x").exists()


@pytest.mark.parametrize(
    "entry", [".git", "__pycache__", ".DS_Store", "notes.md", "x.SAFETENSORS", "Adapter_config.json"]
)
def test_what_the_card_does_not_list_is_refused_by_name(folder, entry):
    if entry in (".git", "__pycache__"):
        (folder / entry).mkdir()
    else:
        (folder / entry).write_text("x")
    with pytest.raises(Refused, match=entry.strip("_").split(".")[-1]):
        load_expert(folder)


def test_a_folder_of_ten_thousand_files_is_refused_early(folder, monkeypatch):
    for number in range(200):
        (folder / f"f{number}").touch()
    with pytest.raises(Refused, match="more than 66 entries"):
        load_expert(folder)


def test_an_unreadable_file_is_told(folder, tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith(WEIGHTS):
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises((LibraryError, PermissionError), match="Permission denied|cannot be read"):
        _ = load_expert(folder).adapter


@pytest.mark.parametrize("how", ["grown", "shrunk", "replaced", "pickled"])
def test_a_file_that_changes_between_check_and_use_is_not_used(folder, how):
    expert = load_expert(folder)
    data = (folder / WEIGHTS).read_bytes()
    changed = {
        "grown": data + b"\0",
        "shrunk": data[:-1],
        "replaced": data[:-1] + bytes([data[-1] ^ 1]),
        "pickled": pickle.dumps({"a": 1}).ljust(len(data), b"\0"),
    }[how]
    (folder / WEIGHTS).write_bytes(changed)
    with pytest.raises(Damaged, match="not what the card says"):
        _ = expert.adapter


TEXTS = {
    "hydra": "_target_: os.system",
    "interpolation": "${oc.env:HF_TOKEN}",
    "template": "{{ config.__class__ }} {% raise %}",
    "yaml": "&a [*a, *a] !!python/object/apply:os.system",
    "markdown": "[x](javascript:alert(1)) ![y](http://evil/?t=1) `rm` | | **b**",
    "html": "<script>alert(1)</script><img src=x onerror=1>",
    "format": "%s%n {0.__class__}",
    "rich": "[bold red]x[/] [link=http://evil]y[/link]",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_in_a_card_stays_text_wherever_it_is_shown(make, library, monkeypatch, capsys, kind):
    from mole.cli.main import main

    monkeypatch.setenv("HF_TOKEN", CANARY)
    text = TEXTS[kind]
    library.add_expert(make(description=text, tasks=[text], author=text, message=text, extra={"note": text}), "x")
    assert library.card("x").description == text
    page = readme(library.card("x"))
    assert not re.search(r"(?<!\\)[<>`|\[\]]", page.splitlines()[0] + page.splitlines()[2])
    assert main(["library", "show", library.url, "x"]) == 0
    assert main(["library", "list", library.url]) == 0
    out = capsys.readouterr()
    assert text in out.out
    assert CANARY not in out.out + out.err + page


@pytest.mark.parametrize(
    "text", ["\x1b[31mred", "\x9b31m", "a\nb", "a\rb", "a\0b", "\u202egnp.exe", "\u2066x", "\x08", "\u0085"], ids=ascii
)
def test_a_text_that_a_terminal_would_obey_is_refused(make, text):
    for field in ("description", "author", "message"):
        with pytest.raises(LibraryError, match=field) as caught:
            make(**{field: text})
        assert str(caught.value).isprintable()


SECRETS = [
    f"hf://user:{CANARY}@huggingface.co/a/b",
    f"hf://{CANARY}@a/b",
    f"hf://a/b?token={CANARY}",
    f"s3://key:{CANARY}@bucket/x",
    f"https://user:{CANARY}@huggingface.co/a/b",
    f"az://account/container?sig={CANARY}",
]


@pytest.mark.parametrize("address", SECRETS)
@pytest.mark.parametrize("way", ["import", "open", "load"])
def test_a_secret_in_an_address_is_repeated_nowhere(address, way, caplog, capsys):
    ways = {"import": import_expert, "open": lambda a: ExpertLibrary.open(a).names(), "load": load_expert}
    with caplog.at_level(logging.DEBUG), pytest.raises(LibraryError) as caught:
        ways[way](address)
    out = capsys.readouterr()
    told = [
        str(caught.value),
        repr(caught.value),
        *getattr(caught.value, "__notes__", []),
        caplog.text,
        out.out,
        out.err,
    ]
    assert not [text for text in told if CANARY in text]
    assert CANARY.encode() not in pickle.dumps(caught.value)


def test_an_environment_with_a_token_ends_in_no_file(make, library, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    expert = library.add_expert(make(), "x")
    library.edit_card("x", tags=["a"])
    library.artefact("x", "kind", {}, lambda: {"a": 1})
    library.get_expert("x").save(tmp_path / "out")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
    assert CANARY not in json.dumps(expert.to_dict())


HOSTILE = {
    "rank": {"r": 2_000_000},
    "rank pattern": {"rank_pattern": {"q_proj": 2_000_000}},
    "regex": {"target_modules": "(a|a)*" * 30 + "$"},
    "pattern regex": {"alpha_pattern": {"(q+)+$" * 30: 2}},
    "rank regex": {"rank_pattern": {"(q+)+$" * 30: 2}},
    "targets": {"target_modules": ["x" * 300] * 3000},
    "base model": {"base_model_name_or_path": "/etc", "auto_mapping": {"parent_library": "os"}},
}
CHILD = """
import json, resource, sys, torch
from mole.experts import LibraryError
from mole.experts.importing import import_expert
told = {}
import_expert(sys.argv[1])  # a sound one first: what is imported on the way costs more than the rest
for place in sys.argv[2:]:
    before, (user, system, *_) = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrusage(0)
    resource.setrlimit(resource.RLIMIT_CPU, (int(user + system) + 20, 600))
    try:
        import_expert(place)
        name = "read"
    except LibraryError as error:
        name = type(error).__name__
    told[place.rsplit("/", 1)[-1]] = name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps(told))
"""


@pytest.mark.slow
def test_hostile_configs_cost_next_to_nothing(tmp_path, expert):
    for kind, changes in {"sound": {}, **HOSTILE}.items():
        (tmp_path / kind).mkdir()
        peft_format.write(expert.adapter, tmp_path / kind, "user/model")
        path = tmp_path / kind / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    words = [sys.executable, "-c", CHILD, *(str(tmp_path / kind) for kind in ("sound", *HOSTILE))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # above twenty seconds of one core it would have been killed
    told = json.loads(done.stdout)
    assert {kind: name for kind, (name, _) in told.items()} == {
        "rank": "Refused",
        "rank pattern": "Refused",
        "regex": "read",  # never run: the tensors say which modules are adapted
        "pattern regex": "Refused",
        "rank regex": "read",
        "targets": "read",
        "base model": "LibraryError",
    }
    assert max(kilobytes for _, kilobytes in told.values()) < 100_000


def test_weights_that_look_like_one_thing_and_are_another_are_told(tmp_path):
    for name, data in {
        "zip": b"PK\x03\x04" + bytes(200),
        "pickle": pickle.dumps([1]),
        "html": b"<!DOCTYPE html>",
    }.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        with pytest.raises((Damaged, Refused)):
            import_expert(tmp_path / f"{name}.safetensors", hints=Hints(alpha=1.0, backbone="x"))


def test_what_is_imported_is_written_anew(tmp_path):
    tensors = {"h.fc.lora_A": torch.randn(2, 6), "h.fc.lora_B": torch.randn(4, 2)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"note": CANARY})
    expert = import_expert(tmp_path / "a.safetensors", hints=Hints(alpha=1.0, backbone="x"))
    expert.save(tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if CANARY.encode() in path.read_bytes()]
