"""The README is true: its map names every file, its commands exist, its picture is there."""

import re
from pathlib import Path

import pytest

import mole
from mole.cli.main import COMMANDS

PACKAGE = Path(mole.__file__).parent
README = PACKAGE.parent / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="no README beside an installed package")


def text() -> str:
    return README.read_text(encoding="utf-8")


def mapped() -> set[str]:
    """The files that the map names, relative to mole/."""
    found, folder = set(), ""
    block = next(part for part in text().split("```") if part.startswith("\nmole/ "))
    for line in block.splitlines():
        if match := re.match(r"(\S+/)", line):
            folder = "" if match[1] == "mole/" else match[1]
        elif match := re.match(r"  (\S+\.py)\s+\S", line):
            found.add(folder + match[1])
    return found


def test_the_map_names_every_file_and_no_other():
    files = {str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if f.name != "__init__.py"}
    assert mapped() == files


def test_every_command_is_named_and_every_named_command_is_one():
    family = "(?:library |config |plot (?=experts-load|weights|image-))?"
    named = set(re.findall(rf"(?:^    |`)mole ({family}[a-z][a-z-]+)", text(), re.MULTILINE))
    assert set(COMMANDS) <= {" ".join(n.split()) for n in named}
    families = {name.split()[0] for name in COMMANDS if " " in name}
    for name in named:
        assert name in COMMANDS or name.split()[0] in COMMANDS or name in families, name


def test_the_pictures_are_there():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text())
    assert pictures
    assert all((README.parent / picture).is_file() for picture in pictures)


def test_the_two_commands_are_scripts():
    for script in ("scripts/quickstart.sh", "scripts/test.sh"):
        assert script in text()
        assert (README.parent / script).stat().st_mode & 0o100
