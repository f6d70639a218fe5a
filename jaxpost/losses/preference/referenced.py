"""Losses of pairs relative to a reference policy.

With c = log pi/pi_ref of the chosen and r of the rejected answer, D = c - r, s the logistic function, b = beta, e the
label smoothing, |y| an answer's tokens:

| function | loss of a pair | |
|---|---|---|
| `dpo` | -log s(b D); smoothed: -(1 - e) log s(b D) - e log s(-b D) | DPO 2305.18290, cDPO |
| `robust` | [-(1 - e) log s(b D) + e log s(-b D)] / (1 - 2 e) | robust DPO 2403.00409 |
| `hinge` | max(0, 1 - b D) | SLiC's norm on ratios 2309.06657 |
| `ipo` | (c / y_c - r / y_r - 1 / (2 b))^2, y_c and y_r the lengths | IPO 2310.12036, as its authors ran it |
| `ipo_sum` | (D - 1 / (2 b))^2 | IPO as its formula says |
| `exo` | s(b D) log [s(b D) / (1 - e)] + s(-b D) log [s(-b D) / e] | EXO 2402.00856 |
| `nca` | -log s(b c) - log s(-b c) / 2 - log s(-b r) / 2 | NCA 2402.05369 |
| `bco_pair` | -log s(b c) - log s(-b r) | BCO without its shift 2404.04656 |
| `sppo` | (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2 | SPPO 2405.00675, won and lost for certain |
| `apo_zero` | [1 - s(b c)] + s(b r) | APO 2408.06266 |
| `apo_down` | s(b c) + [1 - s(b D)] | APO |
| `discopop` | (1 - m) (-log s(b D)) + m exp(-b D), m = s(b D / tau) | DiscoPOP 2406.08414 |
| `dpo_norm` | -log s(b (c / y_c - r / y_r)) | length-normalised DPO, Tulu 3 2411.15124 |
| `ld_dpo` | `dpo` with the tokens beyond the shorter answer's length counted alpha times | LD-DPO 2409.06411 |
| `wpo` | w_c w_r `dpo`, w = exp(mean_t log [pi(y_t) / sum_v pi(v)^2]) held fixed | WPO 2406.11827 |

Self-play fine-tuning (SPIN, 2401.01335) is `dpo` on pairs of a given answer and the policy's own, the policy of the
last round being the reference. Every function is (pairs, hyper) -> [B P].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpost.losses.preference.divergences import Divergence, reverse_kl
from jaxpost.losses.preference.pairs import AnswerStats, Sides
from jaxpost.losses.preference.shapes import bounded_exp, known, log_ratio, logistic, per_token
from jaxpost.types import Hyper

log_sigmoid = jax.nn.log_sigmoid


def margin(pairs: Sides, hyper: Hyper, divergence: Divergence = reverse_kl) -> Float[Array, "B P"]:
    """beta D: the difference of the two implicit rewards; 0 before the first step."""
    chosen, rejected = (divergence(log_ratio(side), hyper) for side in (pairs.chosen, pairs.rejected))
    return hyper["beta"] * (chosen - rejected)


def dpo(pairs: Sides, hyper: Hyper, *, divergence: Divergence = reverse_kl) -> Float[Array, "B P"]:
    """-log s(b D - m k): direct preference optimisation (2305.18290).

    Args:
      hyper: "beta"; "label_smoothing" e, the share of labels that are taken to be wrong: conservative DPO
        (the DPO paper's authors; compared in 2403.00409); "margin" m times the pair's strength k: the chosen answer has
        to be better by so much (DPO with an offset, 2402.10571). The last two default to 0.
      divergence: what takes the place of log pi/pi_ref.

    Example:
      >>> row = lambda *x: jnp.array([x])
      >>> side = AnswerStats(row(-3.0), row(2.0), row(-3.0))  # the policy is its own reference
      >>> round(float(dpo(Sides(side, side, row(1.0), row(1.0)), {"beta": 0.1})[0, 0]), 4)  # log 2
      0.6931
    """
    return logistic(margin(pairs, hyper, divergence) - hyper.get("margin", 0.0) * pairs.strength, hyper)


def robust(pairs: Sides, hyper: Hyper, *, divergence: Divergence = reverse_kl) -> Float[Array, "B P"]:
    """[-(1 - e) log s(b D) + e log s(-b D)] / (1 - 2 e): unbiased when a share e of labels is flipped (2403.00409)."""
    z, noise = margin(pairs, hyper, divergence), hyper["label_smoothing"]
    return (noise * log_sigmoid(-z) - (1.0 - noise) * log_sigmoid(z)) / (1.0 - 2.0 * noise)


def hinge(pairs: Sides, hyper: Hyper, *, divergence: Divergence = reverse_kl) -> Float[Array, "B P"]:
    """max(0, 1 - b D): the hinge loss on likelihood ratios (RSO, 2309.06657; SLiC, 2305.10425, without the ratios)."""
    return jax.nn.relu(1.0 - margin(pairs, hyper, divergence))


def ipo(pairs: Sides, hyper: Hyper, *, divergence: Divergence = reverse_kl) -> Float[Array, "B P"]:
    """(c / y_c - r / y_r - 1 / (2 b))^2: identity preference optimisation per token (2310.12036, equation 17).

    The paper's beta is its regulariser tau. Its formula has sums over tokens (`ipo_sum`); its authors' results, and
    most libraries, have means.
    """
    chosen, rejected = _per_token(pairs, hyper, divergence)
    return (chosen - rejected - 0.5 / hyper["beta"]) ** 2


def ipo_sum(pairs: Sides, hyper: Hyper, *, divergence: Divergence = reverse_kl) -> Float[Array, "B P"]:
    """(D - 1 / (2 b))^2: identity preference optimisation with sums over tokens (2310.12036, equation 17)."""
    return (margin(pairs, {**hyper, "beta": 1.0}, divergence) - 0.5 / hyper["beta"]) ** 2


def exo(pairs: Sides, hyper: Hyper, *, divergence: Divergence = reverse_kl) -> Float[Array, "B P"]:
    """KL(p || q) with p = (s(b D), s(-b D)), q = (1 - e, e): exact optimisation of pairs (2402.00856, equation 16).

    Args:
      hyper: "beta"; "label_smoothing" e in (0, 1): at 0 the divergence would be infinite.
    """
    z, e = margin(pairs, hyper, divergence), jnp.asarray(hyper["label_smoothing"], jnp.float32)
    win, lose = log_sigmoid(z), log_sigmoid(-z)
    return jnp.exp(win) * (win - jnp.log1p(-e)) + jnp.exp(lose) * (lose - jnp.log(e))


def nca(pairs: Sides, hyper: Hyper) -> Float[Array, "B P"]:
    """-log s(b c) - log s(-b c) / 2 - log s(-b r) / 2: noise-contrastive alignment of pairs (2402.05369).

    It sets each answer's likelihood, not only their difference.
    """
    chosen, rejected = _rewards(pairs, hyper)
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def bco_pair(pairs: Sides, hyper: Hyper) -> Float[Array, "B P"]:
    """-log s(b c) - log s(-b r): a classifier of single answers, without a shift (2404.04656; with it: `unpaired.bco`).

    Example:
      >>> row = lambda *x: jnp.array([x])
      >>> side = AnswerStats(row(-3.0), row(2.0), row(-3.0))
      >>> round(float(bco_pair(Sides(side, side, row(1.0), row(1.0)), {"beta": 0.1})[0, 0]), 4)  # 2 log 2
      1.3863
    """
    chosen, rejected = _rewards(pairs, hyper)
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


def sppo(pairs: Sides, hyper: Hyper) -> Float[Array, "B P"]:
    """(c - 1 / (2 b))^2 + (r + 1 / (2 b))^2: self-play preference optimisation (2405.00675, equation 4.7).

    The paper's eta is 1 / b, and its win probabilities are 1 and 0 here.
    """
    goal = 0.5 / hyper["beta"]
    return (log_ratio(pairs.chosen) - goal) ** 2 + (log_ratio(pairs.rejected) + goal) ** 2


def apo_zero(pairs: Sides, hyper: Hyper) -> Float[Array, "B P"]:
    """[1 - s(b c)] + s(b r): anchored preference optimisation, chosen up and rejected down (2408.06266, equation 7).

    For chosen answers that are better than the policy's own. The paper leaves out the constant 1.
    """
    chosen, rejected = _rewards(pairs, hyper)
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down(pairs: Sides, hyper: Hyper) -> Float[Array, "B P"]:
    """s(b c) + [1 - s(b D)]: anchored preference optimisation, both down, rejected more (2408.06266, equation 8).

    For chosen answers that are worse than the policy's own. The paper leaves out the constant 1.
    """
    return jax.nn.sigmoid(_rewards(pairs, hyper)[0]) + jax.nn.sigmoid(-margin(pairs, hyper))


def discopop(pairs: Sides, hyper: Hyper, *, divergence: Divergence = reverse_kl) -> Float[Array, "B P"]:
    """(1 - m) (-log s(b D)) + m exp(-b D), m = s(b D / tau): the log-ratio modulated loss (2406.08414, equation 5).

    Args:
      hyper: "beta", "tau" (the paper: 0.05).
    """
    z = margin(pairs, hyper, divergence)
    mix = jax.nn.sigmoid(z / hyper["tau"])
    return -(1.0 - mix) * log_sigmoid(z) + mix * bounded_exp(-z)


def dpo_norm(pairs: Sides, hyper: Hyper, *, divergence: Divergence = reverse_kl) -> Float[Array, "B P"]:
    """-log s(b (c / y_c - r / y_r) - m k): length-normalised DPO, as Tulu 3 trains (2411.15124); smoothed as `dpo`."""
    chosen, rejected = _per_token(pairs, hyper, divergence)
    return logistic(hyper["beta"] * (chosen - rejected) - hyper.get("margin", 0.0) * pairs.strength, hyper)


def ld_dpo(pairs: Sides, hyper: Hyper, *, divergence: Divergence = reverse_kl) -> Float[Array, "B P"]:
    """`dpo` with log p = sum_{t <= n} log p_t + alpha sum_{t > n} log p_t, n the shorter answer's tokens (2409.06411).

    Args:
      hyper: "ld_alpha", between 0 (what exceeds the shorter answer does not count) and 1 (`dpo`); and those of `dpo`.
    """
    mixed = Sides(*(_desensitised(x, hyper["ld_alpha"]) for x in (pairs.chosen, pairs.rejected)), *pairs[2:])
    return dpo(mixed, hyper, divergence=divergence)


def _desensitised(side: AnswerStats, alpha: Array | float) -> AnswerStats:
    mix = lambda whole, shared: shared + alpha * (whole - shared)  # noqa: E731
    now, ref = mix(side.logprob, known(side.shared)), mix(known(side.ref_logprob), known(side.ref_shared))
    return side._replace(logprob=now, ref_logprob=ref)


def desensitised_reward(stats: AnswerStats, hyper: Hyper) -> Float[Array, "*S"]:
    """beta log(pi / pi_ref) as `ld_dpo` counts tokens."""
    return hyper["beta"] * log_ratio(_desensitised(stats, hyper["ld_alpha"]))


def wpo(pairs: Sides, hyper: Hyper, *, divergence: Divergence = reverse_kl) -> Float[Array, "B P"]:
    """w_c w_r `dpo`: pairs count as much as they look like the policy's own answers (2406.11827, equation 2).

    w = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2]), without gradient: 1 for what the policy would say itself.
    """
    return own_likeness(pairs) * dpo(pairs, hyper, divergence=divergence)


def own_likeness(pairs: Sides) -> Float[Array, "B P"]:
    """The product of both sides' WPO weights."""
    each = (per_token(known(side.likeness), side) for side in (pairs.chosen, pairs.rejected))
    return jax.lax.stop_gradient(bounded_exp(sum(each, jnp.zeros(()))))


def _per_token(pairs: Sides, hyper: Hyper, divergence: Divergence) -> tuple[Array, Array]:
    sides = pairs.chosen, pairs.rejected
    chosen, rejected = (per_token(divergence(log_ratio(side), hyper), side) for side in sides)
    return chosen, rejected


def _rewards(pairs: Sides, hyper: Hyper) -> tuple[Array, Array]:
    return hyper["beta"] * log_ratio(pairs.chosen), hyper["beta"] * log_ratio(pairs.rejected)
