"""mole/experts/card.schema.json, for other tools, gives the same verdict on a card as mole's own check."""

import copy
import json
from pathlib import Path

import pytest
from test_card import CASES, good, sealed  # noqa: F401

import mole
from mole.experts.schema import FIELDS

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

SCHEMA = json.loads((Path(mole.__file__).parent / "experts" / "card.schema.json").read_text(encoding="utf-8"))
# What no schema of this kind can say: a number's spelling, half a character, the future, relations between fields.
BEYOND = {
    ("format", 1.0),
    ("adapter.parameters", 2.0),
    ("created", "2999-01-01T00:00:00Z"),
    ("description", "\ud800"),
    ("parent", "d" * 64),
    ("parent", None),
}


def is_valid(card):
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(card)


def changed(card, field, value):
    card = copy.deepcopy(card)
    *parents, last = field.split(".")
    node = card
    for parent in parents:
        node = node[parent]
    node[last] = value
    return card


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["properties"]) == set(FIELDS)
    assert SCHEMA["required"] == list(FIELDS)


def test_good_cards_are_valid(good, make):  # noqa: F811
    assert is_valid(json.loads(sealed(good)))
    assert is_valid(json.loads(make().card.to_bytes()))
    nothing = changed(changed(good, "history", []), "parent", None)
    assert is_valid(json.loads(sealed(nothing)))


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{field}={value!r:.30}" for field, value in CASES])
def test_a_bad_card_is_bad_for_both(good, field, value):  # noqa: F811
    card = json.loads(sealed(changed(good, field, value)))
    twice = field == "history" and len(value) == 2
    beyond = twice or any(field == f and value == v and type(value) is type(v) for f, v in BEYOND)
    size = field == "files" and isinstance(value, dict) and any(r.get("size") == 1.0 for r in value.values())
    assert is_valid(card) == (beyond or (size and type(value["adapter_config.json"]["size"]) is float))


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_missing_field_is_bad_for_both(good, field):  # noqa: F811
    card = json.loads(sealed(good))
    del card[field]
    assert not is_valid(card)


def test_an_unknown_field_and_a_newer_format_are_bad_for_both(good):  # noqa: F811
    assert not is_valid(json.loads(sealed({**good, "_target_": "x"})))
    assert not is_valid(json.loads(sealed({**good, "format": 2})))


CAPS = {
    "tasks": (["a"], 64),
    "tags": (["a"], 64),
    "description": ("a", 4000),
    "message": ("a", 500),
    "author": ("a", 100),
    "license": ("a", 64),
    "data": ([{"name": "x", "split": None, "examples": None, "sha256": None}], 64),
    "derived_from": (
        [{"relation": "merged", "source": None, "name": None, "revision": None, "content": None}],
        256,
    ),
    "scores": (
        [
            {
                "metric": "a",
                "value": 1,
                "task": None,
                "dataset": None,
                "split": None,
                "examples": None,
                "higher_is_better": True,
                "config": None,
            }
        ],
        200,
    ),
}


@pytest.mark.parametrize("field", CAPS)
def test_a_cap_is_the_same_for_both(good, field):  # noqa: F811
    from mole.experts import Damaged
    from mole.experts.card import parse_card

    value, most = CAPS[field]
    full = sealed(changed(good, field, value * most))
    assert is_valid(json.loads(full))
    parse_card(full, "x")
    over = sealed(changed(good, field, value * (most + 1)))
    assert not is_valid(json.loads(over))
    with pytest.raises(Damaged, match=field):
        parse_card(over, "x")
