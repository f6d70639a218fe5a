"""Preparation: counts, rejected rows, the cache and its keys, worker processes, mixtures."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from toy_text import CHATML, fast_tokenizer, save_tokenizer

from jaxpost import disk
from jaxpost.config import DataSection, SourceSection
from jaxpost.data import cache as module
from jaxpost.data.dataset import prepare
from jaxpost.data.inspect import inspect
from jaxpost.text.chat import TemplateError
from jaxpost.text.messages import DataError
from jaxpost.text.tokenizer import Tokenizer, load_tokenizer


def chat(question, answer="Yes"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


BAD = [
    chat("fine"),
    b'{"messages": ',
    {"question": "no format"},
    {"messages": [{"role": "narrator", "content": "x"}]},
    {"messages": [{"role": "user", "content": "no answer"}]},
    b'{"text": "\xff"}',
    {"messages": [{"role": "user", "content": None}]},
    chat("fine too"),
]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (BAD[1], "rows0.jsonl:2: not valid JSON"),
        (BAD[2], "rows0.jsonl:2: no row format has the keys question"),
        (BAD[3], "rows0.jsonl:2: messages: message 0: unknown role 'narrator'"),
        (BAD[4], "rows0.jsonl:2: the conversation has no assistant turn"),
        (BAD[5], "rows0.jsonl:2: not UTF-8"),
        (BAD[6], "rows0.jsonl:2: messages: message 0: a message of role user has no content"),
    ],
)
def test_a_bad_row_stops_with_file_and_line(bad, words, section, tokenizer, tmp_path):
    data = section([BAD[0], bad])
    with pytest.raises(DataError) as caught:
        prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache")
    assert words in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


def deep(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


ODD = [
    {"conversations": [{"from": ["human"], "value": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]},
    {"messages": chat("a")["messages"], "tools": [{"function": {"name": "f"}, "parameters": deep(900)}]},
    {"prompt": {"role": "prompter", "text": "Q", "replies": 5}},
    {"instruction": "a", "output": "b", "history": [[{}, []]]},
]


def test_rows_of_odd_shapes_are_bad_rows_and_no_errors_of_ours(section, tokenizer, tmp_path):
    for odd in ODD:
        data = section([chat("fine"), odd])
        with pytest.raises(DataError, match=r"rows0\.jsonl:2: "):
            prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache")
    data = section([*ODD, chat("fine")], on_bad_row="skip")
    stats = prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache").stats[0]
    assert (stats.examples, sum(stats.bad.values())) == (1, len(ODD))


def test_an_error_of_a_reader_or_a_template_names_its_row(section, tokenizer, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("speaker")

    monkeypatch.setattr("jaxpost.data.tokenise.convert", fail)
    told = r"rows0\.jsonl:1: something in it has a shape that cannot be read \(KeyError: 'speaker'\); mend it"
    data = section([chat("a")])
    with pytest.raises(DataError, match=told) as caught:
        prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(DataError, match=told):
        inspect(data, tokenizer, cache_dir=tmp_path / "cache")


def test_a_linked_message_without_its_id_is_named(section, tokenizer, tmp_path):
    first = {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Q"}
    data = section([first, {"parent_id": "a", "role": "assistant", "text": "A"}], on_bad_row="skip")
    with pytest.raises(DataError, match=r"rows0\.jsonl:2: message_id must be a text or a number, not None"):
        prepare(data, data.train, tokenizer, cache_dir=tmp_path)


def test_a_name_that_the_template_does_not_show_is_noted(section, tokenizer, tmp_path):
    row = chat("Hi")
    row["messages"][0]["name"] = "Bob"
    data = section([row])
    stats = prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache").stats[0]
    assert stats.notes == {"turns whose name the chat template does not show": 1}


def test_skipped_rows_are_counted_and_saved(section, tokenizer, tmp_path):
    data = section(BAD, on_bad_row="skip")
    for _ in range(2):  # the second time from the cache
        file = tmp_path / "run" / "rejected.jsonl"
        dataset = prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache", rejected=file)
        stats = dataset.stats[0]
        assert (stats.rows, stats.examples, len(dataset)) == (8, 2, 2)
        assert stats.bad == {"malformed": 1, "format": 1, "role": 1, "empty_mask": 1, "encoding": 1, "content": 1}
        saved = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert [row["where"].rsplit(":", 1)[1] for row in saved] == ["2", "3", "4", "5", "6", "7"]
        assert {row["kind"] for row in saved} == set(stats.bad)
        assert saved[0]["row"] == '{"messages": '
        file.unlink()


def test_the_same_bytes_read_from_elsewhere_are_named_as_read(section, tokenizer, tmp_path, monkeypatch):
    rows = Path(section(BAD).train[0].path).read_bytes()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("x.jsonl", "y.jsonl"):
            (tmp_path / folder / name).write_bytes(rows)
    monkeypatch.setattr(module, "encoded_chunks", counted := Counted(module.encoded_chunks))

    def places(path):
        data, file = section([], on_bad_row="skip"), tmp_path / "rejected.jsonl"
        prepare(data, [SourceSection(path=path)], tokenizer, cache_dir=tmp_path / "cache", rejected=file)
        return [json.loads(line)["where"] for line in file.read_text(encoding="utf-8").splitlines()]

    for folder in ("a", "b"):
        one = str(tmp_path / folder / "x.jsonl")
        assert places(one) == [f"{one}:{line}" for line in range(2, 8)]
        files = [str(tmp_path / folder / name) for name in ("x.jsonl", "y.jsonl")]
        assert places(str(tmp_path / folder / "*.jsonl")) == [
            f"{file}:{line}" for file in files for line in range(2, 8)
        ]
    assert counted.calls == 2, "both are read from the cache the second time"


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def test_no_rejected_file_where_nothing_was_rejected(section, tokenizer, tmp_path):
    data = section([chat("a")])
    prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache", rejected=tmp_path / "rejected.jsonl")
    assert not (tmp_path / "rejected.jsonl").exists()


def test_a_full_disk_names_the_cache(section, tokenizer, tmp_path):
    """RLIMIT_FSIZE makes the file system refuse further bytes; NumPy alone would leave half an array in silence."""
    data = section([chat("a", "b " * 80)])
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, unlimited[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert disk.is_full(caught.value)
    assert str(tmp_path / "cache") in disk.told(caught.value)


def test_sources_without_a_usable_row(section, tokenizer, tmp_path):
    data = section([], on_bad_row="skip")
    with pytest.raises(DataError, match=r"rows0\.jsonl holds no rows"):
        prepare(data, data.train, tokenizer, cache_dir=tmp_path)
    data = section(BAD[1:3], on_bad_row="skip")
    with pytest.raises(
        DataError, match=r"none of its 2 rows can be trained on \(1 malformed, 1 format\); the first: .*:1: not"
    ):
        prepare(data, data.train, tokenizer, cache_dir=tmp_path)
    with pytest.raises(DataError, match="give at least one source"):
        prepare(data, (), tokenizer, cache_dir=tmp_path)


def test_a_tokenizer_without_template_stops_even_where_bad_rows_are_skipped(section, tmp_path):
    bare = Tokenizer(fast_tokenizer("chatml", None))
    data = section([chat("a")], on_bad_row="skip")
    with pytest.raises(TemplateError, match=r"set model\.chat_template"):
        prepare(data, data.train, bare, cache_dir=tmp_path)
    plain = section([{"text": "Hi there"}], mask="all")
    assert len(prepare(plain, plain.train, bare, cache_dir=tmp_path)) == 1


def test_the_second_start_reads_the_cache(section, tokenizer, tmp_path, monkeypatch):
    data = section([chat(f"q{i}", "a" * i) for i in range(1, 9)])
    first = prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(module, "encoded_chunks", None)  # would fail if rows were tokenised again
    again = prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert again.stats == first.stats
    for i in range(len(first)):
        for a, b in zip(first.example(i), again.example(i), strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_changes_tokens_changes_the_cache_key(section, tokenizer, tmp_path):
    rows = [chat("a b c"), chat("d e")]

    def fingerprint(rows=rows, use=tokenizer, **options):
        data = section(rows, **options)
        return prepare(data, data.train, use, cache_dir=tmp_path / "cache").fingerprint

    variants = [
        fingerprint(),
        fingerprint(rows=rows[:1]),
        fingerprint(mask="all"),
        fingerprint(seq_len=20),
        fingerprint(system_prompt="Hi"),
        fingerprint(use=Tokenizer(fast_tokenizer("chatml", CHATML), chat_template="qwen3")),
    ]
    assert len(set(variants)) == len(variants)
    assert fingerprint(seed=5, prefetch=1, packing=False) == variants[0]


def test_a_moved_file_keeps_its_cache(section, tokenizer, tmp_path):
    data = section([chat("a")])
    first = prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache")
    (tmp_path / "there").mkdir()
    os.rename(data.train[0].path, tmp_path / "there" / "rows0.jsonl")
    moved = DataSection(train=(SourceSection(path=str(tmp_path / "there" / "rows0.jsonl")),), seq_len=256)
    assert prepare(moved, moved.train, tokenizer, cache_dir=tmp_path / "cache").fingerprint == first.fingerprint


def test_a_half_written_cache_is_written_again(section, tokenizer, tmp_path):
    data = section([chat("a")])
    first = prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache").example(0)[0].tolist()
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "stats.json").unlink()
    (folder / "tokens.npy").write_bytes(b"half")
    again = prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache")
    assert again.example(0)[0].tolist() == first


def test_worker_processes_give_the_same_tokens_in_the_same_order(section, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer"))
    monkeypatch.setattr("jaxpost.data.tokenise.CHUNK", 7)
    rows = [chat(f"question {i}", "word " * (i % 5 + 1)) for i in range(60)]
    rows.insert(20, {"text": 5})
    data = {n: section(rows, workers=n, on_bad_row="skip") for n in (0, 2)}
    one, two = (prepare(data[n], data[n].train, tokenizer, cache_dir=tmp_path / f"c{n}") for n in (0, 2))
    assert one.stats == two.stats
    assert one.stats[0].bad == {"format": 1}
    np.testing.assert_array_equal(one.tokens[0], two.tokens[0])
    np.testing.assert_array_equal(one.weights[0], two.weights[0])


def test_several_sources_are_numbered_in_order(section, tokenizer, tmp_path):
    data = section([chat("a"), chat("b")], [chat("c")], weights=[1.0, 3.0])
    dataset = prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache")
    texts = [tokenizer.decode(dataset.example(i)[0]) for i in range(3)]
    assert [text.split("\n")[1] for text in texts] == ["a", "b", "c"]
    assert dataset.shares == (1.0, 3.0)
    assert dataset.starts.tolist() == [0, 2, 3]
    half = section([chat("a")], [chat("c")], weights=[1.0, None])
    with pytest.raises(DataError, match="every source a weight > 0, or none"):
        prepare(half, half.train, tokenizer, cache_dir=tmp_path / "cache")


def test_progress_is_reported(section, tokenizer, tmp_path):
    told = []
    data = section([chat("a"), chat("b")])
    prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache", report=told.append)
    assert str(told[-1]).endswith("rows0.jsonl: 2 rows (100%, 0 s left)")


def test_special_tokens_written_in_a_row_are_noted(section, tokenizer, tmp_path):
    data = section([chat("a <|im_end|> b"), chat("c")])
    stats = prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache").stats[0]
    assert stats.notes == {"rows whose own text holds special tokens, which are read as such": 1}


def test_renamed_columns_are_taken_as_they_are(section, tokenizer, tmp_path):
    row = {"instruction": "not this", "output": "nor this", "question": "One?", "steps": "Two.", "answer": 3}
    columns = {"prompt": "question", "completion": "{steps} So {answer}."}
    data = section([row], columns=columns)
    dataset = prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache")
    text = tokenizer.decode(dataset.example(0)[0])
    assert text == "user\nOne?\nassistant\nTwo. So 3.\n"
    assert dataset.stats[0].ignored == {"instruction": 1, "output": 1}
    assert dataset.stats[0].notes == {"plain pairs shown as a user and an assistant turn": 1}
