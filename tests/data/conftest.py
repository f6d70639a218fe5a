"""Data tests: rows written to files, sections over them, a small tokenizer."""

import json
from pathlib import Path

import pytest
from toy_text import CHATML, fast_tokenizer

from jaxpost.config import DataSection, SourceSection
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
