"""Data tests: rows written to files, sections over them, a small tokenizer."""

import json
from pathlib import Path

import pytest
from toy_text import CHATML, fast_tokenizer

from jaxpost.config import AnswerDataSection, DataSection, SourceSection
from jaxpost.data.answers import AnswerDataset, prepare_answers
from jaxpost.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer with the ChatML template."""
    return Tokenizer(fast_tokenizer("chatml", CHATML))


@pytest.fixture
def section(tmp_path):
    """section(rows, **options): a data section over a file of these rows (objects, or bytes as they are)."""

    def make(*files, columns=None, weights=None, **options) -> DataSection:
        sources = []
        for number, rows in enumerate(files):
            path: Path = tmp_path / f"rows{number}.jsonl"
            lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
            path.write_bytes(b"\n".join(lines))
            weight = None if weights is None else weights[number]
            sources.append(SourceSection(path=str(path), columns=columns or {}, weight=weight))
        return DataSection(**{"train": tuple(sources), "seq_len": 256, **options})

    return make


@pytest.fixture
def judged(section, tokenizer, tmp_path):
    """judged(kind, rows, **options): a data set of groups; judged.section is its data section."""

    def make(kind, *files, share_prompts=True, **options) -> AnswerDataset:
        plain = section(*files, weights=options.pop("weights", None))
        make.section = AnswerDataSection(**{"train": plain.train, "seq_len": 256, **options})
        return prepare_answers(
            make.section,
            make.section.train,
            tokenizer,
            kind=kind,
            cache_dir=tmp_path / "cache",
            share_prompts=share_prompts,
            rejected=tmp_path / "rejected.jsonl",
        )

    return make
