import copy
import json
from dataclasses import fields
from random import Random

import pytest

from mole.experts import BackboneRef, Card, Damaged, LibraryError, check_backbone, make_card
from mole.experts.card import _plainly_sound, digest_of, new_card, parse_card
from mole.experts.schema import FIELDS
from mole.untrusted import strict_json

HISTORY = [{"revision": "a" * 64, "content": "b" * 64, "created": "2026-01-30T09:00:00Z", "message": "first"}]
FILE = {"size": 3, "sha256": "c" * 64}
FILES = {"adapter_config.json": FILE, "adapter_model.safetensors": FILE}


def sealed(card):
    """A card's bytes with digests that fit, so that only what is wrong in a field is wrong."""
    card = {**card, "content": digest_of(card.get("files"))}
    card.pop("revision", None)
    return json.dumps({**card, "revision": digest_of(card)}).encode()


@pytest.fixture
def good(expert):
    data = expert.card.to_dict()
    data |= {"tags": ["glue"], "license": "apache-2.0", "author": "A", "history": HISTORY, "parent": "a" * 64}
    data |= {"head": {"type": "classification", "labels": ["yes", "no"]}, "extra": {"mine": 1}, "message": "more"}
    data["data"] = [{"name": "glue/mrpc", "split": "train", "examples": 3, "sha256": None}]
    data["derived_from"] = [
        {"relation": "continued", "source": None, "name": "x", "revision": "a" * 64, "content": None}
    ]
    return json.loads(json.dumps(data))


def test_a_card_survives_its_file(expert, good):
    assert parse_card(expert.card.to_bytes(), "x") == expert.card
    assert parse_card(parse_card(sealed(good), "x").to_bytes(), "x") == parse_card(sealed(good), "x")


def test_digests_do_not_depend_on_the_order_of_keys(good):
    other = dict(reversed(list(good.items())))
    assert parse_card(sealed(good), "x").revision == parse_card(sealed(other), "x").revision


def test_the_schema_and_the_dataclass_have_the_same_fields():
    assert set(FIELDS) == {field.name for field in fields(Card)}


def test_a_new_tag_changes_the_revision_and_not_the_content(expert):
    edited = expert.card.edited(tags=["new"])
    assert edited.content == expert.card.content
    assert edited.revision != expert.card.revision


def test_the_next_revision_names_its_parent_and_lists_the_chain_newest_first(expert):
    second = expert.card.edited(tags=["two"]).next_after(expert.card, "second")
    third = expert.card.edited(tags=["three"]).next_after(second, "third")
    assert third.parent == second.revision
    assert [row["revision"] for row in third.history] == [second.revision, expert.card.revision]
    assert third.history[0]["message"] == "second"
    assert parse_card(third.to_bytes(), "x") == third


def test_history_keeps_the_newest_hundred(expert):
    card = expert.card
    for number in range(103):
        card = card.edited(tags=[f"t{number}"]).next_after(card, "")
    assert len(card.history) == 100


TWICE = {
    "at the front": lambda text: text.replace("{", '{"author": "B", ', 1),
    "with a colon in it": lambda text: text.replace("{", '{"author": "a:b", ', 1),
    "escaped": lambda text: text.replace("{", '{"\\u0061uthor": "B", ', 1),
    "its colons escaped": lambda text: text.replace("{", '{"author": "\\u003a", ', 1),
    "with spaces": lambda text: text.replace("{", '{"author"\n\t : "B", ', 1),
    "inside": lambda text: text.replace('"tasks": [', '"producer": {"mole": "1", "mole": "2"}, "tasks": ['),
    "an object": lambda text: text.replace("{", '{"files": {"a": {"b": 1}}, ', 1),
    "the revision": lambda text: text.replace("{", '{"revision": "x", ', 1),
    "the content": lambda text: text.replace("{", '{"content": null, ', 1),
}


@pytest.mark.parametrize("how", TWICE)
def test_a_key_that_stands_twice_is_damage_also_where_the_digests_fit(good, how):
    data = TWICE[how](sealed(good).decode()).encode()
    assert json.loads(data).keys() == json.loads(sealed(good)).keys()
    with pytest.raises(Damaged, match="twice"):
        parse_card(data, "x")


HARMLESS = {
    "colons in texts": {"description": "a: b: c", "training": {"note": "an x:y"}, "tasks": [":", "a:"]},
    "escapes": {"description": 'says "\\:"', "author": "\u00e9"},
    "large numbers": {"training": {"tokens": 2**63 - 1, "least": -(2**63), "rate": 1e-300}},
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_a_card_may_hold_is_read_however_its_text_is_spelled(good, what):
    card = json.loads(sealed({**good, **HARMLESS[what]}))
    spellings = [json.dumps(card, ensure_ascii=ascii, indent=indent) for ascii in (True, False) for indent in (None, 1)]
    for text in spellings:
        assert parse_card(text.encode(), "x").to_dict() == card


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**400, float("inf"), float("nan")])
def test_a_number_beyond_64_bits_is_damage(good, value):
    text = sealed({**good, "training": {"steps": 12345}}).decode().replace("12345", str(value).replace("inf", "1e999"))
    with pytest.raises(Damaged, match="not valid JSON"):
        parse_card(text.encode(), "x")


def test_a_look_that_is_quick_takes_nothing_that_a_close_one_refuses(good):
    """Bytes of a card changed at random: where the quick look is content, so is the strict parser."""
    random, data = Random(0), sealed({**good, "description": "a:b"})
    assert _plainly_sound(data) is not None
    kept = 0
    for _ in range(3000):
        place, new = random.randrange(len(data)), random.choice([b"", b":", b" ", b'"', b",", b"0", b"{", b"\\", b"a"])
        changed = data[:place] + new + data[place + random.randrange(2) :]
        found = _plainly_sound(changed)
        if found is not None:
            kept += 1
            assert strict_json(changed, "x") == found == json.loads(data)
    assert kept


WRONG = {
    "format": [0, 2, "1", None, 1.0, True],
    "kind": ["router", None, "mixture"],
    "adapter": [None, [], {"method": "lora"}],
    "adapter.method": ["", "LoRA", "a/b", 3],
    "adapter.rank": [-1, 1.5, "2", True],
    "adapter.alpha": ["x", True],
    "adapter.targets": [["a b"], "q", [3]],
    "adapter.parameters": [-1, None, 2.0],
    "adapter.dtype": ["int8", None],
    "backbone": [None, {"name": "x"}],
    "backbone.name": ["", "/home/me/model", "~/model", "C:\\x", "../x", "a" * 201, 3],
    "backbone.revision": ["main", "XYZ"],
    "backbone.shapes": ["ab", 3],
    "head": [{"type": "oracle", "labels": []}, {"type": "regression"}],
    "tasks": ["sums", [""], ["a" * 101], ["a"] * 65, [None], ["a\nb"], ["a\x1b[0m"], ["\u202egpj"]],
    "tags": [["Upper"], ["two words"], ["-x"]],
    "description": ["a" * 4001, "line\nbreak", "\x00", None, "\ud800"],
    "license": ["a b", "<script>", ""],
    "author": ["", "a" * 101],
    "data": [[{}], [{"name": "/data/x", "split": None, "examples": None, "sha256": None}]],
    "training": [{"path": "/home/me/run"}, {"a b": 1}, {"a": [1]}, {"a": None}, {f"k{n}": 1 for n in range(65)}],
    "scores": [[{"metric": "accuracy"}], ["x"]],
    "created": ["yesterday", "2026-01-31", "2999-01-01T00:00:00Z", "2026-13-01T00:00:00Z", 3, "2026-1-31T12:00:00Z"],
    "producer": [{"mole": 1}, []],
    "message": ["a" * 501],
    "parent": ["d" * 64, None, "x"],
    "derived_from": [
        [{"relation": "stolen", "source": None, "name": None, "revision": None, "content": None}],
        [{"relation": "merged", "source": "/tmp/x", "name": None, "revision": None, "content": None}],
    ],
    "history": [HISTORY * 2, HISTORY * 101, [{**HISTORY[0], "x": 1}]],
    "extra": [{"a": {"b": 1}}, {"_x.y/z": 1}, {f"k{n}": 1 for n in range(33)}],
    "files": [
        {},
        {"adapter_config.json": FILE},
        {**FILES, "../x.json": FILE},
        {**FILES, "/abs.json": FILE},
        {**FILES, "a\\b.json": FILE},
        {**FILES, "expert.json": FILE},
        {**FILES, "README.md": FILE},
        {**FILES, "Adapter_config.json": FILE},
        {**FILES, "mole_adapter.json": FILE},
        {**FILES, "evil.py": FILE},
        {**FILES, "adapter_config.json": {**FILE, "size": -1}},
        {**FILES, "adapter_config.json": {**FILE, "size": 1.0}},
        {**FILES, "adapter_config.json": {"size": 1}},
        {**FILES, "adapter_config.json": {**FILE, "sha256": "x"}},
    ],
}
CASES = [(field, value) for field, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{field}={value!r:.30}" for field, value in CASES])
def test_a_field_that_holds_what_it_may_not_is_damage_that_names_the_field(good, field, value):
    card = copy.deepcopy(good)
    *parents, last = field.split(".")
    node = card
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(Damaged, match=rf"^lib/mrpc: ({field.split('.')[0]}|adapter|files|parent)") as caught:
        parse_card(sealed(card), "lib/mrpc")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("field", sorted(set(FIELDS) - {"content", "revision"}))
def test_a_missing_field_is_named(good, field):
    del good[field]
    with pytest.raises(Damaged, match=field):
        parse_card(sealed(good), "x")


@pytest.mark.parametrize("key", ["surprise", "_target_", "__class__"])
def test_an_unknown_field_is_named(good, key):
    with pytest.raises(Damaged, match=f"{key}: unknown field"):
        parse_card(sealed({**good, key: "builtins.eval"}), "x")


def test_a_card_of_a_newer_format_says_so(good):
    with pytest.raises(Damaged, match="needs a newer mole"):
        parse_card(sealed({**good, "format": 2}), "x")


@pytest.mark.parametrize("field", ["content", "revision"])
def test_a_wrong_digest_is_damage(good, field):
    data = json.loads(sealed(good))
    data[field] = "0" * 64
    with pytest.raises(Damaged, match=f"{field} is not the digest"):
        parse_card(json.dumps(data).encode(), "x")


def test_a_card_changed_by_hand_is_damage(expert):
    data = expert.card.to_bytes().replace(b'"sums"', b'"sunk"')
    with pytest.raises(Damaged, match="was changed"):
        parse_card(data, "x")


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"\xef\xbb\xbf{}", b'{"format": NaN}', b'{"a":1,"a":2}', b'{"removed": true}', b" " * (300 << 10)],
)
def test_what_is_no_card_at_all_is_damage(data):
    with pytest.raises(Damaged, match="^x: "):
        parse_card(data, "x")


def test_an_interpolation_in_a_card_is_only_text(good, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    good["description"] = "${oc.env:HF_TOKEN}"
    card = parse_card(sealed(good), "x")
    assert card.description == "${oc.env:HF_TOKEN}"
    assert b"hf_secret" not in card.to_bytes()


def test_the_maker_of_a_card_is_told_which_fact_is_wrong():
    with pytest.raises(LibraryError, match=r"card: tags\[0\]: must be a tag"):
        new_card(FILES, BackboneRef("m"), kind="mixture", tags=["Not One"])
    with pytest.raises(LibraryError, match="unknown fact of a card 'tsks'; did you mean tasks"):
        new_card(FILES, BackboneRef("m"), tsks=["a"])
    with pytest.raises(LibraryError, match="card:"):
        new_card(FILES, BackboneRef("m"), training={"a": float("nan")})


def test_a_mixtures_card_lists_the_mixtures_files(tmp_path):
    for name in ("mixture.json", "router.safetensors", "expert-000.json", "expert-000.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    card = make_card(tmp_path, BackboneRef("m"), kind="mixture", tasks=["a", "b"])
    assert parse_card(card.to_bytes(), "x") == card
    assert set(card.files) == {path.name for path in tmp_path.iterdir()}
    (tmp_path / "evil.json").write_bytes(b"{}")
    with pytest.raises(LibraryError, match=r"evil\.json.*does not belong"):
        make_card(tmp_path, BackboneRef("m"), kind="mixture")


class TestBackbone:
    def test_the_same_backbone_passes(self, expert):
        check_backbone(expert.card, "user/tiny-llama", "ab" * 32)
        check_backbone(expert.card, "user/tiny-llama", None)

    def test_another_backbone_is_an_error_that_shows_both(self, expert):
        with pytest.raises(LibraryError, match=r"'user/tiny-llama' \(shapes abababab\), this one is 'other'"):
            check_backbone(expert.card, "other", "ab" * 32)

    def test_another_name_can_be_allowed_and_other_shapes_cannot(self, expert):
        check_backbone(expert.card, "other", "ab" * 32, allow_other_backbone=True)
        for name in ("other", "user/tiny-llama"):
            with pytest.raises(LibraryError, match="other shapes"):
                check_backbone(expert.card, name, "cd" * 32, allow_other_backbone=True)
