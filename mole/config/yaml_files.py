"""Reads what the YAML files of conf/ say beside their values: comments, and the lines on which keys stand."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

_DEFAULT = re.compile(r"^\s*- (?:optional |override )*/?([a-z][\w/]*):[^#]*(?:#\s*(.*))?$")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Entry:
    """One key of a file: its dotted path, its value as written (empty for a mapping), its comment, its line from 1."""

    key: str
    value: str
    comment: str
    line: int
    is_leaf: bool


def conf_dir() -> Path:
    """`conf/` in the package (installed) or beside it (source tree), absolute. Raises FileNotFoundError."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "launcher" / "auto.yaml").is_file():
            return folder
    raise FileNotFoundError(f"mole is not installed whole: no conf/ in {package} or {package.parent}")


def sentence(file: Path) -> str:
    """The first comment line of a file that is no directive: what the file is, in a sentence."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return ""
        if not line.startswith("# @package"):
            return line.lstrip("# ").strip()
    return ""


def is_global(file: Path) -> bool:
    """Whether a file sets keys of the whole configuration, not of its group's node."""
    return file.read_text(encoding="utf-8").startswith("# @package _global_")


def entries(file: Path) -> dict[str, Entry]:
    """Every key of a YAML file but its defaults list, in order, by dotted path. Raises ValueError for bad YAML."""
    text = file.read_text(encoding="utf-8")
    try:
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no valid YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        return {}
    lines = text.splitlines()
    return {entry.key: entry for entry in _walk(root, "", lines) if entry.key.split(".")[0] != "defaults"}


def defaults(file: Path) -> dict[str, str]:
    """The groups of a file's defaults list, in order, each with its comment."""
    found: dict[str, str] = {}
    inside = False
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("defaults:"):
            inside = True
        elif inside and line and not line.startswith((" ", "-", "#")):
            break
        elif inside and (match := _DEFAULT.match(line)):
            found[match[1]] = (match[2] or "").strip()
    return found


def _walk(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[Entry]:
    for key_node, value_node in node.value:
        key = prefix + str(key_node.value)
        nested = isinstance(value_node, yaml.MappingNode) and bool(value_node.value)
        inline = nested and value_node.flow_style
        row = key_node.start_mark.line
        last = row if nested and not inline else max(row, value_node.end_mark.line)
        if nested and not inline:
            value, column = "", key_node.end_mark.column
        else:
            value = _source(value_node, lines)
            column = value_node.end_mark.column if value_node.end_mark.line == last else 0
        yield Entry(key, value, _comment(lines, row, min(last, len(lines) - 1), column), row + 1, not nested)
        if nested:
            yield from _walk(value_node, f"{key}.", lines)


def _source(node: yaml.Node, lines: list[str]) -> str:
    start, end = node.start_mark, node.end_mark
    if start.line == end.line:
        return lines[start.line][start.column : end.column].strip() if start.line < len(lines) else ""
    return " ".join(line.split(" #")[0].strip() for line in lines[start.line : end.line + 1]).strip()


def _comment(lines: list[str], row: int, last: int, column: int) -> str:
    """What stands behind `#` after the value, with the lines that go on under it; else the comment lines above."""
    line = lines[last] if last < len(lines) else ""
    mark = line.find("#", column)
    if mark < 0 and last != row:
        line, last = lines[row], row
        mark = line.find(" #") + 1 if " #" in line else -1
    if mark >= 0:
        parts = [line[mark + 1 :].strip()]
        for following in lines[last + 1 :]:
            if following.find("#") != mark or following[:mark].strip():
                break
            parts.append(following[mark + 1 :].strip())
        return " ".join(parts)
    above: list[str] = []
    for index in range(row - 1, 0, -1):  # line 0 is the file's own sentence
        if not lines[index].strip().startswith("#"):
            break
        above.insert(0, lines[index].strip().lstrip("# "))
    return " ".join(above)
