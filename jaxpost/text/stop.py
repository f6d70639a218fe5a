"""Stop strings, found while text arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def first_stop(text: str, stops: Sequence[str], after: int = 0) -> tuple[int, int] | None:
    """Where the stop string that is whole first begins and ends; of two that end together, the longer one.

    >>> first_stop("a END b END", ["END", "b "]), first_stop("a END b END", ["END"], after=5)
    ((2, 5), (8, 11))

    Args:
      after: one counts if it ends beyond this many characters.
    """
    hits = [(at + len(s), at) for s in stops if (at := text.find(s, max(0, after - len(s) + 1))) >= 0]
    end, begin = min(hits, default=(-1, -1))
    return (begin, end) if hits else None


class StopDetector:
    """Passes text through up to the first stop string; holds back an end that may yet become one.

    >>> stop = StopDetector(["END", "\\n\\n"])
    >>> stop.feed("a E"), stop.feed("N"), stop.feed("d\\n"), stop.feed("\\nmore"), stop.found
    ('a ', '', 'ENd', '', '\\n\\n')

    Attributes:
      found: the stop string that ended the text, or None so far.
    """

    def __init__(self, stops: Sequence[str]):
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str, early: int = 0) -> str:
        """Takes new text and gives what is certain to come before any stop string; '' after one was found.

        The stop string that is complete first counts (`first_stop`), so the result does not depend on how the text was
        cut; but none that is complete within the first `early` characters of this text.
        """
        if self.found is not None:
            return ""
        early += len(self._held)
        self._held += text
        place = first_stop(self._held, self._stops, early)
        if place is not None:
            begin, end = place
            self.found, out, self._held = self._held[begin:end], self._held[:begin], ""
            return out
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0
