"""Other distances to the reference than the reverse KL, in the losses that read c - r (f-DPO, 2309.16240).

With a penalty D_f(pi, pi_ref) = E_ref f(u), u = pi / pi_ref, the reward of an answer is beta f'(u) up to a constant of
the prompt. So log u is replaced by f'(u):

| divergence | f'(u) |
|---|---|
| reverse KL | log u |
| forward KL | -1 / u |
| Jensen-Shannon | log(2 u / (1 + u)) |
| alpha, 0 < alpha < 1 | (1 - u^-alpha) / alpha |

Alpha runs from reverse KL at 0 to forward KL at 1. (Some libraries count it the other way round: 1 - alpha.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpost.losses.preference.shapes import LARGEST, bounded_exp
from jaxpost.types import Hyper

Divergence = Callable[[Float[Array, "*S"], Hyper], Float[Array, "*S"]]
"""(log u, hyper) -> f'(u)."""


def reverse_kl(log_u: Float[Array, "*S"], hyper: Hyper) -> Float[Array, "*S"]:
    """log u."""
    return log_u


def forward_kl(log_u: Float[Array, "*S"], hyper: Hyper) -> Float[Array, "*S"]:
    """-1 / u."""
    return -bounded_exp(-log_u)


def jensen_shannon(log_u: Float[Array, "*S"], hyper: Hyper) -> Float[Array, "*S"]:
    """log(2 u / (1 + u)) = log 2 + log s(log u).

    Example:
      >>> float(jensen_shannon(jnp.array(0.0), {}))  # u = 1
      0.0
    """
    return math.log(2.0) + jax.nn.log_sigmoid(log_u)


def alpha_divergence(log_u: Float[Array, "*S"], hyper: Hyper) -> Float[Array, "*S"]:
    """(1 - u^-alpha) / alpha with alpha = hyper["alpha"]; log u at alpha = 0.

    Example:
      >>> round(float(alpha_divergence(jnp.log(4.0), {"alpha": 0.5})), 4)  # (1 - 1/2) / (1/2)
      1.0
    """
    return power_reward(log_u, hyper["alpha"])


def power_reward(log_u: Float[Array, "*S"], alpha: Array | float) -> Float[Array, "*S"]:
    """(1 - u^-alpha) / alpha for any alpha; log u at alpha = 0."""
    alpha = jnp.asarray(alpha, log_u.dtype)
    still = jnp.abs(alpha) < 1e-6
    some = jnp.where(still, 1.0, alpha)
    return jnp.where(still, log_u, -jnp.expm1(jnp.minimum(-some * log_u, LARGEST)) / some)
