"""GLUE: the strict reader on files written out by hand, and the official files where they are."""

import os
from pathlib import Path

import pytest

import mole
from mole.data.glue import TASKS, read_tsv
from mole.registry import DATASETS

DATA = Path(os.environ.get("MOLE_TEST_DATA") or Path(mole.__file__).parents[2] / "shared" / "data") / "glue"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no GLUE files in {DATA}; MOLE_TEST_DATA can name their parent")
FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "rte": "RTE"}
OWN = {"check_counts": False}


@pytest.fixture
def folder(tmp_path):
    """Write files of tab-parted rows and give their folder."""

    def write(**files):
        for name, rows in files.items():
            text = "".join("\t".join(row) + "\n" for row in rows)
            (tmp_path / f"{name}.tsv").write_text(text, encoding="utf-8")
        return str(tmp_path)

    return write


MRPC_HEADER = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
RTE_HEADER = ["index", "sentence1", "sentence2", "label"]


def rte(*labels):
    return [RTE_HEADER, *([str(i), f"a{i}", f"b{i}", label] for i, label in enumerate(labels))]


def test_every_task_is_a_dataset_with_a_head_of_its_labels():
    for name, task in TASKS.items():
        config = DATASETS[name].config(path="x")
        assert config.name == name
        assert config.head().labels == task.labels
    assert {name for name, task in TASKS.items() if not task.labels} == {"stsb"}


def test_a_byte_order_mark_and_quotes_are_read_as_they_should(folder, load):
    rows = [
        ["\ufeffQuality", *MRPC_HEADER[1:]],
        ["1", "1", "2", 'he said " no', 'and " yes "'],
        ["0", "3", "4", '"', "c"],
    ]
    data = load(name="mrpc", path=folder(train=rows, dev=rows), **OWN)
    assert [sample.prompt for sample in data.train] == ['he said " no\nand " yes "', '"\nc']
    assert [sample.target for sample in data.train] == [1, 0]
    assert (data.name, data.metric) == ("mrpc", "accuracy_f1")


def test_cola_has_no_header(folder, load):
    rows = [["gj04", "1", "", "They sang."], ["gj04", "0", "*", "Sang they did is."]]
    data = load(name="cola", path=folder(train=rows, dev=rows[:1]), **OWN)
    assert [(sample.prompt, sample.target, sample.row) for sample in data.train] == [
        ("They sang.", 1, "train.tsv:1"),
        ("Sang they did is.", 0, "train.tsv:2"),
    ]
    assert len(data.validation) == 1


@pytest.mark.parametrize("broken", [["1", "only", "three"], ["1", "a", "b", "entailment", "five"], [""]])
def test_a_row_of_another_width_is_refused_by_file_and_line(folder, load, broken):
    rows = rte("entailment", "entailment")
    path = folder(train=[*rows, broken, rows[1]], dev=rows)
    with pytest.raises(ValueError, match=rf"train\.tsv:4: {len(broken)} fields, but there are 4 columns \(index, "):
        load(name="rte", path=path, **OWN)


def test_a_header_less_row_of_another_width_is_refused_too(folder, load):
    rows = [["gj04", "1", "", "They sang."]]
    with pytest.raises(ValueError, match=r"dev\.tsv:2: 3 fields"):
        load(name="cola", path=folder(train=rows, dev=[*rows, ["gj04", "1", "They sang."]]), **OWN)


def test_other_line_separators_and_line_ends_of_windows_cut_nothing(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes("a\tb\r\n1\u2028\x0b\t2\r\n3\t4".encode())
    records = read_tsv(str(path))
    assert [record.fields for record in records] == [{"a": "1\u2028\x0b", "b": "2"}, {"a": "3", "b": "4"}]
    assert [record.where for record in records] == [f"{path}:2", f"{path}:3"]


def test_labels_are_in_the_official_order_and_others_refused_with_the_row(folder, load):
    good = rte("not_entailment", "entailment")
    assert [s.target for s in load(name="rte", path=folder(train=good, dev=good), **OWN).train] == [1, 0]
    with pytest.raises(ValueError, match=r"dev\.tsv:3: unknown label 'entailmnt'; did you mean entailment"):
        load(name="rte", path=folder(train=good, dev=rte("entailment", "entailmnt")), **OWN)
    with pytest.raises(ValueError, match=r"unknown label '-'"):  # only MNLI and SNLI have rows without a label
        load(name="rte", path=folder(train=rte("-"), dev=good), **OWN)


NLI = ["index", "sentence1", "sentence2", "label1", "gold_label"]


def nli(*labels):
    return [NLI, *([str(i), f"a{i}", f"b{i}", "neutral", label] for i, label in enumerate(labels))]


def test_mnli_drops_rows_without_a_label_and_tests_on_the_mismatched(folder, load):
    path = folder(
        train=nli("contradiction", "-", "neutral"), dev_matched=nli("-", "entailment"), dev_mismatched=nli("neutral")
    )
    data = load(name="mnli", path=path, **OWN)
    assert [[s.target for s in split] for split in (data.train, data.validation, data.test)] == [[2, 1], [0], [1]]
    assert data.dropped == 2
    assert [sample.row for sample in data.train] == ["train.tsv:2", "train.tsv:4"]
    assert data.test[0].row == "dev_mismatched.tsv:2"


def test_the_development_file_is_validated_and_tested_on(folder, load):
    path = folder(train=rte(*["entailment"] * 6), dev=rte(*["entailment", "not_entailment"] * 2))
    data = load(name="rte", path=path, limit=3, validation_examples=1, test_examples=2, task="mine", **OWN)
    assert (len(data.train), len(data.validation), len(data.test)) == (3, 1, 2)
    assert data.validation[0] == data.test[0]
    assert data.test[1].row == "dev.tsv:3"
    assert {sample.task for sample in data.train} == {"mine"}


def test_scores_are_numbers_from_0_to_5(folder, load):
    header = ["index", "sentence1", "sentence2", "score"]
    good = [header, ["0", "a", "b", "3.800"], ["1", "c", "d", "5.000"]]
    data = load(name="stsb", path=folder(train=good, dev=good), **OWN)
    assert [sample.target for sample in data.train] == [3.8, 5.0]
    assert data.head.kind == "regression"
    for wrong in ("5.1", "-0.5", "nan", "many"):
        with pytest.raises(ValueError, match=r"train\.tsv:2: "):
            load(name="stsb", path=folder(train=[header, ["0", "a", "b", wrong]], dev=good), **OWN)


def test_the_backbone_bounds_the_length(folder, load):
    rows = [RTE_HEADER, ["0", "long " * 30, "short", "entailment"]]
    path = folder(train=rows, dev=rows)
    assert len(load(name="rte", path=path, max_length=64, context_length=16, **OWN).train[0].input_ids) == 16
    data = load(name="rte", path=path, max_length=32, context_length=100, **OWN)
    assert len(data.train[0].input_ids) == 32
    assert data.truncated == 3


def test_a_file_that_is_not_the_official_one_is_refused_unless_told(folder, load):
    path = folder(train=rte("entailment"), dev=rte("entailment"))
    with pytest.raises(ValueError, match=r"train\.tsv: 1 rows .* official file has 2,490.*check_counts=false"):
        load(name="rte", path=path)
    assert len(load(name="rte", path=path, **OWN).train) == 1


def test_a_file_of_another_task_is_refused_naming_the_column(folder, load):
    path = folder(train=rte("entailment"), dev=rte("entailment"))
    with pytest.raises(ValueError, match=r"train\.tsv:2: unknown column 'question'"):
        load(name="qnli", path=path, **OWN)


def test_a_row_without_text_is_refused(folder, load):
    rows = [["sentence", "label"], ["good", "1"], [" ", "0"]]
    with pytest.raises(ValueError, match=r"train\.tsv:3: sentence: empty"):
        load(name="sst2", path=folder(train=rows, dev=rows), **OWN)


def test_a_folder_without_the_files_is_refused_naming_what_is_there(folder, load):
    path = folder(dev=rte("entailment"))
    with pytest.raises(ValueError, match=r"train\.tsv: no such file; .* there are dev\.tsv"):
        load(name="rte", path=path)


@real
@pytest.mark.parametrize("name", FOLDERS)
def test_official_files_have_their_official_rows(name):
    task = TASKS[name]
    for file, counts in task.rows.items():
        records = read_tsv(str(DATA / FOLDERS[name] / file), task.header)
        assert len(records) in counts
        assert {task.label, *task.texts} <= set(records[0].fields)


@real
def test_a_quote_in_an_official_field_survives(load):
    data = load(name="mrpc", path=str(DATA / "MRPC"), limit=1)
    assert data.train[0].prompt.startswith('Amrozi accused his brother , whom he called " the witness " , of')
    assert (data.train[0].row, data.train[0].target) == ("train.tsv:2", 1)
    assert len(data.validation) == len(data.test) == 408


@real
def test_the_official_majority_is_as_published(load):
    mrpc = load(name="mrpc", path=str(DATA / "MRPC"), limit=1).validation
    rte_dev = load(name="rte", path=str(DATA / "RTE"), limit=1).validation
    assert sum(sample.target == 1 for sample in mrpc) / len(mrpc) == pytest.approx(0.6838, abs=5e-5)
    assert sum(sample.target == 0 for sample in rte_dev) / len(rte_dev) == pytest.approx(0.5271, abs=5e-5)
