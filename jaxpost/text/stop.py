"""Stop strings, found while text arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


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

    def feed(self, text: str) -> str:
        """Takes new text and gives what is certain to come before any stop string; '' after one was found.

        The stop string that is complete first counts, so the result does not depend on how the text was cut; of two
        that end together, the longer one.
        """
        if self.found is not None:
            return ""
        self._held += text
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            out, self._held = self._held[:at], ""
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
