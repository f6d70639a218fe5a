"""Token-level credit: returns, generalised advantage estimation, whitening, KL in the reward.

Rows are samples, columns tokens; `mask` is 1 on the policy's own tokens. What lies between them (a prompt, an
environment's turn, padding) takes no time: the token after a masked one follows the token before it. Rewards on
masked tokens do not count; the caller puts an environment's reward on the action that earned it. The value of a
token is that of the state in which it was chosen.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def token_rewards(
    rewards: Float[Array, " N"],
    mask: Float[Array, "N T"],
    *,
    kl: Float[Array, "N T"] | None = None,
    kl_coef: float | Float[Array, ""] = 0.0,
) -> Float[Array, "N T"]:
    """r_t = -beta kl_t, plus the sample's reward at its last token (KL in the reward, 2203.02155).

    Args:
      rewards: of whole samples; unscored (NaN) ones get 0 everywhere.
      kl: estimates of the KL per token, usually log pi - log pi_ref of the samples (`losses.kl.k1`).
      kl_coef: beta.

    Example:
      >>> token_rewards(jnp.array([1.0]), jnp.array([[1.0, 1.0, 0.0]]), kl=jnp.full((1, 3), 0.5), kl_coef=0.1).tolist()
      [[-0.05000000074505806, 0.949999988079071, 0.0]]
    """
    on = mask != 0
    later = jnp.cumsum(on[:, ::-1], axis=1)[:, ::-1]
    out = jnp.where(on & (later == 1), rewards[:, None], 0.0)
    if kl is not None:
        out = jnp.where(on, out - kl_coef * kl, 0.0)
    return jnp.where(jnp.isnan(rewards)[:, None], 0.0, out)


def discounted_returns(
    rewards: Float[Array, "N T"], mask: Float[Array, "N T"], *, discount: float = 1.0
) -> Float[Array, "N T"]:
    """R_t = r_t + gamma R_{t+1} over the tokens of the mask, 0 elsewhere.

    Example:
      >>> discounted_returns(jnp.array([[1.0, 9.0, 2.0]]), jnp.array([[1.0, 0.0, 1.0]]), discount=0.5).tolist()
      [[2.0, 0.0, 2.0]]
    """
    zeros = jnp.zeros_like(rewards)
    return gae(rewards, zeros, mask, discount=discount, trace=1.0)[0]


def gae(
    rewards: Float[Array, "N T"],
    values: Float[Array, "N T"],
    mask: Float[Array, "N T"],
    *,
    discount: float = 1.0,
    trace: float = 0.95,
    bootstrap: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """Generalised advantage estimation (1506.02438): A_t = d_t + gamma lambda A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t.

    Args:
      values: V_t, the value of the state in which token t was chosen.
      discount: gamma.
      trace: lambda.
      bootstrap: the value after the last token: 0 (None) for finished samples, V of the cut-off state for truncated.

    Returns: advantages and the critic's targets A_t + V_t, 0 outside the mask.

    Example:
      >>> rewards, values, mask = jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.25]]), jnp.ones((1, 2))
      >>> gae(rewards, values, mask, trace=0.0)[0].tolist()
      [[-0.25, 0.75]]
    """
    bootstrap = jnp.zeros_like(rewards[:, 0]) if bootstrap is None else bootstrap

    def body(carry: tuple[Array, Array], token: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        advantage, following = carry
        reward, value, on = token
        here = reward + discount * following - value + discount * trace * advantage
        return (jnp.where(on, here, advantage), jnp.where(on, value, following)), jnp.where(on, here, 0.0)

    on = mask != 0
    start = (jnp.zeros_like(bootstrap), bootstrap)
    advantages = jax.lax.scan(body, start, (rewards.T, values.T, on.T), reverse=True)[1].T
    return advantages, jnp.where(on, advantages + values, 0.0)


def whiten(
    x: Float[Array, "N T"], mask: Float[Array, "N T"], *, shift_mean: bool = True, eps: float = 1e-8
) -> Float[Array, "N T"]:
    """(x - mean) / sqrt(variance + eps) over the tokens of the mask, 0 elsewhere; the mean is put back if not shifted.

    Example:
      >>> whiten(jnp.array([[1.0, 3.0, 100.0]]), jnp.array([[1.0, 1.0, 0.0]])).tolist()
      [[-1.0, 1.0, 0.0]]
    """
    on = mask != 0
    count = jnp.maximum(jnp.sum(on).astype(x.dtype), 1.0)
    mean = jnp.sum(jnp.where(on, x, 0.0)) / count
    variance = jnp.sum(jnp.where(on, (x - mean) ** 2, 0.0)) / count
    out = (x - mean) * jax.lax.rsqrt(variance + eps)
    return jnp.where(on, out if shift_mean else out + mean, 0.0)


def reinforce_plus_plus(
    rewards: Float[Array, " N"],
    mask: Float[Array, "N T"],
    *,
    kl: Float[Array, "N T"] | None = None,
    kl_coef: float | Float[Array, ""] = 0.0,
    eps: float = 1e-8,
) -> Float[Array, "N T"]:
    """REINFORCE++ (2501.03262): A_t = r - beta sum_{s >= t} kl_s, whitened over every token of the batch.

    Its baseline variant passes `rl.advantages.group_centred(rewards, groups)` for the rewards, and has the KL in the
    loss. The mask leaves out what is not trained (`rl.advantages.trained_tokens`), so unscored samples do not count.

    Example:
      >>> reinforce_plus_plus(jnp.array([1.0, 0.0]), jnp.ones((2, 1))).round(3).tolist()
      [[1.0], [-1.0]]
    """
    credit = discounted_returns(token_rewards(rewards, mask, kl=kl, kl_coef=kl_coef), mask)
    return whiten(credit, jnp.where(jnp.isnan(rewards)[:, None], 0.0, mask), eps=eps)


def per_token(advantages: Float[Array, " N"], mask: Float[Array, "N T"]) -> Float[Array, "N T"]:
    """A sample's advantage on each of its own tokens, 0 elsewhere."""
    return jnp.where(mask != 0, advantages[:, None], 0.0)


def adapted_kl_coef(
    kl_coef: float, measured: float, *, target: float, horizon: int, samples: int, clip: float = 0.2
) -> float:
    """The adaptive KL controller (1909.08593): beta <- beta (1 + clip(KL / target - 1, +-0.2) samples / horizon).

    Plain numbers on the host; the result goes into the step's traced hyper-parameters.

    Args:
      measured: the last batch's mean KL, in the target's unit (per token or per sample).
      horizon: samples over which beta moves by a factor of about 1 + clip.
      samples: samples of the last batch.

    Example:
      >>> round(adapted_kl_coef(0.1, 12.0, target=6.0, horizon=1000, samples=100), 6)
      0.102
    """
    if not (target > 0 and horizon > 0):
        raise ValueError(f"the adaptive KL needs a target and a horizon above 0, got {target} and {horizon}")
    error = min(max(measured / target - 1.0, -clip), clip)
    return kl_coef * (1.0 + error * samples / horizon)
