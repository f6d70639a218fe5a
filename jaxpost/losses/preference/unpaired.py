"""Losses of single answers, each desirable (rank 0) or undesirable (any rank above); all (answers, hyper) -> Term.

With l = log pi/pi_ref of an answer, b = beta, s the logistic function and w its side's weight ("desirable_weight",
"undesirable_weight"):

| function | loss of a desirable, of an undesirable answer | |
|---|---|---|
| `kto` | w [1 - s(b (l - z0))], w [1 - s(b (z0 - l))] | KTO 2402.01306 |
| `bco` | -w log s(b l - d), -w g log s(d - b l) | BCO 2404.04656 |
| `apo_zero_unpaired` | w [1 - s(b l)], w s(b l) | APO 2408.06266, answer by answer |

g is the strength of the answer, 1 but for weights by prompt (`assemble.prompt_weights`). z0 and d are statistics of the
whole batch, held fixed: these losses couple rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpost.losses.preference.pairs import Answers
from jaxpost.losses.preference.shapes import log_ratio
from jaxpost.metrics.terms import divide
from jaxpost.types import Hyper, Term


def kto(answers: Answers, hyper: Hyper) -> Term:
    """w [1 - s(+-b (l - z0))], the mean over answers: Kahneman-Tversky optimisation (2402.01306, equations 7 and 8).

    Args:
      hyper: "beta", "desirable_weight", "undesirable_weight".

    Example:
      >>> from jaxpost.losses.preference.pairs import AnswerStats
      >>> row = lambda *x: jnp.array([x])
      >>> stats = AnswerStats(row(-3.0, -4.0), row(2.0, 2.0), row(-3.0, -4.0))
      >>> hyper = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
      >>> kto(Answers(stats, row(1, 2), row(0, 1), row(1.0, 1.0)), hyper).value.tolist()
      [[0.5, 0.5]]
    """
    z = hyper["beta"] * (log_ratio(answers.stats) - kl_baseline(answers))
    return Term(_weight(answers, hyper) * jax.nn.sigmoid(-_sign(answers) * z), answers.valid.astype(jnp.float32))


def kl_baseline(answers: Answers) -> Float[Array, ""]:
    """z0 = max(0, mean of log pi/pi_ref over answers to other prompts), those of rank -1; 0 without any. No gradient.

    The paper's estimate of KL(pi, pi_ref): each prompt is paired with another example's answer.
    """
    others = ((answers.groups > 0) & (answers.ranks == -1) & (answers.stats.length > 0)).astype(jnp.float32)
    total = jnp.sum(jnp.where(others > 0, log_ratio(answers.stats), 0.0))
    return jax.lax.stop_gradient(jnp.maximum(divide(total, jnp.sum(others)), 0.0))


def bco(answers: Answers, hyper: Hyper) -> Term:
    """-E_desirable w log s(b l - d) - E_undesirable w g log s(d - b l): binary classifier optimisation (2404.04656).

    Each side has a mean of its own, so that it does not matter how many answers are desirable. g, the batch's strength
    of an undesirable answer, is the paper's density ratio of its prompt where one was estimated.

    Args:
      hyper: "beta", "desirable_weight", "undesirable_weight", and the reward shift "shift" d (`remember_shift`).
    """
    z = hyper["beta"] * log_ratio(answers.stats) - hyper["shift"]
    flags = [x.astype(jnp.float32) for x in _labels(answers)]
    share = sum((x * divide(jnp.ones(()), jnp.sum(x)) for x in flags), jnp.zeros(()))
    weight = _weight(answers, hyper) * jnp.where(answers.ranks > 0, answers.strengths, 1.0)
    return Term(-weight * jax.nn.log_sigmoid(_sign(answers) * z), share, jnp.sum(share))


def remember_shift(answers: Answers, hyper: Hyper, memory: dict[str, Array]) -> dict[str, Array]:
    """BCO's reward shift d: the middle between the mean rewards of both sides, averaged over steps.

    A batch's d is (E_desirable b l + E_undesirable b l) / 2, and of a batch without one of them the other's mean. The
    average forgets by hyper["shift_decay"] a step and starts unbiased; 0: every batch has its own. No gradient.

    Returns: "shift", and the "shift_sum" and "shift_count" that it is the ratio of.
    """
    rewards = jax.lax.stop_gradient(hyper["beta"] * log_ratio(answers.stats))
    counts = [jnp.sum(x.astype(jnp.float32)) for x in _labels(answers)]
    means = [divide(jnp.sum(jnp.where(x, rewards, 0.0)), n) for x, n in zip(_labels(answers), counts, strict=True)]
    sides = sum(((n > 0).astype(jnp.float32) for n in counts), jnp.zeros(()))
    some, keep = (sides > 0).astype(jnp.float32), hyper["shift_decay"]
    total = keep * memory["shift_sum"] + (1.0 - keep) * divide(means[0] + means[1], sides)
    count = keep * memory["shift_count"] + (1.0 - keep) * some
    return {"shift_sum": total, "shift_count": count, "shift": divide(total, count)}


def no_shift() -> dict[str, Array]:
    """What `remember_shift` knows before the first step."""
    return {name: jnp.zeros((), jnp.float32) for name in ("shift_sum", "shift_count", "shift")}


def apo_zero_unpaired(answers: Answers, hyper: Hyper) -> Term:
    """w [1 - s(b l)] of desirable, w s(b l) of undesirable answers: `apo_zero` answer by answer (2408.06266).

    Equal to `kto` with z0 = 0.
    """
    z = hyper["beta"] * log_ratio(answers.stats)
    return Term(_weight(answers, hyper) * jax.nn.sigmoid(-_sign(answers) * z), answers.valid.astype(jnp.float32))


def _labels(answers: Answers) -> tuple[Bool[Array, "B S"], Bool[Array, "B S"]]:
    return answers.valid & (answers.ranks == 0), answers.valid & (answers.ranks > 0)


def _sign(answers: Answers) -> Float[Array, "B S"]:
    return jnp.where(answers.ranks == 0, 1.0, -1.0)


def _weight(answers: Answers, hyper: Hyper) -> Float[Array, "B S"]:
    return jnp.where(answers.ranks == 0, hyper["desirable_weight"], hyper["undesirable_weight"])
