"""An `advantage` section -> credit for every token, composed from `jaxpost.rl`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxpost.config_policy_losses import PolicyLossSection
from jaxpost.config_rl import (
    AdvantageSection,
    BestWorst,
    GAEAdvantage,
    GDPOAdvantage,
    GRPOAdvantage,
    KLSection,
    NashAdvantage,
    OPOAdvantage,
    ProcessAdvantage,
    ReinforceAdvantage,
    ReinforcePlusPlusAdvantage,
    ReMaxAdvantage,
    RLOOAdvantage,
    SelfPlay,
)
from jaxpost.losses import kl as kl_terms
from jaxpost.rewards.contract import Sample
from jaxpost.rl import advantages, returns
from jaxpost.train.collect import Group
from jaxpost.train.learn import Samples
from jaxpost.train.online_job import Credit, CreditFn, Known, ScoreFn

SCALES = {"group": advantages.group_std, "batch": advantages.batch_std, "none": None}
ESTIMATORS = {"k1": kl_terms.k1, "k2": kl_terms.k2, "k3": kl_terms.k3}


def make_credit(section: AdvantageSection, *, kl: KLSection, loss: PolicyLossSection) -> CreditFn:
    """The composition that an `advantage` section names; compiled at its first call."""
    in_reward, in_sample = (kl.coef > 0 and kl.where == where for where in ("reward", "sample"))
    estimator = ESTIMATORS[kl.estimator or "k1"]

    def credit(known: Known, numbers: Mapping[str, Any]) -> Credit:
        rewards = known.rewards
        if isinstance(section, ReMaxAdvantage):
            rewards = rewards + 0 * known.greedy  # without its baseline a sample is unscored
        weights = advantages.trained_tokens(known.mask, rewards, known.truncated if loss.truncated == "mask" else None)
        penalty = estimator(known.logprobs - known.reference) if in_reward or in_sample else None
        if in_sample and penalty is not None:
            total = jnp.sum(jnp.where(known.mask != 0, penalty, 0.0), axis=1)
            known, penalty = known._replace(rewards=known.rewards - numbers["kl_coef"] * total), None
        if isinstance(section, BestWorst):  # a sample that is not trained is no side of a pair
            known = known._replace(rewards=jnp.where(jnp.any(weights != 0, axis=1), known.rewards, jnp.nan))
        if isinstance(section, NashAdvantage):
            weights = jnp.where(known.opponent[:, None], 0.0, weights)
        per_token, targets = _assigned(section, known, weights, penalty, numbers)
        if loss.top_entropy < 1:
            per_token = jnp.where(advantages.uncertain(known.entropy, weights, loss.top_entropy), per_token, 0.0)
        if isinstance(section, (BestWorst, SelfPlay)):
            weights = jnp.where(per_token != 0, weights, 0.0)
        return Credit(jnp.where(weights != 0, per_token, 0.0), weights, targets)

    compiled = jax.jit(credit)

    def on_host(known: Known, numbers: Mapping[str, float]) -> Credit:
        traced = {name: np.float32(value) for name, value in numbers.items()}
        return Credit(*(np.asarray(x) for x in jax.device_get(compiled(known, traced))))

    return on_host


def _assigned(
    section: AdvantageSection, known: Known, weights: Array, penalty: Array | None, numbers: Mapping[str, Any]
) -> tuple[Array, Array]:
    """Advantages and the critic's targets, [N, T]."""
    zeros = jnp.zeros_like(weights)
    by_sample = _of_samples(section, known, weights, numbers)
    if by_sample is not None:
        return _priced(returns.per_token(by_sample, known.mask), known, penalty, numbers), zeros
    if isinstance(section, ProcessAdvantage) and known.steps is not None:
        rewards, ends = known.steps
        length = known.mask.shape[1]
        scale = SCALES[section.scale]
        out = advantages.grpo_process(rewards, ends, known.groups, length=length, scale=scale, eps=section.eps)
        return _priced(out, known, penalty, numbers), zeros
    if isinstance(section, ReinforcePlusPlusAdvantage):
        scores = advantages.group_centred(known.rewards, known.groups) if section.group_baseline else known.rewards
        scores = jnp.where(jnp.isnan(known.rewards), jnp.nan, scores)
        return returns.reinforce_plus_plus(scores, weights, kl=penalty, kl_coef=numbers["kl_coef"]), zeros
    if isinstance(section, GAEAdvantage):
        rewards = returns.token_rewards(known.rewards, known.mask, kl=penalty, kl_coef=numbers["kl_coef"])
        out, targets = returns.gae(rewards, known.values, weights, discount=section.discount, trace=section.trace)
        return returns.whiten(out, weights) if section.whiten else out, targets
    raise TypeError(f"{type(section).__name__} is no advantage that can be assigned here")


def _priced(credit: Array, known: Known, penalty: Array | None, numbers: Mapping[str, Any]) -> Array:
    """Credit with the KL in the reward, which has no group to be compared with: its return to go is taken off."""
    if penalty is None:
        return credit
    return credit - numbers["kl_coef"] * returns.discounted_returns(penalty, known.mask)


def _of_samples(section: AdvantageSection, known: Known, weights: Array, numbers: Mapping[str, Any]) -> Array | None:
    """Advantages of whole samples [N], for the methods that have them."""
    rewards, groups = jnp.asarray(known.rewards), jnp.asarray(known.groups)
    if isinstance(section, GRPOAdvantage):
        return advantages.grpo(rewards, groups, scale=SCALES[section.scale], eps=section.eps)
    if isinstance(section, RLOOAdvantage):
        return advantages.rloo(rewards, groups)
    if isinstance(section, OPOAdvantage):
        return advantages.opo(rewards, jnp.sum(jnp.asarray(known.mask), axis=1), groups)
    if isinstance(section, GDPOAdvantage):
        columns = jnp.where(jnp.isnan(rewards)[:, None], jnp.nan, jnp.asarray(known.columns))
        weight = jnp.asarray(section.weights or (1.0,) * columns.shape[1], jnp.float32)
        return advantages.gdpo(columns, groups, weights=weight, eps=section.eps)
    if isinstance(section, BestWorst):
        return advantages.best_worst(rewards, groups)
    if isinstance(section, SelfPlay):
        return advantages.self_play(groups, jnp.asarray(known.opponent), jnp.any(weights != 0, axis=1))
    if isinstance(section, NashAdvantage):
        logistic = lambda x: jax.nn.sigmoid(x / section.scale)  # noqa: E731
        beats = advantages.by_order if section.preference == "order" else logistic
        return advantages.nash(rewards, groups, jnp.asarray(known.opponent), beats)
    if isinstance(section, ReMaxAdvantage):
        return advantages.remax(rewards, jnp.asarray(known.greedy))
    if isinstance(section, ReinforceAdvantage):
        mean = jnp.nan_to_num(jnp.nanmean(rewards))
        baseline = {"none": 0.0, "batch_mean": mean, "running_mean": numbers["baseline"]}[section.baseline]
        return advantages.reinforce(rewards, baseline=baseline)
    return None


def step_rewards(
    separator: str,
    decode: Callable[[Sequence[int]], str],
    score: ScoreFn,
    *,
    by_step: Callable[..., tuple[list[np.ndarray], list[Any]]] | None = None,
) -> Callable[[Sequence[Group], Samples], tuple[np.ndarray, np.ndarray, list[str]]]:
    """Rewards by step: a step ends with the separator or the answer, and is scored as if the answer ended there.

    Args:
      by_step: a process reward model, that scores all steps of an answer at once: (examples, texts of the steps) ->
        scores and faults.

    Returns:
      process(groups, samples) -> rewards [N, S], NaN where a sample has no such step or it has no score; the steps'
      last tokens; a sentence for each fault.
    """

    def process(groups: Sequence[Group], samples: Samples) -> tuple[np.ndarray, np.ndarray, list[str]]:
        each = len(samples.rewards) // max(int(samples.groups.max()) + 1, 1)
        rows, examples, parts, texts = [], [], [], []
        for g, group in enumerate(groups):
            for s, episode in enumerate(group.episodes):
                ends = _step_ends(episode.tokens, separator, decode)
                if by_step is not None:
                    rows += [(g * each + s, end) for end in ends]
                    examples.append(group.problem.example)
                    starts = [0, *(end + 1 for end in ends[:-1])]
                    texts.append([decode(episode.tokens[a : b + 1]) for a, b in zip(starts, ends, strict=True)])
                    continue
                for end in ends:
                    tokens = episode.tokens[: end + 1]
                    finish = episode.finish if end == len(episode.tokens) - 1 else "stop"
                    rows.append((g * each + s, end))
                    examples.append(group.problem.example)
                    parts.append(Sample(episode.opened + decode(tokens), tokens, finish))
        if by_step is not None:
            found, problems = by_step(examples, texts)
            scores = np.concatenate(found)
        else:
            scored = score(examples, parts)
            scores, problems = next(iter(scored.rewards.values())), scored.problems
        most = max(Counter(row for row, _ in rows).values())
        width = 1 << (most - 1).bit_length()  # few shapes, so few compilations
        rewards = np.full((len(samples.rewards), width), np.nan, np.float32)
        ends = np.zeros(rewards.shape, np.int32)
        filled: Counter[int] = Counter()
        for (row, end), value in zip(rows, scores, strict=True):
            rewards[row, filled[row]], ends[row, filled[row]] = value, end
            filled[row] += 1
        rewards[np.isnan(samples.rewards)] = np.nan
        return rewards, ends, [str(problem) for problem in problems]

    return process


def _step_ends(tokens: Sequence[int], separator: str, decode: Callable[[Sequence[int]], str]) -> list[int]:
    """Index of each step's last token; the last step ends with the answer.

    What adds no text (blank lines, the end token) belongs to the step before: more steps would be more reward.
    """
    ends, text, last = [], "", len(tokens) - 1
    for i, token in enumerate(tokens):
        text += decode([token])
        if separator not in text and i < last:
            continue
        if text.replace(separator, "").strip() or (i == last and not ends):
            ends.append(i)
        elif ends:
            ends[-1] = i
        text = ""
    return ends
