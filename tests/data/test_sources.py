"""Files as sources: JSON Lines, CSV, Parquet, datasets' folders; and the errors that name file and line."""

import json

import pytest

PAIRS = [{"prompt": f"p{i} ", "completion": f"c{i}"} for i in range(10)]
ALL = {"validation": None, "test": None}


def texts(split):
    return [(sample.prompt, sample.completion) for sample in split]


EXPECTED = [(record["prompt"], record["completion"]) for record in PAIRS]


def test_json_lines_are_read_in_order_empty_lines_and_byte_order_mark_skipped(load, tmp_path):
    path = tmp_path / "facts.jsonl"
    lines = [json.dumps(record) for record in PAIRS]
    path.write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    data = load(name="jsonl", path=str(path), **ALL)
    assert texts(data.train) == EXPECTED
    assert data.name == "facts"
    assert {sample.task for sample in data.train} == {"facts"}


def test_line_separators_inside_a_json_string_do_not_cut_it(load, tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b", "completion": "c\x85"}, ensure_ascii=False), encoding="utf-8")
    assert texts(load(name="jsonl", path=str(path), **ALL).train) == [("a\u2028b", "c\x85")]


def test_a_json_file_may_hold_one_list(load, tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(PAIRS, indent=1))
    assert texts(load(name="jsonl", path=str(path), **ALL).train) == EXPECTED


def test_csv_columns_are_named_by_the_header(load, tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text('prompt,completion\n"a, ""b""\nc",d\ne,f\n')
    assert texts(load(name="csv", path=str(path), **ALL).train) == [('a, "b"\nc', "d"), ("e", "f")]


def test_tabs_and_unbalanced_quotes_are_read_when_told(load, tmp_path):
    path = tmp_path / "facts.tsv"
    path.write_text('\ufeffprompt\tcompletion\nan "open\tquote\nx\ty\n', encoding="utf-8")
    data = load(name="csv", path=str(path), delimiter="\t", quoting=False, **ALL)
    assert texts(data.train) == [('an "open', "quote"), ("x", "y")]


def test_parquet_rows_are_read(load, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "facts.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    assert texts(load(name="parquet", path=str(path), **ALL).train) == EXPECTED


def test_a_damaged_parquet_file_is_refused(load, tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "facts.parquet"
    path.write_bytes(b"PAR1 no table")
    with pytest.raises(ValueError, match=r"facts\.parquet: not a readable Parquet file"):
        load(name="parquet", path=str(path))


def test_a_hub_dataset_s_own_splits_are_taken_by_name(load, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, subset, split, revision):
        asked.append((path, subset, split, revision))
        rows = {"train": PAIRS, "dev": PAIRS[:3]}
        if split not in rows:
            raise ValueError(f'Unknown split "{split}"')
        return datasets.Dataset.from_list(rows[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {"name": "hub", "path": "user/facts", "subset": "small", "revision": "abc", "test": None}
    data = load(**hub, validation="dev")
    assert asked == [("user/facts", "small", "train", "abc"), ("user/facts", "small", "dev", "abc")]
    assert texts(data.train) == EXPECTED
    assert texts(data.validation) == EXPECTED[:3]
    assert data.name == "facts"
    with pytest.raises(ValueError, match=r"user/facts \(small\), split trial: Unknown split"):
        load(**hub, validation="trial")


@pytest.mark.parametrize("name", ["jsonl", "csv", "parquet", "text"])
def test_a_missing_file_is_named_with_its_neighbours(load, tmp_path, name):
    (tmp_path / "other.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"missing\.x: no such file; in .* there are other\.jsonl"):
        load(name=name, path=str(tmp_path / "missing.x"))


@pytest.mark.parametrize("name", ["jsonl", "csv", "parquet", "text"])
def test_an_empty_file_is_refused(load, tmp_path, name):
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="empty: the file is empty"):
        load(name=name, path=str(tmp_path / "empty"))


def test_a_folder_is_refused(load, tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        load(name="jsonl", path=str(tmp_path))


MALFORMED = {
    "not JSON": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl', r"bad:2: not JSON: .* at column"),
    "not an object": ('{"prompt": "a", "completion": "b"}\n\n["a", "b"]\n', r"bad:3: a record must be a JSON object"),
    "unknown keys": ('{"promt": "a", "completion": "b"}\n', r"bad:1: the keys promt, completion are those of no known"),
    "not text": ('{"prompt": ["a"], "completion": "b"}\n', r"bad:1: prompt must be text, got list"),
    "null": ('{"prompt": "a", "completion": null}\n', r"bad:1: completion must be text, got null"),
    "only white space": ("\n \n", r"bad: the file has no records"),
}


@pytest.mark.parametrize("case", sorted(MALFORMED))
def test_malformed_json_lines_are_refused_with_file_and_line(load, tmp_path, case):
    text, message = MALFORMED[case]
    (tmp_path / "bad").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(name="jsonl", path=str(tmp_path / "bad"), **ALL)


def test_bytes_that_are_not_text_are_refused_with_file_and_line(load, tmp_path):
    (tmp_path / "bad").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bad:2: not UTF-8 text \(byte 0xff\)"):
        load(name="jsonl", path=str(tmp_path / "bad"))


MALFORMED_CSV = {
    "too many fields": ("prompt,completion\na,b\nc,d,e\n", r"bad:3: 3 fields, but the header names 2"),
    "too few fields": ('prompt,completion\n"a\nb",b\nc\n', r"bad:4: 1 fields, but the header names 2"),
    "open quote": ('prompt,completion\na,b\n"c,d\n', r"bad:3: not CSV: .*unbalanced quotes need quoting=false"),
    "no rows": ("prompt,completion\n", r"bad: the file has a header at most, no rows"),
    "a column twice": ("prompt,completion,prompt\n", r"bad:1: the header names prompt twice"),
}


@pytest.mark.parametrize("case", sorted(MALFORMED_CSV))
def test_malformed_csv_is_refused_with_file_and_line(load, tmp_path, case):
    text, message = MALFORMED_CSV[case]
    (tmp_path / "bad").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(name="csv", path=str(tmp_path / "bad"), **ALL)
