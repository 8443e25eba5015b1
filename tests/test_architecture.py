"""The house: which part imports which, sizes of files and functions, names."""

import ast
from pathlib import Path

import pytest

import mole

ROOT = Path(mole.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From left to right: a part imports what stands in a column to its right, and its own package. Single modules of the
# foundation have columns of their own, as some of them are made of others.
COLUMNS = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"training", "evaluation", "analysis"},
    {"xlora"},
    {"mixtures", "moe", "merging"},
    {"routers"},
    {"experts"},
    {"adapters"},
    {"kernels", "routing"},
    {"backbones", "data"},
    {"config"},
    {"log", "run_folder", "command", "host", "untrusted", "figure"},
    {"registry", "secrets", "head"},
]
PLACE = {part: index for index, column in enumerate(COLUMNS) for part in column}
LIGHT = ["__init__.py", "__main__.py", "command.py", "config/__init__.py"]
LIGHT += ["cli/__init__.py", "cli/main.py", "cli/help.py", "cli/completion.py"]
HEAVY = {"torch", "hydra", "omegaconf", "pydantic", "rich", "transformers", "peft", "accelerate", "numpy", "yaml"}


def part_of(file: Path) -> str:
    first = file.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    """Dotted names that a file imports, wherever in it: `from mole import data` is mole.data."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def top_level_imports(tree: ast.Module) -> list[str]:
    body = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    return imports(ast.Module(body=[n for n in body if isinstance(n, ast.Import | ast.ImportFrom)], type_ignores=[]))


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_to_the_right(file):
    here = part_of(file)
    if here == "__init__":
        return
    assert here in PLACE, f"{here} has no place in the order of imports"
    for name in imports(parsed(file)):
        if not name.startswith("mole."):
            continue
        there = name.split(".")[1]
        if there in (here, "__version__"):
            continue
        assert there in PLACE, f"{name} has no place in the order of imports"
        assert PLACE[there] > PLACE[here], (
            f"{file.relative_to(ROOT)} imports {name}, which stands left of it or beside it"
        )


def test_the_test_of_directions_sees_an_import_that_goes_back():
    backwards = imports(ast.parse("def f():\n    from mole import training\n"))
    assert backwards == ["mole.training"]
    assert PLACE["training"] < PLACE["adapters"]


@pytest.mark.parametrize("file", [ROOT / name for name in LIGHT], ids=LIGHT)
def test_what_starts_first_imports_nothing_heavy_at_its_top(file):
    names = {name.split(".")[0] for name in top_level_imports(parsed(file))}
    assert not names & HEAVY


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_and_functions_are_small_and_said_what_they_are(file):
    tree, text = parsed(file), file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(tree) or not text.strip(), "no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"
            by_place = [a.arg for a in [*node.args.posonlyargs, *node.args.args] if a.arg not in ("self", "cls", "ctx")]
            is_theirs = node.name == "forward" and "input_ids" in by_place  # the signature of transformers' models
            assert len(by_place) <= 7 or is_theirs, f"{node.name} takes {len(by_place)} arguments by place"


def test_no_file_is_a_drawer():
    drawers = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
    assert not [f for f in FILES if f.name in drawers]


def test_every_command_of_the_table_keeps_to_the_rule_of_names():
    from mole.cli.main import COMMANDS

    for command in COMMANDS.values():
        file = ROOT.parent.joinpath(*command.module_name.split(".")).with_suffix(".py")
        if not file.is_file():
            pytest.skip(f"{file.name} is not written yet")
        names = {node.name for node in parsed(file).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        assert {command.schema_name, "lines" if command.script else "run"} <= names
