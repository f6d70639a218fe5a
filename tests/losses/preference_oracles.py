"""Preference losses in float64 NumPy, written from the papers: loops over pairs, no shared code with the library.

A `Pair` holds what is known of two answers. Every oracle is (pairs, hyper) -> the mean loss of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Pair:
    """Token log-probabilities of the chosen (c) and the rejected (r) answer, and of the reference."""

    c: np.ndarray
    r: np.ndarray
    ref_c: np.ndarray
    ref_r: np.ndarray
    like_c: np.ndarray
    """log pi(y_t) - log sum_v pi(v)^2, held fixed."""
    like_r: np.ndarray
    other: np.ndarray
    """log pi and log pi_ref of an answer to another prompt, two rows."""
    strength: float = 1.0


def sig(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def nls(x: float) -> float:
    """-log sigmoid."""
    return math.log(1.0 + math.exp(-x))


def ratios(p: Pair) -> tuple[float, float]:
    return p.c.sum() - p.ref_c.sum(), p.r.sum() - p.ref_r.sum()


def scores(p: Pair, h: dict[str, Any]) -> tuple[float, float]:
    """f'(pi/pi_ref) of both sides, 2309.16240 table 1."""
    kind = h.get("divergence", "reverse_kl")
    derivative = {
        "reverse_kl": lambda u: math.log(u) + 1,
        "forward_kl": lambda u: -1 / u,
        "jensen_shannon": lambda u: math.log(2 * u / (1 + u)),
        "alpha": lambda u: (1 - u ** (-h["alpha"])) / h["alpha"],
    }[kind]
    c, r = ratios(p)
    return derivative(math.exp(c)), derivative(math.exp(r))


def per_pair(f: Callable[[Pair, dict[str, Any]], float]) -> Callable[..., float]:
    return lambda pairs, h: float(np.mean([f(p, h) for p in pairs]))


def smooth(z: float, h: dict[str, Any]) -> float:
    e = h.get("label_smoothing", 0.0)
    return (1 - e) * nls(z) + e * nls(-z)


def dpo(p: Pair, h: dict[str, Any]) -> float:
    c, r = scores(p, h)
    return smooth(h["beta"] * (c - r) - h.get("margin", 0.0) * p.strength, h)


def dpo_norm(p: Pair, h: dict[str, Any]) -> float:
    c, r = ratios(p)
    return smooth(h["beta"] * (c / len(p.c) - r / len(p.r)) - h.get("margin", 0.0) * p.strength, h)


def ld_dpo(p: Pair, h: dict[str, Any]) -> float:
    n = min(len(p.c), len(p.r))
    total = lambda x: x[:n].sum() + h["ld_alpha"] * x[n:].sum()  # noqa: E731
    d = total(p.c) - total(p.ref_c) - total(p.r) + total(p.ref_r)
    return smooth(h["beta"] * d, h)


def wpo(p: Pair, h: dict[str, Any]) -> float:
    return math.exp(p.like_c.mean()) * math.exp(p.like_r.mean()) * dpo(p, h)


def robust(p: Pair, h: dict[str, Any]) -> float:
    c, r = scores(p, h)
    e, z = h["label_smoothing"], h["beta"] * (c - r)
    return ((1 - e) * nls(z) - e * nls(-z)) / (1 - 2 * e)


def hinge(p: Pair, h: dict[str, Any]) -> float:
    c, r = scores(p, h)
    return max(0.0, 1 - h["beta"] * (c - r))


def ipo(p: Pair, h: dict[str, Any]) -> float:
    c, r = ratios(p)
    return (c / len(p.c) - r / len(p.r) - 1 / (2 * h["beta"])) ** 2


def ipo_sum(p: Pair, h: dict[str, Any]) -> float:
    c, r = ratios(p)
    return (c - r - 1 / (2 * h["beta"])) ** 2


def exo(p: Pair, h: dict[str, Any]) -> float:
    c, r = scores(p, h)
    z, e = h["beta"] * (c - r), h["label_smoothing"]
    model, label = [math.exp(z) / (1 + math.exp(z)), 1 / (1 + math.exp(z))], [1 - e, e]
    return sum(m * math.log(m / q) for m, q in zip(model, label, strict=True))


def nca(p: Pair, h: dict[str, Any]) -> float:
    c, r = (h["beta"] * x for x in ratios(p))
    return nls(c) + 0.5 * nls(-c) + 0.5 * nls(-r)


def bco_pair(p: Pair, h: dict[str, Any]) -> float:
    c, r = (h["beta"] * x for x in ratios(p))
    return nls(c) + nls(-r)


def sppo(p: Pair, h: dict[str, Any]) -> float:
    """(log ratio - eta (P - 1/2))^2 with P = 1 of the winner and 0 of the loser, eta = 1 / beta."""
    c, r = ratios(p)
    eta = 1 / h["beta"]
    return (c - eta * (1 - 0.5)) ** 2 + (r - eta * (0 - 0.5)) ** 2


def apo_zero(p: Pair, h: dict[str, Any]) -> float:
    c, r = (h["beta"] * x for x in ratios(p))
    return 1 - sig(c) + sig(r)


def apo_down(p: Pair, h: dict[str, Any]) -> float:
    c, r = (h["beta"] * x for x in ratios(p))
    return sig(c) + 1 - sig(c - r)


def discopop(p: Pair, h: dict[str, Any]) -> float:
    c, r = scores(p, h)
    z = h["beta"] * (c - r)
    mix = sig(z / h["tau"])
    return (1 - mix) * nls(z) + mix * math.exp(-z)


def orpo(p: Pair, h: dict[str, Any]) -> float:
    pc, pr = math.exp(p.c.mean()), math.exp(p.r.mean())
    ratio = (pc / (1 - pc)) / (pr / (1 - pr))
    return -p.c.mean() + h["odds_weight"] * nls(math.log(ratio))


def simpo(p: Pair, h: dict[str, Any]) -> float:
    return smooth(h["beta"] * p.c.mean() - h["beta"] * p.r.mean() - h["gamma"], h)


def alphapo(p: Pair, h: dict[str, Any]) -> float:
    if h["alpha"] == 0:
        return simpo(p, h)
    q = lambda x: h["beta"] * (1 - math.exp(x.mean()) ** -h["alpha"]) / h["alpha"]  # noqa: E731
    return smooth(q(p.c) - q(p.r) - h["gamma"], h)


def cpo(p: Pair, h: dict[str, Any]) -> float:
    return smooth(h["beta"] * (p.c.sum() - p.r.sum()), h) - h["nll_coef"] * p.c.mean()


def nll(pairs: Sequence[Pair], h: dict[str, Any]) -> float:
    if h["mean"] == "token":
        return -float(np.concatenate([p.c for p in pairs]).mean())
    return -float(np.mean([p.c.mean() if h["mean"] == "answer" else p.c.sum() for p in pairs]))


def xpo(pairs: Sequence[Pair], h: dict[str, Any]) -> float:
    """The rejected answers of even pairs and the chosen ones of odd pairs are the reference's."""
    return float(np.mean([(p.c if i % 2 else p.r).sum() for i, p in enumerate(pairs)]))


def aot(pairs: Sequence[Pair], h: dict[str, Any]) -> float:
    now = sorted(p.c.sum() - p.r.sum() for p in pairs)
    before = sorted(p.ref_c.sum() - p.ref_r.sum() for p in pairs)
    return float(np.mean([smooth(h["beta"] * (u - v), h) for u, v in zip(now, before, strict=True)]))


def aot_unpaired(pairs: Sequence[Pair], h: dict[str, Any]) -> float:
    chosen, rejected = (sorted(side) for side in zip(*(ratios(p) for p in pairs), strict=True))
    return float(np.mean([smooth(h["beta"] * (u - v), h) for u, v in zip(chosen, rejected, strict=True)]))


class Fixed:
    """Statistics that are held fixed: what they are at first, whatever is asked for later (finite differences)."""

    def __init__(self) -> None:
        self.known: float | None = None

    def __call__(self, value: float) -> float:
        self.known = value if self.known is None else self.known
        return self.known


def kto(pairs: Sequence[Pair], h: dict[str, Any]) -> float:
    z0 = h["fixed"](max(0.0, float(np.mean([p.other[0].sum() - p.other[1].sum() for p in pairs]))))
    up, down, b = h["desirable_weight"], h["undesirable_weight"], h["beta"]
    good = [up * (1 - sig(b * (ratios(p)[0] - z0))) for p in pairs]
    bad = [down * (1 - sig(b * (z0 - ratios(p)[1]))) for p in pairs]
    return float(np.mean(good + bad))


def bco(pairs: Sequence[Pair], h: dict[str, Any]) -> float:
    """The first batch of a run: the shift is its own."""
    b = h["beta"]
    good, bad = ([b * ratios(p)[i] for p in pairs] for i in (0, 1))
    shift = h["fixed"]((float(np.mean(good)) + float(np.mean(bad))) / 2)
    up = np.mean([nls(x - shift) for x in good])
    down = np.mean([p.strength * nls(-(x - shift)) for p, x in zip(pairs, bad, strict=True)])
    return float(h["desirable_weight"] * up + h["undesirable_weight"] * down)


def apo_zero_unpaired(pairs: Sequence[Pair], h: dict[str, Any]) -> float:
    good = [h["desirable_weight"] * (1 - sig(h["beta"] * ratios(p)[0])) for p in pairs]
    bad = [h["undesirable_weight"] * sig(h["beta"] * ratios(p)[1]) for p in pairs]
    return float(np.mean(good + bad))


PAIRWISE = [
    dpo, dpo_norm, ld_dpo, wpo, robust, hinge, ipo, ipo_sum, exo, nca, bco_pair, sppo, apo_zero, apo_down, discopop,
    orpo, simpo, alphapo, cpo,
]  # fmt: skip
WHOLE = [nll, xpo, aot, aot_unpaired, kto, bco, apo_zero_unpaired]
ORACLES: dict[str, Callable[..., float]] = {f.__name__: per_pair(f) for f in PAIRWISE} | {f.__name__: f for f in WHOLE}
