"""Surrogates: what a policy gradient differentiates of every token.

Let a token have the log-probability log pi, the ratio rho = pi / pi_old and the advantage A. Each token's loss is

| function | loss of a token | its hyper-parameters |
|---|---|---|
| `reinforce` | -A log pi | |
| `ppo` | -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (1707.06347) | clip_low, clip_high, dual_clip |
| `gspo` | the same with the sample's ratio exp(mean_t log rho_t) (2507.18071) | the same |
| `gmpo` | -A exp(mean_t of log rho_t, held within -clip_low .. clip_high) (2507.20673) | clip_low, clip_high |
| `cispo` | -sg(min(rho, 1 + clip_high)) A log pi (2506.13585) | clip_high |
| `cispo_two_sided` | -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi | clip_low, clip_high |
| `sapo` | -A (4 / tau) s(tau (rho - 1)), tau by the sign of A (2511.20347) | tau_positive, tau_negative |

Where pi = pi_old, the gradient of each is -A grad log pi (of `gmpo` and a mean over each sample's tokens).
`policy_gradient` runs the model and adds the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpost.losses.aggregate import segment_sums
from jaxpost.losses.kl import LIMIT
from jaxpost.types import Hyper


class Tokens(NamedTuple):
    """What a surrogate reads of every token; all 0 where the weight is 0."""

    logprobs: Float[Array, "B T"]
    """Of the policy that is being differentiated."""
    old_logprobs: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    weights: Float[Array, "B T"]
    segments: Int[Array, "B T"]


class Surrogate(NamedTuple):
    """Each token's loss, and where its ratio was held."""

    value: Float[Array, "B T"]
    low: Bool[Array, "B T"]
    high: Bool[Array, "B T"]


SurrogateFn = Callable[[Tokens, Hyper], Surrogate]


def ratio(log_ratio: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """exp(log rho), constant where |log rho| exceeds `kl.LIMIT`."""
    return jnp.exp(jnp.clip(log_ratio, -LIMIT, LIMIT))


def reinforce(tokens: Tokens, hyper: Hyper) -> Surrogate:
    """-A log pi: REINFORCE, for samples of the current policy."""
    never = jnp.zeros(tokens.logprobs.shape, bool)
    return Surrogate(-tokens.advantages * tokens.logprobs, never, never)


def ppo(tokens: Tokens, hyper: Hyper) -> Surrogate:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (1707.06347; clip-higher: 2503.14476).

    With hyper["dual_clip"] = c > 1 + clip_high, the loss of a token with A < 0 is at most -c A, however large rho is:
    dual clip (1912.09729), the same as holding rho below c first (two-sided clip, 2505.07291).

    Example:
      >>> row = lambda *x: jnp.array([x])
      >>> tokens = Tokens(jnp.log(row(2.0, 2.0)), row(0.0, 0.0), row(1.0, -1.0), row(1.0, 1.0), row(1, 1))
      >>> [round(float(x), 3) for x in ppo(tokens, {"clip_low": 0.2, "clip_high": 0.25}).value[0]]
      [-1.25, 2.0]
      >>> hyper = {"clip_low": 0.2, "clip_high": 0.25, "dual_clip": 1.5}
      >>> [round(float(x), 3) for x in ppo(tokens, hyper).value[0]]
      [-1.25, 1.5]
    """
    return _clipped(ratio(tokens.logprobs - tokens.old_logprobs), tokens.advantages, hyper)


def gspo(tokens: Tokens, hyper: Hyper) -> Surrogate:
    """`ppo` with one ratio for all tokens of a sample, s = exp(mean_t log rho_t) (2507.18071).

    Written s sg(pi)^-1 pi per token, the paper's GSPO-token: where a sample has one advantage and each token its share
    1/|o| of the sample's mean, value and gradient are GSPO's; advantages may also differ within a sample.
    """
    mean = _sample_mean(tokens.logprobs - tokens.old_logprobs, tokens)
    per_token = jax.lax.stop_gradient(mean) + tokens.logprobs - jax.lax.stop_gradient(tokens.logprobs)
    return _clipped(ratio(per_token), tokens.advantages, hyper)


def cispo(tokens: Tokens, hyper: Hyper) -> Surrogate:
    """-sg(min(rho, 1 + clip_high)) A log pi: the weight is held from above only, no token loses its gradient.

    This is how the paper (2506.13585) trains. Some libraries call the cap itself, 1 + clip_high, "epsilon high".
    """
    rho = ratio(jax.lax.stop_gradient(tokens.logprobs) - tokens.old_logprobs)
    cap = 1.0 + hyper["clip_high"]
    high = rho > cap
    return Surrogate(-jnp.minimum(rho, cap) * tokens.advantages * tokens.logprobs, jnp.zeros_like(high), high)


def cispo_two_sided(tokens: Tokens, hyper: Hyper) -> Surrogate:
    """-sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi: the paper's formula, both sides held (2506.13585)."""
    rho = ratio(jax.lax.stop_gradient(tokens.logprobs) - tokens.old_logprobs)
    floor, cap = 1.0 - hyper["clip_low"], 1.0 + hyper["clip_high"]
    held = jnp.clip(rho, floor, cap)
    return Surrogate(-held * tokens.advantages * tokens.logprobs, rho < floor, rho > cap)


def gmpo(tokens: Tokens, hyper: Hyper) -> Surrogate:
    """-A exp(mean_t of log rho_t, held): the geometric mean of a sample's token ratios (2507.20673).

    A token's log rho is held where more of it would serve the advantage: below clip_high where A > 0, above -clip_low
    where A < 0, so that the bounds of rho are exp(-clip_low) and exp(clip_high). The other tokens of the sample keep
    their gradient. Every token of a sample has the sample's value.

    Example:
      >>> row = lambda *x: jnp.array([x])
      >>> tokens = Tokens(jnp.array([[0.9, -0.1]]), row(0.0, 0.0), row(1.0, 1.0), row(1.0, 1.0), row(1, 1))
      >>> surrogate = gmpo(tokens, {"clip_low": 0.4, "clip_high": 0.4})
      >>> [round(float(x), 3) for x in surrogate.value[0]]  # exp((0.4 - 0.1) / 2)
      [-1.162, -1.162]
    """
    log_ratio = tokens.logprobs - tokens.old_logprobs
    high = (tokens.advantages > 0) & (log_ratio > hyper["clip_high"])
    low = (tokens.advantages < 0) & (log_ratio < -hyper["clip_low"])
    held = jnp.where(high, hyper["clip_high"], jnp.where(low, -hyper["clip_low"], log_ratio))
    mean = _sample_mean(held, tokens)
    return Surrogate(-tokens.advantages * ratio(mean), low, high)


def sapo(tokens: Tokens, hyper: Hyper) -> Surrogate:
    """-A (4 / tau) s(tau (rho - 1)), s the logistic function: a soft gate in place of a clip (2511.20347).

    tau is tau_positive where A > 0 and tau_negative elsewhere; the larger it is, the sooner a token whose ratio has
    moved loses its gradient, A rho sech^2(tau (rho - 1) / 2).

    Example:
      >>> row = lambda *x: jnp.array([x])
      >>> tokens = Tokens(jnp.log(row(1.0, 2.0)), row(0.0, 0.0), row(1.0, 1.0), row(1.0, 1.0), row(1, 1))
      >>> [round(float(x), 3) for x in sapo(tokens, {"tau_positive": 1.0, "tau_negative": 1.05}).value[0]]
      [-2.0, -2.924]
    """
    tau = jnp.where(tokens.advantages > 0, hyper["tau_positive"], hyper["tau_negative"])
    gate = 4.0 / tau * jax.nn.sigmoid(tau * (ratio(tokens.logprobs - tokens.old_logprobs) - 1.0))
    never = jnp.zeros(tokens.logprobs.shape, bool)
    return Surrogate(-tokens.advantages * gate, never, never)


def _sample_mean(x: Array, tokens: Tokens) -> Array:
    """Every token's sample's mean of x over the tokens that have a weight."""
    on = (tokens.weights != 0).astype(x.dtype)
    return segment_sums(on * x, tokens.segments) / jnp.maximum(segment_sums(on, tokens.segments), 1.0)


def _clipped(rho: Array, advantages: Array, hyper: Hyper) -> Surrogate:
    floor, cap = 1.0 - hyper["clip_low"], 1.0 + hyper["clip_high"]
    value = -jnp.minimum(rho * advantages, jnp.clip(rho, floor, cap) * advantages)
    low, high = (advantages < 0) & (rho < floor), (advantages > 0) & (rho > cap)
    if "dual_clip" in hyper:
        most = hyper["dual_clip"]
        high |= (advantages < 0) & (rho > most)
        value = jnp.where(advantages < 0, jnp.minimum(value, -most * advantages), value)
    return Surrogate(value, low, high)


PER_TOKEN = (reinforce, ppo, cispo, cispo_two_sided, sapo)
"""Surrogates in which a token's loss depends on its own log-probability alone."""
