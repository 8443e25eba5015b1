"""Configurations: what validates, how what does not is said, seeds, secrets, and the file they are kept in."""

import dataclasses
import itertools
import re
import shlex
from typing import Annotated, Literal

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import Field
from toy_command import Toy

from mole import secrets
from mole.config import engine, paths, yaml_files
from mole.config import saved as saved_config
from mole.config.checks import ConfigProblems, dump, validate
from mole.config.nodes import chosen_datasets
from mole.config.overrides import fill_operands, is_override, quote, rewrite
from mole.config.seeds import seed_for
from mole.registry import config_dataclass

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a first example imports
NODE = {
    "flavour": {"name": "sweet", "sugar": 2, "layers": ["a", "b"]},
    "topping": {"name": "cream"},
    "launcher": {"name": "auto", "num_processes": None},
    "training": {"max_steps": 3, "learning_rate": 1},
    "run": {"folder": "x"},
}


def lines(node, **options) -> list[str]:
    with pytest.raises(ConfigProblems) as caught:
        validate(Toy, node, **options)
    return caught.value.lines


def test_validating_what_was_dumped_gives_the_same():
    config = validate(Toy, NODE)
    assert config.flavour.layers == ("a", "b")
    assert config.training.learning_rate == 1.0
    assert validate(Toy, dump(config)) == config


def test_a_validated_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        validate(Toy, NODE).seed = 3


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": "3"}, 'seed: must be a whole number, got "3"'),
        ({"seed": True}, "seed: must be a whole number, got true"),
        ({"seed": 1.0}, "seed: must be a whole number, got 1.0"),
        ({"seed": None}, "seed: must be a whole number, got null"),
        ({"training": {"max_steps": 0}}, "training.max_steps: must be greater than or equal to 1, got 0"),
        ({"training": 3}, "training: must be a mapping of names to values, got 3"),
        ({"run": {}}, "run.folder: required; give it with run.folder=…"),
        ({"run": {"folder": "x", "resume": "yes"}}, 'run.resume: must be never or auto, got "yes"'),
        ({"flavour": {"name": "salty"}}, "flavour.name: unknown 'salty' (known: sour, sweet)"),
        (
            {"flavour": {"name": "swet"}},
            "flavour.name: unknown 'swet'; did you mean flavour=sweet? (known: sour, sweet)",
        ),
        ({"flavour": {}}, "flavour: must be one of the options of its group, got {}; choose with flavour=<option>"),
        ({"toppings": {"c": {"name": "cream", "x": 1}}}, "toppings.c.x: unknown key (known: name)"),
        ({"eggs": 1}, "eggs: unknown key (known: flavour, topping, launcher, training, run)"),
        ({"flavour": {"name": "sweet", "layers": [1]}}, "flavour.layers.0: must be text, got 1"),
    ],
)
def test_each_problem_is_one_line(change, line):
    assert line in lines({**NODE, **change}, options={"flavour": ["sour", "sweet"]})


def test_open_choices_name_the_options_and_two_unknown_keys_are_not_taken_for_each_other():
    node = {**NODE, "flavour": {"name": "sweet", "sugr": 1, "sugarr": 2, "sugar": 1}}
    del node["topping"], node["launcher"]
    found = lines(node, options={"topping": ["cream"], "launcher": ["auto"]}, required=["topping"])
    assert "topping: not chosen; choose one: topping=cream" in found
    assert "launcher: not chosen; choose one: launcher=auto" in found
    assert sum("did you mean flavour.sugar?" in line for line in found) == 2
    assert len(found) == 4


def test_a_problem_is_that_of_its_field_where_the_variant_is_called_like_another_one():
    @config_dataclass
    class Rank:
        name: Literal["rank"] = "rank"
        rank: Annotated[int, Field(gt=0)] = 1
        tau: Annotated[float, Field(gt=0)] = 1.0

    @config_dataclass
    class Off:
        name: Literal["off"] = "off"

    @config_dataclass
    class Whole:
        method: Annotated[Rank | Off, Field(discriminator="name")]

    with pytest.raises(ConfigProblems) as caught:
        validate(Whole, {"method": {"name": "rank", "rank": 0, "tau": -1}})
    assert caught.value.lines == [
        "method.rank: must be greater than 0, got 0",
        "method.tau: must be greater than 0, got -1",
    ]


def test_lines_of_a_rule_across_fields_are_problems_of_their_own():
    @config_dataclass
    class Both:
        a: int = 1
        b: Literal["x", "y"] = "x"

        def __post_init__(self):
            raise ValueError("a=1 with b=x: lower a\nb: nothing fits")

    with pytest.raises(ConfigProblems) as caught:
        validate(Both, {})
    assert caught.value.lines == ["a=1 with b=x: lower a", "b: nothing fits"]


def test_lengths_are_told_in_plain_words():
    @config_dataclass
    class Whole:
        text: Annotated[str, Field(min_length=1)] = "a"
        items: Annotated[tuple[int, ...], Field(min_length=2)] = (1, 2)

    with pytest.raises(ConfigProblems) as caught:
        validate(Whole, {"text": "", "items": [1]})
    assert caught.value.lines == [
        'text: must have at least 1 character, got ""',
        "items: must have at least 2 items, got [1]",
    ]


def test_what_is_missing_comes_with_its_comment_and_text_with_the_way_to_write_it():
    assert "run.folder: required (of key); give it with run.folder=…" in lines(
        {**NODE, "run": {}}, comment=lambda key: "of key"
    )
    assert lines({**NODE, "name": 5}) == ["name: must be text, got 5; as text it is written \"name='5'\""]


def test_where_a_value_came_from_stands_behind_its_problem():
    assert lines({**NODE, "seed": "a"}, where=lambda key: f"file-of-{key}:3")[0].endswith("file-of-seed:3")


def test_datasets_are_one_or_several_but_not_both_and_not_none():
    @config_dataclass
    class One:
        name: str = "one"
        task: str | None = None

    @config_dataclass
    class Command:
        dataset: One | None = None
        datasets: Annotated[dict[str, One], Field(default_factory=dict)]

    one = One()
    assert chosen_datasets(Command(dataset=one)) == {"one": one}
    assert list(chosen_datasets(Command(dataset=One(task="sums")))) == ["sums"]
    assert chosen_datasets(Command(datasets={"a": one})) == {"a": one}
    with pytest.raises(ValueError, match="dataset: not chosen"):
        chosen_datasets(Command())
    with pytest.raises(ValueError, match="both given"):
        chosen_datasets(Command(dataset=one, datasets={"a": one}))


def test_seeds_of_streams_are_stable_and_apart():
    assert seed_for("init", 0) == 3331324963320473606
    found = [seed_for(*of) for of in itertools.product(("init", "data"), range(4), range(4))]
    assert len(set(found)) == len(found)
    assert all(0 <= seed < 2**63 for seed in found)


# Secrets


@pytest.mark.parametrize(
    ("key", "is_secret"),
    [
        ("token", True),
        ("hub_token", True),
        ("api-key", True),
        ("password", True),
        ("connection_string", True),
        ("max_new_tokens", False),
        ("tokens", False),
        ("tokenizer", False),
        ("key", False),
    ],
)
def test_keys_that_look_like_secrets(key, is_secret):
    assert secrets.looks_secret(key) is is_secret
    assert bool(list(secrets.problems({"a": [{key: "abcdefgh"}]}))) is is_secret
    assert not list(secrets.problems({key: None}))


@pytest.mark.parametrize(
    ("value", "is_refused"),
    [
        ("${oc.env:HF_TOKEN}", True),
        ("x-${oc.env:AWS_SECRET_ACCESS_KEY,none}", True),
        ("${oc.env:HOME}", False),
        ("https://me:pw@host/x", True),
        ("https://host/x?X-Amz-Signature=1", True),
        ("https://host/x?sig=abc&se=2", True),
        ("s3://bucket/key?version=3", False),
        ("say: //token//", False),
    ],
)
def test_values_that_hold_or_read_secrets(value, is_refused):
    found = list(secrets.problems({"url": value}))
    assert bool(found) is is_refused
    assert not any("pw" in line or "abc" in line for line in found)


def test_the_value_of_a_known_secret_is_refused_wherever_it_stands():
    environment = {"HF_TOKEN": "hf_abcdefgh", "SHORT_TOKEN": "adamw1", "PATH": "outputs/x"}
    node = {"description": "made with hf_abcdefgh", "tags": ["adamw1"], "name": "adamw1.2", "folder": "outputs/x"}
    found = list(secrets.problems(node, environment))
    assert [line.partition(":")[0] for line in found] == ["description", "tags.0"]
    assert "$HF_TOKEN" in found[0]
    assert "hf_abcdefgh" not in found[0]


def test_known_secrets_are_blotted_out_the_longest_first():
    environment = {
        "A_TOKEN": "abcdef",
        "B_TOKEN": "abcdefgh",
        "SHORT_TOKEN": "abc",
        "PATH": "abcdefghij",
        "MY_KEY": "xyzxyz",
    }
    assert secrets.scrub(["abcdefgh abcdef abc xyzxyz", 3], environment) == ["<$B_TOKEN> <$A_TOKEN> abc <$MY_KEY>", 3]


# The file


@UNHURRIED
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=12),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_what_is_written_reads_back_equal(value):
    text = yaml.dump({"key": value}, Dumper=saved_config._Dumper, sort_keys=False, allow_unicode=True)
    assert yaml.load(text, Loader=saved_config._Loader) == {"key": value}


@pytest.mark.parametrize(
    "text", ["1e-4", "1.0", "yes", "on", "010", "3:25:45", "null", "~", "${x}", "", "a: b", "# no"]
)
def test_text_that_looks_like_something_else_stays_text(text, tmp_path):
    saved_config.write(tmp_path / "c.yaml", {"key": text})
    assert saved_config.read(tmp_path / "c.yaml") == {"key": text}
    loaded = OmegaConf.to_container(OmegaConf.load(tmp_path / "c.yaml"), resolve=False)
    assert loaded == {"key": text}


def test_a_number_in_a_file_edited_by_hand_is_a_number(tmp_path):
    (tmp_path / "c.yaml").write_text("rate: 1e-4\n")
    assert saved_config.read(tmp_path / "c.yaml") == {"rate": 1e-4}


def test_a_damaged_file_is_named(tmp_path):
    for text in ("a: [", "just text"):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"c\.yaml"):
            saved_config.read(tmp_path / "c.yaml")


def test_paths_become_absolute_whether_or_not_they_exist_and_nothing_else_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/one", "gpt2", "and/or"):
        (tmp_path / folder).mkdir(parents=True)
    node = {
        "library": {"name": "local", "url": "./lib"},
        "datasets": {
            "a": {"name": "jsonl", "path": "a.jsonl", "validation": 0.1, "test": "data/test.jsonl"},
            "b": {"name": "hub", "path": "owner/data", "validation": "validation"},
        },
        "dataset": {"name": "hub", "path": "./data"},
        "backbone": {"path": "models/one"},
        "experts": {"a": "runs/a", "b": "hf://me/lib/b", "c": "${HOME}/c"},
        "model": "r3",
        "start_library": "~nobody-of-this-name/x",
        "description": "and/or",
        "prompt": ".",
        "run": {"folder": "r"},
    }
    here = str(tmp_path)
    assert paths.absolute(node) == {
        **node,
        "library": {"name": "local", "url": f"{here}/lib"},
        "datasets": {
            "a": {"name": "jsonl", "path": f"{here}/a.jsonl", "validation": 0.1, "test": f"{here}/data/test.jsonl"},
            "b": node["datasets"]["b"],
        },
        "dataset": {"name": "hub", "path": f"{here}/data"},
        "backbone": {"path": f"{here}/models/one"},
        "experts": {**node["experts"], "a": f"{here}/runs/a"},
        "model": f"{here}/r3",
        "run": {"folder": f"{here}/r"},
    }
    for id_of_the_hub in ("gpt2", "owner/model"):
        assert paths.absolute({"backbone": {"path": id_of_the_hub}}) == {"backbone": {"path": id_of_the_hub}}


def test_every_path_of_the_table_is_a_key_of_conf():
    found = set()
    for file in yaml_files.conf_dir().rglob("*.yaml"):
        group = "" if file.parent == yaml_files.conf_dir() else f"{file.parent.name}."
        found |= {group + key for key in yaml_files.entries(file)}
    single = {key.replace("datasets.*", "dataset").removesuffix(".*") for key in (*paths.PATHS, *paths.PATHS_OR_IDS)}
    assert single <= found


def test_a_relative_path_and_its_place_are_no_difference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, new = {"library": {"url": "./lib"}, "seed": 1}, {"library": {"url": f"{tmp_path}/lib"}, "seed": 1}
    assert saved_config.differences(old, new) == []
    assert saved_config.differences(old, {**new, "library": {"url": "./other"}}) == ["library.url"]


def test_differences_are_the_keys_that_may_not_change():
    old = {"training": {"max_steps": 1, "learning_rate": 1.0}, "seed": 0, "run": {"folder": "a"}, "d": {"x": {}}}
    new = {
        "training": {"max_steps": 2, "learning_rate": 2.0},
        "run": {"folder": "b"},
        "launcher": {"n": 1},
        "d": {"x": {}},
    }
    assert saved_config.differences(old, new) == ["training.learning_rate", "seed"]


# Words


class Tree:
    """A small configuration tree."""

    def groups(self, overrides=()):
        return {"adapter": "lora", "dataset": None, "library": None, "backbone": "tiny"}

    def options(self, group):
        return {
            "adapter": ["ia3", "lora"],
            "dataset": ["glue_rte", "jsonl", "reverse"],
            "library": ["azure", "hub", "local", "s3"],
            "backbone": ["pretrained", "tiny"],
            "merge": ["uniform"],
            "hydra/launcher": ["basic"],
        }.get(group, [])

    def takes_several(self, group):
        return group == "dataset"

    def open_keys(self, overrides=()):
        return {"losses"}

    def remark(self, group, option):
        return "a preset for build-moe, not for train-expert" if option == "mhr" else ""


@pytest.mark.parametrize(
    ("word", "rewritten"),
    [
        ("adapter=null", ["~adapter"]),
        ("dataset=null", []),
        ("dataset=glue/rte", ["dataset=glue_rte"]),
        ("dataset=[jsonl,glue/rte]", ["+dataset@datasets.jsonl=jsonl", "+dataset@datasets.glue_rte=glue_rte"]),
        ("merge=./mine", ["merge={_value_: './mine'}"]),  # no group of this command, but one of another
        ("library=./mine", ["library=local", "library.url='./mine'"]),
        ("library=hf://me/lib", ["library=hub", "library.url='hf://me/lib'"]),
        ("library=s3://bucket/lib", ["library=s3", "library.url='s3://bucket/lib'"]),
        ("library=az://account/container", ["library=azure", "library.url='az://account/container'"]),
        ("library=file:///lib", ["library=local", "library.url='file:///lib'"]),
        ("backbone=owner/model", ["backbone=pretrained", "backbone.path='owner/model'"]),
        ("adapter.rank=3", ["adapter.rank=3"]),
        ("+new=1", ["+new=1"]),
        ("losses={z: 1}", ["++losses={z: 1}"]),
        ("losses.z=1", ["++losses.z=1"]),
        ("losses_over=1", ["losses_over=1"]),
        ("~adapter", ["~adapter"]),
        ("name=a#b", ["name='a#b'"]),
        ("prompt=Hi, you", ["prompt='Hi, you'"]),
        ('prompt=it\'s, "so"', ["prompt='it\\'s, \"so\"'"]),
        ("prompt='a', 'b'", ["prompt='\\'a\\', \\'b\\''"]),
        ("prompt=5", ["prompt='5'"]),
        ("expect=12345678", ["expect='12345678'"]),
        ("backbone.revision=1234567e8", ["backbone.revision='1234567e8'"]),
        ("message=[a] {b}: c", ["message='[a] {b}: c'"]),
        ("prompt='Hi, you'", ["prompt='Hi, you'"]),
        ("description=null", ["description=null"]),
        ("hydra/launcher=basic", ["hydra/launcher=basic"]),
    ],
)
def test_words_become_overrides(word, rewritten):
    assert rewrite([word], Tree()) == rewritten


def test_sweeps_pass_with_a_sweep_only():
    assert rewrite(["adapter=lora,ia3", "seed=range(1,3)"], Tree(), sweep=True) == [
        "adapter=lora,ia3",
        "seed=range(1,3)",
    ]
    with pytest.raises(ValueError, match="a comma makes a sweep"):
        rewrite(["adapter=lora,ia3"], Tree())
    with pytest.raises(ValueError, match="no such option"):
        rewrite(["adapter=lora,ia4"], Tree(), sweep=True)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (
            "hydra/launcher=joblib",
            "hydra/launcher=joblib: no such option; another package brings it: pip install 'mole-",
        ),
        ("hydra/launcher=basik", "did you mean hydra/launcher=basic?"),
        ("hydra.run.dir=x", "hydra.run.dir cannot act; give run.folder=…"),
        ("adapter=mhr", "adapter=mhr: a preset for build-moe, not for train-expert"),
        ("backbone=gpt2x", "a Hub id without an owner backbone=pretrained backbone.path=gpt2x"),
    ],
)
def test_a_refused_word_says_what_to_do(word, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        rewrite([word], Tree())


@pytest.mark.parametrize("value", ["1,2", "it's, $5", 'say "a", `b`!', "back\\slash, 'quoted'"])
def test_the_hint_on_commas_works_as_it_is_typed(value):
    with pytest.raises(ValueError, match="a comma makes") as caught:
        rewrite([f"name={value}"], Tree())
    typed = shlex.split(str(caught.value).rpartition("quote the value twice: ")[2])
    assert len(typed) == 1
    assert rewrite(typed, Tree()) == typed
    parsed = OverridesParser.create().parse_override(typed[0]).value()
    assert getattr(parsed, "text", parsed) == value


@pytest.mark.parametrize(
    "word", ["adapter=[lora,ia3]", "dataset=[]", "dataset=[jsonl,jsonl]", "adapter={a:1}", "=3", "a b"]
)
def test_words_without_a_meaning_are_refused(word):
    with pytest.raises(ValueError, match=r"adapter|dataset|key=value|key"):
        rewrite([word], Tree())


def test_operands_are_the_words_that_set_nothing():
    assert [is_override(w) for w in ("a=1", "+a.b=1", "~a", "~a=1", "a@b.c=d")] == [True] * 5
    assert [is_override(w) for w in ("~/a", "./a=b", "outputs/run", "a", "ünder")] == [False] * 5
    assert fill_operands(["lib", "x=1", "it's"], ("library", "name"), "c") == ["library='lib'", "x=1", "name='it\\'s'"]
    assert fill_operands(["lib", "a", "b"], ("library", "names…"), "c") == ["library='lib'", "names=['a','b']"]
    with pytest.raises(ValueError, match="takes no operand"):
        fill_operands(["a"], (), "c")


@UNHURRIED
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(lambda t: "${" not in t))
def test_quoted_text_comes_through_the_grammar_as_it_is(text):
    parsed = OverridesParser.create().parse_override(f"key={quote(text)}")
    assert getattr(parsed.value(), "text", parsed.value()).replace("\\\\", "\\") == text.replace("\\\\", "\\")


# Comments


def test_comments_belong_to_their_keys(tmp_path):
    (tmp_path / "f.yaml").write_text(
        "# A sentence.\n"
        "defaults:\n"
        "  - adapter: lora\n"
        "  - dataset: null  # required: one\n"
        "plain: 3    # a number\n"
        'text: "a # b"  # a text\n'
        "# above\n"
        "long: [1,\n"
        "  2]  # a list\n"
        "deep:       # a mapping\n"
        "  inner: x  # first line\n"
        "            # second line\n"
        "flow: {a: 1}  # flow\n"
        "none: null\n"
    )
    found = yaml_files.entries(tmp_path / "f.yaml")
    assert {key: entry.comment for key, entry in found.items()} == {
        "plain": "a number",
        "text": "a text",
        "long": "a list",
        "deep": "a mapping",
        "deep.inner": "first line second line",
        "flow": "flow",
        "flow.a": "flow",
        "none": "",
    }
    assert found["text"].value == '"a # b"'
    assert found["flow.a"].line == 13
    assert not found["deep"].is_leaf
    assert yaml_files.sentence(tmp_path / "f.yaml") == "A sentence."
    assert yaml_files.defaults(tmp_path / "f.yaml") == {"adapter": "", "dataset": "required: one"}


def test_an_interpolation_of_something_missing_reports_what_is_missing():
    node = engine.plain(OmegaConf.create({"name": "???", "run": {"folder": "out-${name}"}, "list": ["${run.folder}"]}))
    assert "name" not in node
    assert node["run"]["folder"] == "out-${name}"
    with pytest.raises(ValueError, match="nothing"):
        engine.plain(OmegaConf.create({"a": "${nothing}"}))


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["router=top_k", "losses={load_balance: 0.01}"], "losses", {"load_balance": 0.01}),
        (["losses.z_loss=0.1"], "losses", {"z_loss": 0.1}),
        (["router=poly", "router.init_task={rte: mine}"], "router.init_task", {"rte": "mine"}),
    ],
)
def test_open_mappings_of_a_real_command_take_names_on_the_line(words, key, value):
    node = engine.compose("build-moe", words)
    for part in key.split("."):
        node = node[part]
    assert node == value


def test_engines_can_be_used_inside_each_other():
    with engine.engine("doctor") as outer:
        with engine.engine("config-ls") as inner:
            assert inner.compose().format == "table"
            assert "group" in inner.compose()
        assert "places" in outer.compose()
