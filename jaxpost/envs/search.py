"""Ranking of passages by their words: BM25 in NumPy, over an index that is made once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text, without case.

    >>> words("BM25: the 2nd rank!")
    ['bm25', 'the', '2nd', 'rank']
    """
    return [word.casefold() for word in _WORD.findall(text)]


class Bm25:
    """score(d) = sum over query words w of idf(w) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean length)).

    f is w's count in passage d, idf(w) = log(1 + (N - n + 0.5) / (n + 0.5)) with n of the N passages holding w.
    Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009.

    >>> Bm25(["a cat sat", "a dog ran", "the cat and the dog"]).search("cat", 1)[0][0]
    0

    Args:
      k1: how soon a repeated word counts no more.
      b: how much a long passage counts less, 0 to 1.

    Raises:
      ValueError: there are no passages.
    """

    def __init__(self, passages: Sequence[str], *, k1: float = 1.2, b: float = 0.75):
        if not passages:
            raise ValueError("a corpus without passages cannot be searched")
        counts = [Counter(words(passage)) for passage in passages]
        lengths = np.asarray([sum(count.values()) for count in counts], np.float64)
        norm = k1 * (1 - b + b * lengths / max(float(lengths.mean()), 1.0))
        self.size = len(passages)
        places: dict[str, list[int]] = {}
        for at, count in enumerate(counts):
            for word in count:
                places.setdefault(word, []).append(at)
        self._postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, at in places.items():
            where = np.asarray(at, np.int64)
            f = np.asarray([counts[i][word] for i in at], np.float64)
            idf = np.log(1 + (self.size - len(at) + 0.5) / (len(at) + 0.5))
            self._postings[word] = where, idf * f * (k1 + 1) / (f + norm[where])

    def search(self, query: str, count: int) -> list[tuple[int, float]]:
        """The best passages that hold a word of the query: (number, score), the first of equals first."""
        scores = np.zeros(self.size)
        for word, times in Counter(words(query)).items():
            if word in self._postings:
                where, weights = self._postings[word]
                scores[where] += times * weights
        best = np.argsort(-scores, kind="stable")[:count]
        return [(int(at), float(scores[at])) for at in best if scores[at] > 0]
