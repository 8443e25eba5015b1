"""Records with labels: columns, label sets, splits, task files, and the row in every error."""

import json

import pytest
from pydantic import ValidationError

from mole.data import head_of
from mole.data.classification import ClassificationConfig
from mole.data.classification_hub import ClassificationHubConfig
from mole.head import Head

ALL = {"name": "classification", "validation": None, "test": None}


def rows(*labels, **more):
    return [{"text": f"text {number}", "label": label, **more} for number, label in enumerate(labels)]


def found(split):
    return [(sample.prompt, sample.target) for sample in split]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"text_a": "x", "text_b": "y"}, "x\ny"),
        ({"text_a": "x"}, "x"),
        ({"text_a": "x", "text_b": None}, "x"),
        ({"premise": "x", "hypothesis": "y"}, "x\ny"),
        ({"sentence": "x"}, "x"),
        ({"text": "x", "premise": "p", "hypothesis": "h"}, "p\nh"),
    ],
)
def test_the_columns_tell_the_text_or_the_pair(load, jsonl, record, prompt):
    data = load(path=jsonl([{**record, "label": "b"}, {"text": "z", "label": "a"}]), **ALL)
    assert found(data.train) == [(prompt, 1), ("z", 0)]


def test_columns_can_have_other_names(load, jsonl):
    path = jsonl([{"question": "x", "answer": "y", "class": label} for label in ("b", "a")])
    data = load(path=path, columns={"text_a": "question", "text_b": "answer", "label": "class"}, **ALL)
    assert found(data.train) == [("x\ny", 1), ("x\ny", 0)]
    with pytest.raises(ValueError, match=r"facts\.jsonl:1: unknown column 'label'.*dataset\.columns can name another"):
        load(path=path, **ALL)
    with pytest.raises(ValueError, match=r"facts\.jsonl:1: the keys .* of no known format .*text_a: question"):
        load(path=path, columns={"label": "class"}, **ALL)
    with pytest.raises(ValueError, match=r"facts\.jsonl:1: columns: unknown column 'clas'; did you mean class"):
        load(path=path, columns={"label": "clas"}, **ALL)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("no", "yes", "maybe", "no"), ("maybe", "no", "yes")),
        ((10, 9, 2, 10), ("2", "9", "10")),
        ((1.0, 0, 1, 0.5), ("0", "0.5", "1")),
        ((True, False, True, True), ("False", "True")),
    ],
)
def test_labels_are_sorted_by_the_alphabet_or_as_numbers(load, jsonl, labels, names):
    path = jsonl(rows(*labels))
    data = load(path=path, **ALL)
    assert data.head == Head("classification", names) == head_of({"x": ClassificationConfig(path=path)})
    assert [data.head.labels[sample.target] for sample in data.train] == [sample.completion for sample in data.train]
    assert data.metric == "accuracy"


def test_labels_can_be_given_in_an_order(load, jsonl):
    path = jsonl(rows("a", "b"))
    data = load(path=path, labels=["c", "b", "a"], metric="accuracy_macro_f1", **ALL)
    assert [sample.target for sample in data.train] == [2, 1]
    assert (data.head.labels, data.metric) == (("c", "b", "a"), "accuracy_macro_f1")
    assert [s.target for s in load(path=jsonl(rows(1, 1.0)), labels=[1, 0], **ALL).train] == [0, 0]


def test_an_unknown_label_is_refused_with_its_row(load, jsonl):
    with pytest.raises(ValueError, match=r"facts\.jsonl:2: unknown label 'neutrl'; did you mean neutral"):
        load(path=jsonl(rows("neutral", "neutrl")), labels=["neutral", "other"], **ALL)


def test_a_label_in_a_validation_file_alone_is_refused_with_its_row(load, jsonl):
    train, dev = jsonl(rows("a", "b")), jsonl(rows("b", "c"), "dev.jsonl")
    with pytest.raises(ValueError, match=r"dev\.jsonl:2: unknown label 'c'.*dataset\.labels"):
        load(**{**ALL, "path": train, "validation": dev})
    assert load(**{**ALL, "path": train, "validation": dev, "labels": ["a", "b", "c"]}).validation[1].target == 2


def test_a_label_that_only_held_out_rows_have_by_chance_is_refused_with_its_row(load, jsonl):
    path = jsonl(rows("a", "a", "a", "rare", "a", "b", "b", "b"))
    refused = 0
    for seed in range(12):
        try:
            data = load(**{**ALL, "path": path, "validation": 2, "seed": seed})
        except ValueError as error:
            refused += 1
            assert "facts.jsonl:4: the label 'rare' is in the validation split alone" in str(error)  # noqa: PT017
        else:
            assert "rare" in {sample.completion for sample in data.train}
    assert 0 < refused < 12


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "  ", "label": "a"}, "text is empty"),
        ({"text_a": "x", "text_b": "", "label": "a"}, "text_b is empty"),
        ({"premise": "x", "hypothesis": "", "label": "a"}, "hypothesis is empty"),
        ({"premise": "x", "label": "a"}, "hypothesis must be text, got null"),
        ({"text": "x", "label": None}, "label must be text, got null"),
        ({"text": "x", "label": ""}, "label is empty"),
        ({"text": "x"}, "unknown column 'label'"),
    ],
)
def test_what_lacks_something_is_refused_with_its_row(load, jsonl, record, message):
    with pytest.raises(ValueError, match=rf"facts\.jsonl:3: {message}"):
        load(path=jsonl([*rows("a", "b"), record]), **ALL)


def test_a_regression_has_numbers_and_no_labels(load, jsonl):
    path = jsonl(rows(1, 2.5, "3"))
    data = load(path=path, regression=True, **ALL)
    assert [sample.target for sample in data.train] == [1.0, 2.5, 3.0]
    assert (data.head, data.metric) == (Head("regression"), "pearson_spearman")
    assert head_of({"x": ClassificationConfig(path=path, regression=True)}) == data.head
    for wrong in ("many", True, "inf"):
        with pytest.raises(ValueError, match=r"facts\.jsonl:2: the label of a regression is a number"):
            load(path=jsonl(rows(1, wrong)), regression=True, **ALL)


def test_csv_and_tsv_files_are_told_by_their_names(load, tmp_path):
    (tmp_path / "x.csv").write_text('sentence,label\n"a, ""b""",1\nc,0\n')
    (tmp_path / "x.tsv").write_text('sentence\tlabel\nan "open\t1\nc\t0\n')
    assert found(load(path=str(tmp_path / "x.csv"), **ALL).train) == [('a, "b"', 1), ("c", 0)]
    assert found(load(path=str(tmp_path / "x.tsv"), **ALL).train) == [('an "open', 1), ("c", 0)]
    (tmp_path / "y.tsv").write_text('sentence\tlabel\n"a\tb"\t1\nc\t0\n')
    assert found(load(path=str(tmp_path / "y.tsv"), quoting=True, **ALL).train) == [("a\tb", 1), ("c", 0)]


def test_shares_are_held_out_by_the_seed_and_a_limit_takes_the_first(load, jsonl):
    path = jsonl(rows(*"ab" * 20))
    data = load(name="classification", path=path, validation=0.2, test=4)
    assert (len(data.train), len(data.validation), len(data.test)) == (28, 8, 4)
    prompts = [sample.prompt for split in (data.train, data.validation, data.test) for sample in split]
    assert len(set(prompts)) == 40
    assert load(name="classification", path=path, validation=0.2, test=4, seed=1).test != data.test
    assert [sample.row for sample in load(path=path, limit=2, **ALL).train] == ["facts.jsonl:1", "facts.jsonl:2"]


def task_file(folder, content):
    path = folder / "task.json"
    path.write_text(json.dumps(content, indent=1))
    return str(path)


def test_a_task_file_names_its_files_relative_to_itself(load, tmp_path, jsonl):
    (tmp_path / "data").mkdir()
    jsonl(rows("b", "a"), "data/train.jsonl")
    jsonl(rows("a"), "data/val.jsonl")
    content = {"task": "rte", "paths": {"train": "data/train.jsonl", "val": "data/val.jsonl"}}
    path = task_file(tmp_path, content)
    data = load(name="classification", path=path)
    assert found(data.train) == [("text 0", 1), ("text 1", 0)]
    assert found(data.validation) == found(data.test) == [("text 0", 0)]
    assert {sample.task for sample in data.train} == {data.name} == {"rte"}
    assert head_of({"x": ClassificationConfig(path=path)}) == Head("classification", ("a", "b"))
    with pytest.raises(ValueError, match=r"names its validation data: leave dataset\.validation"):
        load(name="classification", path=path, validation=0.5)


def test_a_task_file_without_validation_data_is_split(load, tmp_path, jsonl):
    jsonl(rows(*"ab" * 10), "train.jsonl")
    path = task_file(tmp_path, {"task": "mine", "paths": {"train": "train.jsonl"}})
    data = load(name="classification", path=path, validation=5, test=None)
    assert (len(data.train), len(data.validation)) == (15, 5)
    for wrong in ({"val": "train.jsonl"}, ["train.jsonl"], {"train": 3}):
        with pytest.raises(ValueError, match=r'task\.json: "paths" names a file for "train"'):
            load(name="classification", path=task_file(tmp_path, {"paths": wrong}))


def test_settings_that_do_not_go_together_are_told_at_once():
    with pytest.raises(ValidationError, match="regression=true has no labels") as error:
        ClassificationConfig(path="x", regression=True, labels=("a", "b"), metric="mcc", columns={"label_": "y"})
    for part in ("metric=mcc does not go with regression=true", "unknown key 'label_'; did you mean label"):
        assert part in str(error.value)
    with pytest.raises(ValidationError, match="pearson_spearman does not go with regression=false"):
        ClassificationConfig(path="x", metric="pearson_spearman")
    with pytest.raises(ValidationError, match="at least two are wanted, each once"):
        ClassificationConfig(path="x", labels=("a", "a"))


def test_one_label_alone_is_refused_naming_the_file(load, jsonl):
    with pytest.raises(ValueError, match=r"facts\.jsonl: all labels are a: two are wanted"):
        load(path=jsonl(rows("a", "a")), **ALL)


def test_a_hub_dataset_s_names_of_labels_and_own_splits_are_taken(load, monkeypatch):
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
    features = datasets.Features(
        {"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"), "label": label}
    )

    def load_dataset(path, subset, split, revision):
        assert (path, subset, revision) == ("user/pairs", "mrpc", None)
        rows = {"train": [1, 0, 1], "validation": [0]}[split]
        made = [{"sentence1": f"{split} {i}", "sentence2": "b", "label": value} for i, value in enumerate(rows)]
        return datasets.Dataset.from_list(made, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {"path": "user/pairs", "subset": "mrpc", "test": None}
    data = load(name="classification_hub", validation="validation", **hub)
    assert data.head == Head("classification", ("not_equivalent", "equivalent"))
    assert found(data.train) == [("train 0\nb", 1), ("train 1\nb", 0), ("train 2\nb", 1)]
    assert found(data.validation) == [("validation 0\nb", 0)]
    assert head_of({"pairs": ClassificationHubConfig(validation="validation", **hub)}) == data.head
