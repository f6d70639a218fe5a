"""Estimators of the KL divergence from the reference, and what to differentiate for its gradient.

For a token drawn from pi let d = log pi - log pi_ref. All three have the mean KL(pi || pi_ref) or come near it:

- k1 = d: unbiased, of either sign;
- k2 = d^2 / 2: biased, never negative;
- k3 = exp(-d) - 1 + d: unbiased, never negative.

A good estimate of the value need not have the right gradient. The KL's gradient is E[d grad log pi], which is exactly
that of k2. Differentiating k1 gives grad log pi, whose mean is 0: no penalty at all. Differentiating k3 gives
(1 - exp(-d)) grad log pi, whose mean is the gradient of the *other* KL, KL(pi_ref || pi); this is what GRPO's paper
does (2402.03300). So a KL term of the loss is one of

- `plain(k)`: k itself, differentiated as it stands (k2 or k3);
- `corrected(k)`: the value rho k and the gradient rho d grad log pi, with rho = pi / pi_old held fixed: right for any
  k, and for samples of an older policy. It equals differentiating rho k3, rho included (DeepSeek-V3.2's form).

Both are per token: the state that an earlier token led to is taken as given. The KL of whole answers, future included,
goes into the reward (`rl.returns.token_rewards`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LIMIT = 20.0
"""|log ratio| beyond which exp is not trusted: the value stays at the limit and its gradient is 0."""

Estimator = Callable[[Float[Array, "*S"]], Float[Array, "*S"]]
"""d -> an estimate of the KL."""
KL = Callable[[Float[Array, "*S"], Float[Array, "*S"], Float[Array, "*S"]], Float[Array, "*S"]]
"""(log pi, log pi_ref, log pi_old) -> the KL term of each token."""


def k1(d: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """d: unbiased."""
    return d


def k2(d: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """d^2 / 2: its gradient is the KL's."""
    return 0.5 * d**2


def k3(d: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """exp(-d) - 1 + d: unbiased and never negative.

    Example:
      >>> round(float(k3(jnp.log(2.0))), 4)  # 1/2 - 1 + log 2
      0.1931
    """
    d = jnp.clip(d, -LIMIT, LIMIT)
    return jnp.expm1(-d) + d


def plain(estimator: Estimator) -> KL:
    """The estimate, differentiated as it stands.

    Raises:
      ValueError: k1, whose gradient has mean 0.
    """
    if estimator is k1:
        raise ValueError("the gradient of k1 has mean 0, so as a loss it penalises nothing: use corrected(k1), or k2")
    return lambda logprobs, ref_logprobs, old_logprobs: estimator(logprobs - ref_logprobs)


def corrected(estimator: Estimator) -> KL:
    """The value rho k with the KL's own gradient, rho d grad log pi.

    Example:
      >>> one = jnp.array(-1.0)
      >>> [float(x) for x in jax.value_and_grad(corrected(k1))(one, jnp.array(-1.5), one)]
      [0.5, 0.5]
    """

    def term(logprobs: Array, ref_logprobs: Array, old_logprobs: Array) -> Array:
        now = jax.lax.stop_gradient(logprobs)
        d, ratio = now - ref_logprobs, jnp.exp(jnp.clip(now - old_logprobs, -LIMIT, LIMIT))
        return ratio * (estimator(d) + d * (logprobs - now))

    return term
