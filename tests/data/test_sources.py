"""Sources: every kind of file gives the same rows, and what is wrong in a file is named with its place."""

import gzip
import json

import pytest

from jaxpost.config import SourceSection
from jaxpost.data.sources import Row, open_source, rename
from jaxpost.text.messages import DataError

ROWS = [{"text": "one", "n": 1}, {"text": "Grüße 狐", "n": None}, {"text": "three\u2028line", "n": 3}]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]


def read(path, **options):
    return list(open_source(SourceSection(path=str(path), **options)).rows())


def write(path, data):
    path.write_bytes(data)
    return path


def jsonl(folder):
    return write(folder / "a.jsonl", b"\n".join(LINES))


def jsonl_gz(folder):
    return write(folder / "a.jsonl.gz", gzip.compress(b"\n".join(LINES) + b"\n"))


def windows(folder):
    return write(folder / "a.jsonl", b"\xef\xbb\xbf" + b"\r\n".join(LINES) + b"\r\n\r\n")


def json_list(folder):
    return write(folder / "a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode())


def json_lines(folder):
    return write(folder / "a.json", b"\n".join(LINES))


def json_gz(folder):
    return write(folder / "a.json.gz", gzip.compress(json.dumps(ROWS).encode()))


def parquet(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    return folder / "a.parquet"


def glob(folder):
    write(folder / "a.jsonl", LINES[0])
    write(folder / "b.jsonl.gz", gzip.compress(b"\n".join(LINES[1:])))
    write(folder / "notes.txt", b"no data")
    return folder / "*"


def saved(folder):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "set")
    return folder / "set"


def saved_splits(folder):
    import datasets

    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": part, "test": part.select([0])}).save_to_disk(folder / "set")
    return folder / "set"


KINDS = [jsonl, jsonl_gz, windows, json_list, json_lines, json_gz, parquet, glob, saved, saved_splits]


@pytest.mark.parametrize("make", KINDS)
def test_every_kind_of_source_gives_the_same_rows(make, tmp_path):
    rows = read(make(tmp_path))
    assert [row.value for row in rows] == ROWS
    assert len({row.where for row in rows}) == 3


@pytest.mark.parametrize("make", KINDS)
def test_skip_and_limit_split_a_source(make, tmp_path):
    path = make(tmp_path)
    assert [r.value for r in read(path, limit=1)] == ROWS[:1]
    assert [r.value for r in read(path, skip=1)] == ROWS[1:]
    assert [r.value for r in read(path, skip=1, limit=1)] == ROWS[1:2]


def test_a_split_of_a_saved_folder(tmp_path):
    path = saved_splits(tmp_path)
    assert [r.value for r in read(path, split="test")] == ROWS[:1]
    with pytest.raises(DataError, match=r"no split 'validation'; it has train, test"):
        read(path, split="validation")


@pytest.mark.parametrize("make", [jsonl, parquet, saved])
def test_the_digest_follows_the_content(make, tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()

    def digest(folder, **options):
        return open_source(SourceSection(path=str(make(folder)), **options)).digest()

    first = digest(tmp_path / "1")
    assert digest(tmp_path / "2") == first
    ROWS.append({"text": "more", "n": 4})
    LINES.append(json.dumps(ROWS[-1]).encode())
    try:
        assert digest(tmp_path / "2") != first
    finally:
        ROWS.pop()
        LINES.pop()


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        (b'{"text": ', "malformed", "not valid JSON: Expecting value at column 10"),
        (b"[1, 2]", "malformed", "must be a JSON object, not list"),
        (b'{"text": "\xff"}', "encoding", "not UTF-8 (byte 10 of the line)"),
        (b'{"a": ' * 100000, "malformed", "nested too deep (over 200 levels)"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "malformed", "too many digits"),
        (b'{"text": "a", "n": {"b": 1, "b": 1}}', "malformed", "the key 'b' stands twice in an object with the keys b"),
        (b'{"text": "a", "text": null}', "malformed", "the key 'text' stands twice"),
        (b'{"a": {"b": ["cut \\ud83d"]}}', "encoding", "half of a character (\\ud83d without its other half)"),
    ],
)
def test_a_bad_line_is_a_row_with_file_line_and_reason(line, kind, words, tmp_path):
    path = write(tmp_path / "a.jsonl", b"\n".join([LINES[0], b"", line, LINES[1]]))
    good, bad, last = read(path)
    assert (good.value, last.value) == (ROWS[0], ROWS[1])
    assert bad.where == f"{path}:3"
    assert bad.error.kind == kind
    assert words in str(bad.error)
    assert bad.raw


def test_a_bad_line_is_counted_by_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\n".join([b"{", LINES[0], LINES[1]]))
    assert [row.value for row in read(path, limit=2)] == [None, ROWS[0]]


def garbled(data):
    """Compressed bytes whose first block is no block at all."""
    whole = gzip.compress(data, mtime=0)
    return whole[:10] + b"\xff\xff" + whole[12:]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.json", b'{"text": "x"}', "must hold a list of rows, not dict"),
        ("a.json", b"[1,", "not valid JSON"),
        ("a.json", b'[{"a": 1}, {"text": "x", "text": "y"}]', "the key 'text' stands twice in an object with the keys"),
        ("a.json", b'["\xff"]', "not UTF-8"),
        ("a.jsonl.gz", b"plain text", "reading stopped after line 0"),
        ("a.jsonl.gz", gzip.compress(b"\n".join(LINES) * 50, mtime=0)[:60], "the file is damaged"),
        ("a.jsonl.gz", garbled(b"\n".join(LINES) * 50), "the file is damaged"),
        ("a.json.gz", b"plain text", "the file is damaged"),
        ("a.json.gz", garbled(b"[1, 2]" * 50), "the file is damaged"),
        ("a.json", b'{"a": ' * 100000, "nested too deep"),
        ("a.parquet", b"PAR?", "not a Parquet file"),
        ("a.csv", b"a,b", "known endings: .jsonl, .jsonl.gz"),
    ],
)
def test_files_that_cannot_be_read(name, data, words, tmp_path):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError) as caught:
        read(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_list_with_other_things_in_it(tmp_path):
    path = write(tmp_path / "a.json", b'[{"text": "x"}, 5]')
    assert [str(row.error) for row in read(path)] == ["None", "a row must be a JSON object, not int"]
    path = write(tmp_path / "b.json", b'[{"text": "\\ud83d\\ude00"}, {"text": "\\ud83d"}]')
    whole, half = read(path)
    assert whole.value == {"text": "\U0001f600"}
    assert (half.error.kind, half.raw) == ("encoding", '{"text": "\\ud83d"}')


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trian.jsonl", "did you mean {folder}/train.jsonl?"),
        ("zzz.jsonl", "{folder} holds train.jsonl"),
        ("none/a.jsonl", "the folder {folder}/none does not exist; {folder} does"),
        ("*.parquet", "no file matches {folder}/*.parquet; {folder} holds train.jsonl"),
    ],
)
def test_a_missing_file_names_the_nearest(name, words, tmp_path):
    write(tmp_path / "train.jsonl", LINES[0])
    with pytest.raises(FileNotFoundError) as caught:
        open_source(SourceSection(path=str(tmp_path / name)))
    assert words.format(folder=tmp_path) in str(caught.value)


def test_a_name_that_neither_disk_nor_hub_knows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my_rows.jsonl", LINES[0])
    with pytest.raises(
        FileNotFoundError, match=r"my_rows is no local file or folder; did you mean my_rows\.jsonl\?, and"
    ):
        open_source(SourceSection(path="my_rows"))


def test_a_folder_that_is_no_data_set(tmp_path):
    write(tmp_path / "a.jsonl", LINES[0])
    with pytest.raises(DataError, match=r"not one that datasets\.save_to_disk wrote; to read its files give a glob"):
        open_source(SourceSection(path=str(tmp_path)))


@pytest.mark.parametrize("make", ["parquet", "saved"])
def test_a_table_does_not_add_arguments_of_other_rows(make, tmp_path):
    rows = [{"messages": [{"role": "assistant", "tool_calls": [{"name": n, "arguments": {n: 1}}]}]} for n in "ab"]
    if make == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        path = tmp_path / "a.parquet"
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
        path = tmp_path / "set"
    assert [row.value for row in read(path)] == rows


def test_lines_in_a_json_file_fail_one_by_one(tmp_path):
    path = write(tmp_path / "a.json", b'{"text": "x", "text": "y"}\n{"text": "z"}')
    assert [row.value for row in read(path)] == [None, {"text": "z"}]


def test_a_parquet_text_that_is_no_utf8_is_one_bad_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = pa.array([b"one", b"\xff", b"three"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"n": [1, 2, 3], "text": broken}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [row.value for row in rows] == [{"n": 1, "text": "one"}, None, {"n": 3, "text": "three"}]
    assert rows[1].where.endswith("a.parquet: row 1")
    assert (rows[1].error.kind, "text is not UTF-8" in str(rows[1].error)) == ("encoding", True)


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: the column 'text' stands twice; rename"):
        read(tmp_path / "a.parquet")


def test_columns_rename_and_fill():
    row = Row("f:1", {"q": "2+2", "a": 4, "note": None, "x": 1})
    assert rename(row, {"prompt": "q"}).value == {"a": 4, "note": None, "x": 1, "prompt": "2+2"}
    filled = rename(row, {"completion": "{a}{note} {{sure}}"}).value
    assert filled == {"q": "2+2", "x": 1, "completion": "4 {sure}"}
    attack = rename(row, {"completion": "{a.__class__}"})
    assert "'a.__class__', which the row lacks" in str(attack.error)
    missing = rename(row, {"prompt": "quest"})
    assert missing.value is None
    assert str(missing.error) == "columns maps prompt to 'quest', which the row lacks (it has q, a, note, x)"


def test_columns_may_swap():
    assert rename(Row("f:1", {"a": "1", "b": "2"}), {"a": "b", "b": "a"}).value == {"a": "2", "b": "1"}
