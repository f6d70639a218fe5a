"""Advantages of whole samples: N rewards in, N advantages out.

Let r_i be the reward of sample i and G(i) its group (the samples of one prompt), given as any integer per sample.
A reward of NaN is *unscored* (its verifier failed, or a rule took it out): the sample leaves every mean, deviation
and count, and its advantage is 0; `trained_tokens` takes its tokens out of the loss.

Nothing here is differentiated or depends on the order of samples. Token-level credit is in `rl.returns`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Scale = Callable[[Float[Array, " N"], Int[Array, " N"]], Float[Array, " N"]]
"""(rewards, groups) -> the deviation that each sample's advantage is divided by."""


class _Groups:
    """Sums over the scored samples of each group, given back per sample [N]."""

    def __init__(self, rewards: Float[Array, " N"], groups: Int[Array, " N"]) -> None:
        self.scored: Bool[Array, " N"] = ~jnp.isnan(rewards)
        self.size = rewards.shape[0]
        self.index = jnp.unique(groups, size=self.size, return_inverse=True)[1].reshape(groups.shape)
        rewards = jnp.where(self.scored, rewards, 0.0)
        self.count = self.sum(jnp.ones_like(rewards))
        self.total = self.sum(rewards)
        self.mean = self.total / jnp.maximum(self.count, 1.0)
        low = jax.ops.segment_min(jnp.where(self.scored, rewards, jnp.inf), self.index, self.size)
        high = jax.ops.segment_max(jnp.where(self.scored, rewards, -jnp.inf), self.index, self.size)
        self.spread: Bool[Array, " N"] = (high > low)[self.index]

    def sum(self, x: Float[Array, " N"]) -> Float[Array, " N"]:
        """Every sample's group's sum of x over its scored samples."""
        return jax.ops.segment_sum(jnp.where(self.scored, x, 0.0), self.index, self.size)[self.index]


def reinforce(
    rewards: Float[Array, " N"], *, baseline: Float[Array, "#N"] | Float[Array, ""] | float = 0.0
) -> Float[Array, " N"]:
    """REINFORCE: A = r - b, for a baseline b that does not depend on the sample.

    With ReMax (2310.10505), b is the reward of the prompt's greedy answer; where that is unscored, so is the sample.

    Example:
      >>> reinforce(jnp.array([1.0, 0.0, jnp.nan]), baseline=0.25).tolist()
      [0.75, -0.25, 0.0]
    """
    advantages = rewards - baseline
    return jnp.where(jnp.isnan(advantages), 0.0, advantages)


def remax(rewards: Float[Array, " N"], greedy_rewards: Float[Array, " N"]) -> Float[Array, " N"]:
    """ReMax: A = r - r(greedy answer to the same prompt) (2310.10505).

    Example:
      >>> remax(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.5])).tolist()
      [0.0, -0.5]
    """
    return reinforce(rewards, baseline=greedy_rewards)


def rloo(rewards: Float[Array, " N"], groups: Int[Array, " N"]) -> Float[Array, " N"]:
    """RLOO: A_i = r_i - mean of the other scored rewards of its group; 0 where there is no other (2402.14740).

    Example:
      >>> rloo(jnp.array([1.0, 0.0, 2.0]), jnp.array([0, 0, 0])).tolist()
      [0.0, -1.5, 1.5]
    """
    g = _Groups(rewards, groups)
    others = (g.total - rewards) / jnp.maximum(g.count - 1.0, 1.0)
    return jnp.where(g.scored & g.spread, rewards - others, 0.0)


def opo(rewards: Float[Array, " N"], lengths: Float[Array, " N"], groups: Int[Array, " N"]) -> Float[Array, " N"]:
    """OPO: A_i = r_i - sum_j |o_j| r_j / sum_j |o_j| over its group (2505.23585).

    The baseline of least variance is E[|g|^2 r] / E[|g|^2], g the gradient of a sample's log-probability; |g|^2 is
    taken to grow with the sample's length |o|.

    Args:
      lengths: the policy's own tokens of each sample.

    Returns: exactly 0 in groups whose scored rewards are all equal, and where unscored.

    Example:
      >>> opo(jnp.array([1.0, 0.0]), jnp.array([1.0, 3.0]), jnp.array([0, 0])).tolist()
      [0.75, -0.25]
    """
    g = _Groups(rewards, groups)
    total = g.sum(lengths)
    baseline = g.sum(lengths * jnp.where(g.scored, rewards, 0.0)) / jnp.where(total == 0, 1.0, total)
    return jnp.where(g.scored & g.spread, rewards - baseline, 0.0)


def gdpo(
    rewards: Float[Array, "N K"],
    groups: Int[Array, " N"],
    *,
    weights: Float[Array, " K"] | None = None,
    eps: float = 1e-4,
) -> Float[Array, " N"]:
    """GDPO: each reward is normalised in its group, their weighted sum over the batch (2601.05242).

    S_i = sum_k w_k (r_ik - mean of the group) / (its deviation + eps), A_i = (S_i - mean S) / (deviation of S + eps).
    With a sum that is normalised afterwards (`grpo`), samples of different rewards and equal sums are told apart by
    nothing, and a reward of large spread drowns the others.

    Args:
      rewards: of K kinds; a sample that lacks one of them (NaN) is unscored.
      weights: w, of the normalised rewards; None: 1 each.

    Returns: exactly 0 in groups whose scored rewards of each kind are all equal, and where unscored.

    Example:
      >>> rewards = jnp.array([[1.0, 0.0], [0.0, 100.0], [0.0, 0.0]])  # two kinds of one weight, whatever their units
      >>> [round(float(a), 2) for a in gdpo(rewards, jnp.zeros(3, int))]
      [0.58, 0.58, -1.15]
    """
    scored = ~jnp.any(jnp.isnan(rewards), axis=1)
    weights = jnp.ones(rewards.shape[1]) if weights is None else jnp.asarray(weights)
    each = jnp.where(scored[:, None], rewards, jnp.nan).T
    total = weights @ jax.vmap(lambda r: grpo(r, groups, eps=eps))(each)
    spread = jnp.any(jax.vmap(lambda r: _Groups(r, groups).spread)(each), axis=0) & scored
    batch = jnp.zeros_like(groups)
    return jnp.where(spread, grpo(jnp.where(scored, total, jnp.nan), batch, eps=eps), 0.0)


def best_worst(rewards: Float[Array, " N"], groups: Int[Array, " N"]) -> Float[Array, " N"]:
    """+n for the best and -n for the worst sample of group n (counted from 1), 0 for the others and for groups whose
    rewards are all equal: the pairs of online preference optimisation (`losses.preference.online`).

    Of equal rewards the first sample is the best, and the last the worst.

    Args:
      groups: 0 and up.

    Example:
      >>> best_worst(jnp.array([0.0, 1.0, 0.0, 5.0, 5.0]), jnp.array([0, 0, 0, 1, 1])).tolist()
      [0.0, 1.0, -1.0, 0.0, 0.0]
    """
    g = _Groups(rewards, groups)
    place = jnp.arange(g.size)
    top = jax.ops.segment_max(jnp.where(g.scored, rewards, -jnp.inf), g.index, g.size)[g.index]
    low = jax.ops.segment_min(jnp.where(g.scored, rewards, jnp.inf), g.index, g.size)[g.index]
    first = jax.ops.segment_min(jnp.where(rewards == top, place, g.size), g.index, g.size)[g.index]
    last = jax.ops.segment_max(jnp.where(rewards == low, place, -1), g.index, g.size)[g.index]
    sign = (place == first).astype(rewards.dtype) - (place == last).astype(rewards.dtype)
    return jnp.where(g.scored & g.spread, sign * (groups + 1).astype(rewards.dtype), 0.0)


def self_play(groups: Int[Array, " N"], opponent: Bool[Array, " N"], usable: Bool[Array, " N"]) -> Float[Array, " N"]:
    """+n for the opponent's first and -n for the policy's first usable sample of group n (counted from 1), 0 for the
    others and for groups that lack one of the two: SPIN's pairs of a given answer and the policy's own (2401.01335).

    Args:
      groups: 0 and up.
      usable: samples that may be trained.

    Example:
      >>> theirs = jnp.array([False, False, True, False, True])
      >>> self_play(jnp.array([0, 0, 0, 1, 1]), theirs, jnp.array([True, True, True, False, True])).tolist()
      [-1.0, 0.0, 1.0, 0.0, 0.0]
    """
    size, place = groups.shape[0], jnp.arange(groups.shape[0])
    first = lambda which: jax.ops.segment_min(jnp.where(which, place, size), groups, size)[groups]  # noqa: E731
    theirs, own = first(opponent & usable), first(~opponent & usable)
    sign = (place == theirs).astype(jnp.float32) - (place == own).astype(jnp.float32)
    return jnp.where((theirs < size) & (own < size), sign * (groups + 1).astype(jnp.float32), 0.0)


def nash(
    rewards: Float[Array, " N"],
    groups: Int[Array, " N"],
    opponent: Bool[Array, " N"],
    beats: Callable[[Float[Array, "N N"]], Float[Array, "N N"]],
) -> Float[Array, " N"]:
    """Nash-MD: A_i = mean over the opponent's samples j of i's group of P(i beats j) - 1/2 (2312.00886, section 7).

    Args:
      opponent: samples that the opponent drew; their own advantage is 0.
      beats: r_i - r_j -> P; `by_order`, or a logistic function where rewards are Bradley-Terry's.

    Returns: 0 too where unscored, and in groups without a scored sample of the opponent.

    Example:
      >>> nash(jnp.array([1.0, 0.0, 0.0]), jnp.array([0, 0, 0]), jnp.array([False, False, True]), by_order).tolist()
      [0.5, 0.0, 0.0]
    """
    scored = ~jnp.isnan(rewards)
    value = jnp.where(scored, rewards, 0.0)
    faces = (groups[:, None] == groups[None, :]) & (opponent & scored)[None, :]
    wins = jnp.where(faces, beats(value[:, None] - value[None, :]) - 0.5, 0.0)
    count = jnp.sum(faces.astype(wins.dtype), axis=1)
    mean = jnp.sum(wins, axis=1) / jnp.maximum(count, 1.0)
    return jnp.where(scored & ~opponent, mean, 0.0)


def by_order(difference: Float[Array, "..."]) -> Float[Array, "..."]:
    """P of a judge that is certain: 1 above 0, 1/2 at 0, 0 below."""
    return 0.5 * (1.0 + jnp.sign(difference))


def group_std(rewards: Float[Array, " N"], groups: Int[Array, " N"]) -> Float[Array, " N"]:
    """The standard deviation within each sample's group, with n - 1 in the denominator (0 for a group of one)."""
    g = _Groups(rewards, groups)
    return jnp.sqrt(g.sum((rewards - g.mean) ** 2) / jnp.maximum(g.count - 1.0, 1.0))


def batch_std(rewards: Float[Array, " N"], groups: Int[Array, " N"]) -> Float[Array, " N"]:
    """One standard deviation for the whole batch, n - 1 in the denominator (2508.08221: steadier than the group's)."""
    return group_std(rewards, jnp.zeros_like(groups))


def grpo(
    rewards: Float[Array, " N"],
    groups: Int[Array, " N"],
    *,
    scale: Scale | None = group_std,
    eps: float = 1e-4,
) -> Float[Array, " N"]:
    """GRPO, outcome rewards: A = (r - mean of the group) / (deviation + eps) (2402.03300).

    Args:
      rewards: NaN where unscored.
      groups: any integer per sample, equal for the samples of one prompt.
      scale: `group_std`; `batch_std`; None divides by nothing: Dr.GRPO (2503.20783).
      eps: keeps small deviations from blowing up.

    Returns: exactly 0 in groups whose scored rewards are all equal, and where unscored.

    Example:
      >>> grpo(jnp.array([1.0, 0.0, jnp.nan, 1.0, 1.0]), jnp.array([3, 3, 3, 8, 8]), scale=None).tolist()
      [0.5, -0.5, 0.0, 0.0, 0.0]
    """
    g = _Groups(rewards, groups)
    deviation = 1.0 if scale is None else scale(rewards, groups) + eps
    # Not left to subtraction: the mean of equal floats may differ from them in the last bit.
    return jnp.where(g.scored & g.spread, (rewards - g.mean) / deviation, 0.0)


def grpo_process(
    rewards: Float[Array, "N S"],
    ends: Int[Array, "N S"],
    groups: Int[Array, " N"],
    *,
    length: int,
    scale: Scale | None = group_std,
    eps: float = 1e-4,
) -> Float[Array, "N {length}"]:
    """GRPO, process rewards: A_t = sum of the normalised rewards of the steps that end at t or later (2402.03300).

    Every step's reward is normalised with the mean and deviation of all steps of all samples of the group.

    Args:
      rewards: one per step; NaN where a sample has no such step or it is unscored.
      ends: index of each step's last token.
      length: T, the tokens of a sample.

    Example:
      >>> rewards, ends = jnp.array([[1.0, 0.0], [0.5, jnp.nan]]), jnp.array([[1, 3], [0, 0]])
      >>> grpo_process(rewards, ends, jnp.array([0, 0]), length=4, scale=None).tolist()
      [[0.0, 0.0, -0.5, -0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    every_step = jnp.broadcast_to(groups[:, None], rewards.shape).reshape(-1)
    normalised = grpo(rewards.reshape(-1), every_step, scale=scale, eps=eps).reshape(rewards.shape)
    still_to_come = ends[:, :, None] >= jnp.arange(length)
    return jnp.sum(jnp.where(still_to_come, normalised[:, :, None], 0.0), axis=1)


def group_centred(rewards: Float[Array, " N"], groups: Int[Array, " N"]) -> Float[Array, " N"]:
    """r - mean of the group: the first half of REINFORCE++'s baseline variant, before `rl.returns.whiten`."""
    return grpo(rewards, groups, scale=None)


def zero_variance_groups(
    rewards: Float[Array, " N"], groups: Int[Array, " N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many groups teach nothing, all their scored rewards being equal; and how many have a scored sample at all.

    Example:
      >>> zero_variance_groups(jnp.array([1.0, 1.0, 0.0, 1.0, jnp.nan]), jnp.array([0, 0, 1, 1, 2]))
      (Array(1., dtype=float32), Array(2., dtype=float32))
    """
    g = _Groups(rewards, groups)
    share = jnp.where(g.scored, 1.0 / jnp.maximum(g.count, 1.0), 0.0)  # a group's samples share one vote
    return jnp.round(jnp.sum(jnp.where(g.spread, 0.0, share))), jnp.round(jnp.sum(share))


def informative(rewards: Float[Array, " N"], groups: Int[Array, " N"]) -> Bool[Array, " N"]:
    """Scored samples of groups whose rewards differ: those that DAPO's dynamic sampling keeps (2503.14476).

    Example:
      >>> informative(jnp.array([1.0, 1.0, 0.0, 1.0, jnp.nan]), jnp.array([0, 0, 1, 1, 1])).tolist()
      [False, False, True, True, False]
    """
    g = _Groups(rewards, groups)
    return g.scored & g.spread


def uncertain(
    entropy: Float[Array, "N T"], weights: Float[Array, "N T"], share: float | Float[Array, ""]
) -> Bool[Array, "N T"]:
    """The share of the tokens with a weight whose entropy is highest: those that decide, the others follow
    (2506.01939).

    A token is among them where H >= the (1 - share) quantile, interpolated linearly, over all tokens of the batch.

    Args:
      entropy: of the policy where each token was chosen, nats; NaN where it is not known, which counts nowhere.

    Example:
      >>> entropy, weights = jnp.array([[0.1, 2.0, 0.3, 9.0]]), jnp.array([[1.0, 1.0, 1.0, 0.0]])
      >>> uncertain(entropy, weights, 0.4).tolist()
      [[False, True, False, False]]
    """
    known = (weights != 0) & ~jnp.isnan(entropy)
    threshold = jnp.nanquantile(jnp.where(known, entropy, jnp.nan), 1.0 - share)
    return known & (entropy >= threshold)


def unscore(rewards: Float[Array, " N"], truncated: Bool[Array, " N"]) -> Float[Array, " N"]:
    """The strictest rule for truncated samples: they count as unscored, in statistics and loss.

    The other rules: leave the reward as it is (an unfinished answer is a wrong one); or keep it in the statistics
    and only the tokens out of the loss (`trained_tokens(..., truncated)`, DAPO's overlong filtering, 2503.14476).

    Example:
      >>> unscore(jnp.array([1.0, 0.0]), jnp.array([False, True])).tolist()
      [1.0, nan]
    """
    return jnp.where(truncated, jnp.nan, rewards)


def trained_tokens(
    mask: Float[Array, "N T"], rewards: Float[Array, " N"], truncated: Bool[Array, " N"] | None = None
) -> Float[Array, "N T"]:
    """Loss weights: the mask of the policy's own tokens, 0 for unscored samples and, where given, truncated ones.

    Example:
      >>> trained_tokens(jnp.ones((2, 2)), jnp.array([0.0, jnp.nan])).tolist()
      [[1.0, 1.0], [0.0, 0.0]]
    """
    keep = ~jnp.isnan(rewards) if truncated is None else ~jnp.isnan(rewards) & ~truncated
    return jnp.where(keep[:, None], mask, 0.0)
