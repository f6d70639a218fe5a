"""Stop strings: however the text is cut into pieces, the result is that of a character-by-character search."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost.text.stop import StopDetector


def reference(text: str, stops: list[str], early: int = 0) -> tuple[str, str | None]:
    for end in range(early + 1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end - len(stop)], stop
    return text, None


words = st.text("ab\n", min_size=1, max_size=4)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text("ab\n", max_size=4), max_size=8), st.lists(words, max_size=3), st.integers(0, 12))
def test_pieces_do_not_matter_nor_stops_that_come_too_early(pieces, stops, early):
    detector, out, told = StopDetector(stops), "", 0
    for piece in pieces:
        out += detector.feed(piece, min(max(0, early - told), len(piece)))
        told += len(piece)
    out += detector.flush()
    assert (out, detector.found) == reference("".join(pieces), stops, early)


@settings(deadline=None)
@given(st.lists(words, max_size=8), words)
def test_nothing_is_held_longer_than_it_must(pieces, stop):
    detector = StopDetector([stop])
    out = "".join(detector.feed(piece) for piece in pieces)
    if detector.found is None:
        held = "".join(pieces)[len(out) :]
        assert stop.startswith(held)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopDetector(["a", ""])
