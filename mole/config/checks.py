"""From a composed configuration to a command's frozen dataclass, with one line for everything that is wrong in it.

Composing itself (conf/, the user's folders, overrides) is done by `mole.config.engine`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mole import secrets
from mole.command import Command
from mole.config.nodes import not_chosen
from mole.registry import nearest

_SHOWN = 80  # characters of a wrong value that an error shows


class ConfigProblems(ValueError):
    """Everything that is wrong with one configuration; `lines` holds one line for each problem."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = list(lines)

    def __reduce__(self):
        return type(self), (self.lines,)


def validate(
    schema: type | str,
    node: Mapping[str, Any],
    options: Mapping[str, list[str]] | None = None,
    required: Sequence[str] = (),
    where: Callable[[str], str] = lambda key: "",
    comment: Callable[[str], str] = lambda key: "",
) -> Any:
    """A composed configuration as plain data → the frozen dataclass `schema`, or that of the command of this name.

    For the messages: `options` maps each group of the command to its options, `required` are groups that must be chosen
    though the schema cannot say so, `where` maps a dotted key to what stands behind its problem (the file and line it
    came from), `comment` to what the files say about it. Raises ConfigProblems with everything that is wrong.
    """
    if isinstance(schema, str):
        schema, _ = Command(schema).load()
    lines = list(secrets.problems(node))
    try:
        config = TypeAdapter(schema).validate_json(json.dumps(node))
    except ValidationError as error:
        open_groups = [g for g in required if not node.get(g) and not node.get(f"{g}s")]
        lines += _Reader(node, options or {}, where, comment).lines(error)
        lines += [not_chosen(group, (options or {}).get(group, [])) for group in open_groups]
    except TypeError as error:
        raise ConfigProblems([f"the configuration is not plain data: {error}"]) from None
    else:
        if not lines:
            return config
    raise ConfigProblems(list(dict.fromkeys(lines)))


def dump(config: Any) -> dict[str, Any]:
    """A validated configuration as plain data: what `validate` takes."""
    return TypeAdapter(type(config)).dump_python(config, mode="json", by_alias=True)


class _Reader:
    """Puts pydantic's list of errors into words, one line for each problem."""

    def __init__(
        self,
        node: Mapping[str, Any],
        options: Mapping[str, list[str]],
        where: Callable[[str], str],
        comment: Callable[[str], str],
    ):
        self.node, self.options, self.where, self.comment = node, options, where, comment

    def lines(self, error: ValidationError) -> list[str]:
        errors = error.errors(include_url=False)
        paths = [self._path(e) for e in errors]
        surplus = {p for p, e in zip(paths, errors, strict=True) if e["type"] == "unexpected_keyword_argument"}
        found: dict[str, list[Any]] = {}
        for path, one in zip(paths, errors, strict=True):
            found.setdefault(".".join(path), []).append((path, one))
        lines = []
        for same in found.values():  # a value that fits no member of a union has an error for each of them
            lines += self._problem(same[0][0], [one for _, one in same], surplus)
        return lines

    def _path(self, error: Any) -> tuple[str, ...]:
        """The dotted key of an error: pydantic's location less the names of union members."""
        path: list[str] = []
        here: Any = self.node
        entered = False
        for position, part in enumerate(error["loc"]):
            names_member = entered and isinstance(here, Mapping) and part == here.get("name")
            entered = False
            if names_member:  # of a union of configs; a field may have that name too
                continue
            if isinstance(here, Mapping) and part in here:
                here, entered = here[part], True
            elif isinstance(here, list) and isinstance(part, int):
                here = here[part] if part < len(here) else None
            elif not (position == len(error["loc"]) - 1 and error["type"].startswith("missing")):
                continue
            path.append(str(part))
        return tuple(path)

    def _problem(self, path: tuple[str, ...], errors: list[Any], surplus: set[tuple[str, ...]]) -> list[str]:
        key, kind = ".".join(path), errors[0]["type"]
        if kind == "value_error":
            text = str(errors[0]["ctx"]["error"]) if "error" in errors[0].get("ctx", {}) else errors[0]["msg"]
            return [line for line in text.splitlines() if line.strip()]
        if kind.startswith("missing"):
            choices = self.options.get(key)
            return [not_chosen(key, choices) if choices else f"{key}: required{self._hint(path)}"]
        behind = self.where(key)
        behind = f"   {behind}" if behind else ""
        if kind == "unexpected_keyword_argument":
            return [self._unknown(path, surplus) + behind]
        if kind.startswith("union_tag"):
            return [self._variant(path) + behind]
        given = errors[0]["input"]
        must = " or ".join(dict.fromkeys(_wanted(e) for e in errors)).replace(" or be ", " or ")
        quoted = isinstance(given, int | float) and must == "be text" and not behind and not path[-1].isdigit()
        hint = f"; as text it is written \"{key}='{_shown(given)}'\"" if quoted else ""
        return [f"{key or 'config'}: must {must}, got {_shown(given)}{hint}{behind}"]

    def _unknown(self, path: tuple[str, ...], surplus: set[tuple[str, ...]]) -> str:
        here: Any = self.node
        for part in path[:-1]:
            here = here[int(part)] if isinstance(here, list) else here[part]
        known = [k for k in here if (*path[:-1], k) not in surplus]
        near = nearest(path[-1], known, 1)
        hint = f"; did you mean {'.'.join([*path[:-1], near[0]])}?" if near else ""
        return f"{'.'.join(path)}: unknown key{hint} (known: {', '.join(known)})"

    def _variant(self, path: tuple[str, ...]) -> str:
        """A group's node that names no variant, or one that is not registered."""
        here: Any = self.node
        for part in path:
            here = here[int(part)] if isinstance(here, list) else here[part]
        key, known = ".".join(path), self.options.get(path[0], []) if path else []
        name = here.get("name") if isinstance(here, Mapping) else here
        if name is None or not isinstance(here, Mapping):
            return f"{key}: must be one of the options of its group, got {_shown(here)}; choose with {key}=<option>"
        near = nearest(str(name), known, 1)
        hint = f"; did you mean {key}={near[0]}?" if near else ""
        return f"{key}.name: unknown {name!r}{hint}" + (f" (known: {', '.join(known)})" if known else "")

    def _hint(self, path: tuple[str, ...]) -> str:
        key = ".".join(path)
        said = self.comment(key)
        return (f" ({said})" if said else "") + f"; give it with {key}=…"


_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of names to values",
    "dataclass_type": "a mapping of names to values",
    "none_required": "null",
    "finite_number": "a finite number",
}


def _wanted(error: Any) -> str:
    """What a value must be or have, in plain words."""
    if error["type"] in _WANTED:
        return f"be {_WANTED[error['type']]}"
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        return "be " + str(context["expected"]).replace("'", "")
    if error["type"] == "string_pattern_mismatch":
        return f"be text of the form {context['pattern']}"
    text = error["msg"].removeprefix("Value error, ")
    match = re.match(r"[A-Z]\w* should (be|have) (.*)", text)  # "Tuple should have at least 1 item after validation, …"
    return f"{match[1]} {match[2].split(' after validation')[0]}" if match else f"be as it says: {text}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
