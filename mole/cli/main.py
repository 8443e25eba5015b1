"""`mole <command> …`: finds the command and its flags, lets the engine compose, checks, and runs it.

Each command has an ArgumentParser of its own in front of Hydra's engine. Nothing heavy is imported before it is needed:
`mole --help` loads neither Hydra nor torch.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

from mole.command import Command

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_TABLE = (
    Command(
        "train-expert",
        "train one adapter on a frozen backbone and keep it as an expert",
        "train",
        examples=(
            "mole train-expert dataset=arithmetic training.max_steps=20 name=sums",
            "mole train-expert dataset=[reverse,sorting] adapter.rank=4 training.max_steps=20",
        ),
    ),
    Command(
        "xlora-train",
        "train an X-LoRA router over the experts of a library",
        "train",
        examples=("mole xlora-train library=outputs/library dataset=[arithmetic,reverse] router.depth=1",),
        module="mole.commands.build_moe",
        schema="BuildMoe",
    ),
    Command(
        "build-moe",
        "experts of a library and any router: a mixture",
        "mix",
        examples=("mole build-moe library=outputs/library router=uniform",),
    ),
    Command(
        "edit-moe",
        "add, remove or replace experts of a saved mixture; its router keeps what it has learned",
        "mix",
        ("mixture",),
        ("mole edit-moe outputs/build-moe/<run> library=outputs/library add=[sums]",),
        resumes=False,
    ),
    Command(
        "moefy",
        "modules of a backbone become mixtures of experts, which train",
        "mix",
        examples=(
            r"mole moefy backbone=tiny moe.pattern='model\.layers\.\d+\.mlp' dataset=[arithmetic,reverse] "
            "training.max_steps=100",
            r"mole moefy backbone=tiny moe.pattern='.*\.mlp' moe=mixtral train=none",
        ),
    ),
    Command(
        "merge",
        "many experts → one, or a mixture → one expert where that is exact",
        "mix",
        examples=(
            "mole merge library=outputs/library method=ties name=all",
            "mole merge mixture=outputs/build-moe/<run> backbone=tiny name=soup",
        ),
        resumes=False,
    ),
    Command(
        "lorahub",
        "weights of a library's experts for a new task, searched on a few examples",
        "mix",
        examples=("mole lorahub library=outputs/library dataset=jsonl dataset.path=data/new.jsonl budget=40",),
        resumes=False,
    ),
    Command(
        "generate",
        "text from an expert or a mixture",
        "mix",
        examples=("mole generate model=outputs/library/sums 'prompt=add: 2 3'",),
        resumes=False,
    ),
    Command(
        "evaluate",
        "a table of tasks × base, experts, uniform, oracle and mixture",
        "look",
        examples=("mole evaluate model=outputs/library dataset=[arithmetic,reverse] metric=exact_match",),
    ),
    Command(
        "compare",
        "the tables of several evaluations as one, with a picture",
        "look",
        ("runs…",),
        ("mole compare outputs/evaluate/<run> outputs/evaluate/<run>",),
    ),
    Command(
        "plot", "pictures of a run, from its logs alone", "look", ("run",), ("mole plot outputs/xlora-train/<run>",)
    ),
    Command(
        "plot experts-load",
        "how many tokens each expert of a run got, by layer and position",
        "look",
        ("run",),
        ("mole plot experts-load outputs/moefy/<run> layer=all",),
        module="mole.commands.plot_experts_load",
    ),
    Command(
        "plot weights",
        "the weight of each expert over a run's training, also while it goes on",
        "look",
        ("run",),
        ("mole plot weights outputs/build-moe/<run> layers=all",),
        module="mole.commands.plot_weights",
    ),
    Command(
        "plot image-routing",
        "an image on its way through a vision model's mixtures of experts",
        "look",
        ("model", "image"),
        ("mole plot image-routing outputs/vit photo.png patch_size=16",),
        module="mole.commands.plot_image_routing",
    ),
    Command("quickstart", "the whole way on generated tasks: minutes, and nothing to download", "look", script=True),
    Command("library list", "the experts of a library", "keep", ("library",)),
    Command("library similar", "which experts of a library are alike, from their weights alone", "keep", ("library",)),
    Command(
        "library rank",
        "which experts are best for a small sample of new data",
        "keep",
        ("library",),
        ("mole library rank outputs/library backbone=tiny dataset=jsonl dataset.path=data/new.jsonl",),
    ),
    Command("library cluster", "groups of like experts, and how to train one for each", "keep", ("library",)),
    Command("library map", "a picture of a library", "keep", ("library", "dest")),
    Command("library show", "the card and the files of an expert", "keep", ("library", "name")),
    Command("library add", "check an expert's folder and put it into a library", "keep", ("library", "folder")),
    Command("library get", "fetch an expert, verified, into a folder", "keep", ("library", "name", "dest")),
    Command(
        "library import",
        "take over an adapter that others made: PEFT, loralib, AdapterHub, the Hub",
        "keep",
        ("source", "library"),
        ("mole library import downloads/lora outputs/library name=law backbone=user/model",),
    ),
    Command(
        "library export",
        "write an expert as a folder for other programs",
        "keep",
        ("library", "name", "dest"),
        ("mole library export outputs/library law served format=normalised dtype=bfloat16",),
    ),
    Command("library update", "put a newer revision in an expert's place", "keep", ("library", "name", "folder")),
    Command("library edit", "change what an expert's card says", "keep", ("library", "name")),
    Command("library rename", "give an expert another name", "keep", ("library", "old", "new")),
    Command("library history", "the revisions of an expert", "keep", ("library", "name")),
    Command("library restore", "put an old revision on top again", "keep", ("library", "name")),
    Command(
        "library convert",
        "a trained mixture → what can be uploaded of it",
        "keep",
        ("mixture", "library"),
        ("mole library convert outputs/build-moe/<run> outputs/library as=mixture name=all-tasks",),
    ),
    Command("library remove", "take experts out of a library", "keep", ("library", "names…")),
    Command("library push", "copy what differs to another library, such as the Hub", "keep", ("local", "remote")),
    Command("library pull", "copy what differs from another library", "keep", ("remote", "local")),
    Command("library clone", "a whole library in a new place", "keep", ("source", "target")),
    Command("library sync", "bring two libraries to the same state, both ways", "keep", ("one", "other")),
    Command("library diff", "in what two libraries differ", "keep", ("one", "other")),
    Command("library artefacts", "what was computed from experts and is kept", "keep", ("library", "name")),
    Command("library readme", "the page about a library", "keep", ("library",)),
    Command("library gc", "take away what nothing needs any more", "keep", ("library",)),
    Command("library verify", "check every file against its card", "keep", ("library", "names…")),
    Command("config ls", "the groups of conf/ and their options", "check", ("group",)),
    Command("config show", "one option's file, or a command's, with its comments", "check", ("what",)),
    Command("doctor", "check the machine; a run, and whether it can go on; experts", "check", ("places…",)),
)
COMMANDS = {command.name: command for command in _TABLE}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        words = message.rpartition("unrecognized arguments: ")[2].split()
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(words[0], flags, n=1) if message.startswith("unrecognized") else []
        raise ValueError(f"{message}" + (f"; did you mean {near[0]}?" if near else f"   (see {self.prog} --help)"))


def parser(command: str) -> argparse.ArgumentParser:
    """The flags of one command; everything else on the line is an operand or an override."""
    flags = _Parser(f"mole {command}", add_help=False, allow_abbrev=False)
    flags.add_argument("words", nargs="*")
    flags.add_argument("-h", "--help", action="store_true")
    flags.add_argument("--all", action="store_true")
    flags.add_argument("-m", "--multirun", action="store_true")
    flags.add_argument("--cfg", choices=["job", "hydra", "all"])
    flags.add_argument("--resolve", action="store_true")
    flags.add_argument("--package")
    flags.add_argument("--info", choices=INFO)
    flags.add_argument("--config-dir", action="append", default=[])
    flags.add_argument("--from", dest="source")
    flags.add_argument("--resume")
    flags.add_argument("-q", "--quiet", action="store_true")
    flags.add_argument("-v", "--verbose", action="store_true")
    flags.add_argument("--json", action="store_true")
    flags.add_argument("--no-color", action="store_true")
    flags.add_argument("--version", action="store_true")
    return flags


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Runs a command line (without the program's name) and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(words, commands)
    except KeyboardInterrupt:
        return _fail(["interrupted"], 130)
    except BrokenPipeError:  # `mole … | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(words: list[str], commands: Mapping[str, Command]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        from mole.cli import help as texts

        print(texts.overview(commands))
        return 0
    if words[0] == "--version":
        return _versions()
    if words[0] == "__complete":
        return _complete(os.environ.get("COMP_LINE", ""), commands)
    if words[0] == "completion":
        return _completion(words[1:])
    families = {name.partition(" ")[0] for name in commands if " " in name} - set(commands)
    if words[0] in families and (len(words) == 1 or words[1] in ("-h", "--help")):
        from mole.cli import help as texts

        print(texts.overview(commands, words[0]))
        return 0
    size = 2 if words[0] in families or " ".join(words[:2]) in commands else 1
    name = " ".join(words[:size])
    if name not in commands:
        return _fail([_unknown_command(name, commands)])
    command = commands[name]
    try:
        given = parser(name).parse_intermixed_args(_info_filled(words[size:]))
    except ValueError as error:
        return _fail([str(error)])
    if given.version:
        return _versions()
    with _surroundings(given):
        return _guarded(command, given, commands)


def _guarded(command: Command, given: argparse.Namespace, commands: Mapping[str, Command]) -> int:
    """Runs the command; what goes wrong before it starts is the user's, and is said in a few lines."""
    from mole.cli import help as texts
    from mole.config import yaml_files

    file = yaml_files.conf_dir() / f"{command.config_name}.yaml"
    folders = [*given.config_dir, *filter(None, os.environ.get("MOLE_CONFIG_DIR", "").split(os.pathsep))]
    if given.help and not folders and not given.words and file.is_file() and not yaml_files.defaults(file):
        print(texts.plain_command(command, file))
        return 0
    from mole.cli import invoke  # Hydra, from here on

    return invoke.run(command, given, folders, lambda words: _main(words, commands))


def _info_filled(words: list[str]) -> list[str]:
    """`--info` alone means `--info all`, whatever stands behind it."""
    done: list[str] = []
    for index, word in enumerate(words):
        done.append(word)
        if word == "--info" and (index + 1 == len(words) or words[index + 1] not in INFO):
            done.append("all")
    return done


@contextmanager
def _surroundings(given: argparse.Namespace):
    """The log at the wanted level, and NO_COLOR for all who print, worker processes included."""
    import logging

    from mole.log import start_log

    start_log(logging.DEBUG if given.verbose else logging.WARNING if given.quiet else logging.INFO)
    before = os.environ.get("NO_COLOR")
    if given.no_color:
        os.environ["NO_COLOR"] = "1"
    try:
        yield
    finally:
        if given.no_color:
            os.environ.pop("NO_COLOR")
        if before is not None:
            os.environ["NO_COLOR"] = before


def _unknown_command(name: str, commands: Mapping[str, Command]) -> str:
    near = difflib.get_close_matches(name, commands, n=1)
    family = [n for n in commands if n.startswith(f"{name.partition(' ')[0]} ")]
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(family or commands)}"
    return f"unknown command {name!r}{hint}"


def _versions() -> int:
    from mole import host

    for name, version in host.versions().items():
        print(f"{name} {version or 'not installed'}")
    return 0


def _completion(words: list[str]) -> int:
    from mole.cli.completion import SHELLS

    if len(words) != 1 or words[0] not in SHELLS:
        return _fail([f"mole completion takes one of {', '.join(SHELLS)}"])
    print(SHELLS[words[0]])
    return 0


def _complete(line: str, commands: Mapping[str, Command]) -> int:
    """Prints candidates; a line that cannot be completed has none, and an error would only disturb the typing."""
    from mole.cli.completion import complete

    flags = [flag for action in parser("")._actions for flag in action.option_strings]
    try:
        found = complete(line, commands, flags)
    except Exception:
        if os.environ.get("MOLE_FULL_ERROR"):
            raise
        return 1
    print("\n".join(found))
    return 0


def _fail(lines: Sequence[str], code: int = 2) -> int:
    print("mole: " + "\n      ".join(lines), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
