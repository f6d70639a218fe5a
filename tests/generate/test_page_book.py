"""The page book against a plain model: every row's contents as a list of its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost.generate.pages import OutOfPages, PageBook, PagedRow

SIZE, PAGES, WINDOW = 4, 12, 6


def write(memory, row, table, start, tokens):
    for i, token in enumerate(tokens):
        memory[table[(start + i) // SIZE], (start + i) % SIZE] = token


def copy(memory, pairs):
    sources = [memory[s].copy() for s, _ in pairs]
    for (_, target), old in zip(pairs, sources, strict=True):
        memory[target] = old


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["new", "grow", "fork", "drop"]), st.integers(0, 9), st.integers(1, 9))))
def test_no_row_ever_sees_anothers_tokens(steps):
    book = PageBook(pages=PAGES, window_pages=PAGES, page_size=SIZE, window=WINDOW)
    memory, window_memory = np.zeros((PAGES, SIZE), int), np.zeros((PAGES, SIZE), int)
    rows, texts, token = [], [], 0
    for what, which, count in steps:
        if what == "new":
            rows.append(PagedRow())
            texts.append([])
        elif rows and what == "grow":
            row, text = rows[which % len(rows)], texts[which % len(rows)]
            before = (list(row.full), list(row.window), book.full.free, book.windowed.free)
            try:
                copies = book.reserve([row], [count])
            except OutOfPages:
                assert before == (row.full, row.window, book.full.free, book.windowed.free)
                continue
            copy(memory, copies.full)
            copy(window_memory, copies.window)
            new = list(range(token + 1, token + 1 + count))
            token += count
            write(memory, row, row.full, row.stored, new)
            write(window_memory, row, row.window, row.stored, new)
            text += new
            book.advance(row, count)
        elif rows and what == "fork":
            rows.append(book.fork(rows[which % len(rows)]))
            texts.append(list(texts[which % len(texts)]))
        elif rows:
            book.release(rows.pop(which % len(rows)))
            texts.pop(which % (len(texts)))
        for row, text in zip(rows, texts, strict=True):
            assert [memory[row.full[p // SIZE], p % SIZE] for p in range(row.stored)] == text
            # The next token sees the last WINDOW - 1 of these.
            # One more is there, so that the last can be taken back.
            for p in range(max(0, row.stored - WINDOW), row.stored):
                assert window_memory[row.window[p // SIZE], p % SIZE] == text[p]
        for pool, tables in ((book.full, [r.full for r in rows]), (book.windowed, [r.window for r in rows])):
            held = np.bincount([p for t in tables for p in t if p], minlength=PAGES)
            np.testing.assert_array_equal(pool.holders, held)
            assert pool.free == PAGES - 1 - np.count_nonzero(held)
    for row in rows:
        book.release(row)
    assert book.full.free == book.windowed.free == PAGES - 1


def test_samples_of_one_prompt_share_all_but_the_page_they_write():
    book = PageBook(pages=100, window_pages=1, page_size=SIZE)
    prompt = PagedRow()
    book.reserve([prompt], [10])
    book.advance(prompt, 10)
    samples = [book.fork(prompt) for _ in range(8)]
    book.release(prompt)
    assert book.full.free == 99 - 3
    copies = book.reserve(samples, [1] * 8)
    assert len(copies.full) == 7, "the last of those that share the partial page keeps it"
    assert book.full.free == 99 - 3 - 7
    assert len({s.full[2] for s in samples}) == 8
    assert {s.full[0] for s in samples} == {samples[0].full[0]}


def test_window_pages_behind_the_window_return():
    book = PageBook(pages=1, window_pages=8, page_size=SIZE, full=False, window=WINDOW)
    row = PagedRow()
    for _ in range(50):
        book.reserve([row], [1])
        book.advance(row, 1)
        assert book.windowed.free >= 7 - 3
    assert row.full == []


def test_pages_reserved_in_vain_return():
    book = PageBook(pages=10, window_pages=1, page_size=SIZE)
    row = PagedRow()
    book.reserve([row], [20])
    book.advance(row, 5)
    book.trim(row)
    assert len(row.full) == 2
    assert book.full.free == 7


def test_an_exhausted_pool_says_what_it_lacks():
    book = PageBook(pages=3, window_pages=1, page_size=SIZE)
    with pytest.raises(OutOfPages, match="3 full pages are needed for 1 rows and 2 of 2 are free"):
        book.reserve([PagedRow()], [9])
    with pytest.raises(ValueError, match="page 1 is given back, but nobody holds it"):
        book.full.give_back([1])
