"""When a run raises an alarm; see `train.watch` and `train.watch_preference`. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WatchCommon:
    """How metrics are smoothed."""

    window: float = 10.0
    """Training records in the exponential mean of every metric."""
    first: int = 5
    """Records whose plain mean is a metric's first value; no alarm before them."""
    margin: float = 0.1
    """Part of a limit by which a metric must come back before its alarm can be raised again."""


@dataclass(frozen=True, kw_only=True)
class PreferenceWatchSection(WatchCommon):
    """Limits whose crossing raises an alarm, which is told, logged and reported; the run goes on. A limit of 1e9 turns
    its alarm off."""

    chosen_fall: float = 0.05
    """Fall of the chosen answers' log-probability, nats a token: below the reference's where there is one, else below
    its first value."""
    kl: float = 1.0
    """Mean KL of a token from the reference, in nats."""


@dataclass(frozen=True, kw_only=True)
class WatchSection(WatchCommon):
    """Limits whose crossing raises an alarm, which is told, logged and reported; the run goes on. One that is never
    reached (1e9, or 0 for a lower limit) turns its alarm off."""

    reward_rise: float = 0.5
    """Reward hacking: rise of the reward, in standard deviations of the first rewards, that held-out accuracy has
    to follow."""
    kl: float = 1.0
    """Mean KL of a token from the reference, in nats."""
    old_kl: float = 0.1
    """Mean KL of a token from the policy before the step, in nats."""
    length_up: float = 3.0
    """Mean length of the answers, in first lengths."""
    length_down: float = 0.2
    """The same, downwards."""
    repetition: float = 0.3
    """Share of repeated 4-grams in an answer."""
    entropy: float = 0.1
    """Entropy of the policy, in first entropies."""
    zero_variance: float = 0.8
    """Share of the groups whose rewards are all equal."""
    unscored: float = 0.2
    """Share of the samples without a reward."""
    sampler_gap: float = 0.1
    """Mean |log p| between sampler and learner, in nats."""
    effective_sample_size: float = 0.5
    """Share of the samples that importance weights leave."""
    truncation_rise: float = 0.3
    """Rise of the share of truncated answers above its first value."""
