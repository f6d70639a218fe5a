"""What an online run writes: a step's metrics, and its samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxpost.losses.correction import effective_sample_size
from jaxpost.rl.episodes import Episode, repetition
from jaxpost.train.collect import Group, Step
from jaxpost.train.online_job import Credit

_NOT_MEANS = frozenset(
    ("tokens", "tokens_trained", "halt", "skips", "consecutive_skips", "skipped", "empty", "nonfinite", "spike")
)
_COUNTS = frozenset(("groups", "zero_variance_groups", "unscored", "refills", "dropped_groups", "samples", "skipped"))


@dataclass
class Window:
    """Sums of metrics since the last record: means, but for counts, which add up."""

    sums: dict[str, list[float]] = field(default_factory=dict)
    """name -> [sum, number]"""
    times: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Window:
        return cls({name: [float(x) for x in pair] for name, pair in saved.items()})

    def to_json(self) -> dict[str, list[str]]:
        """Floats as text, which keeps every bit, and NaN and infinity too."""
        return {name: [repr(float(x)) for x in pair] for name, pair in self.sums.items()}

    def add(self, metrics: Mapping[str, float], times: Mapping[str, float]) -> None:
        """One step."""
        for name, value in metrics.items():
            total, count = self.sums.get(name, [0.0, 0])
            self.sums[name] = [total + value, count + 1]
        for name, value in times.items():
            self.times[name] = self.times.get(name, 0.0) + value

    def close(self) -> tuple[dict[str, float], dict[str, float]]:
        """The window's metrics and seconds; it begins anew."""
        metrics = {name: total if name in _COUNTS else total / count for name, (total, count) in self.sums.items()}
        times = self.times
        self.sums, self.times = {}, {}
        return metrics, times


def step_metrics(found: Step, updates: Sequence[Mapping[str, float]], version: int) -> dict[str, float]:
    """A step in numbers: means over its scored samples, counts, and means over its applied updates.

    Args:
      version: updates that the policy had seen before the step.
    """
    everyone = [e for group in found.seen for e in group.episodes]
    own_samples = np.array([not e.opponent for e in everyone])
    episodes = [e for e in everyone if not e.opponent]
    every_reward = np.concatenate([group.reward for group in found.seen])
    rewards = every_reward[own_samples]
    scored = rewards[~np.isnan(rewards)]
    out: dict[str, float] = {}
    if scored.size:
        out |= {"reward": float(scored.mean()), "reward_std": float(scored.std())}
    # A reward that fails throughout a round does not name its columns there.
    for name in dict.fromkeys(name for group in found.seen for name in group.columns):
        known = [group for group in found.seen if name in group.columns]
        column = np.concatenate([group.columns[name][_own(group)] for group in known])
        if not np.all(np.isnan(column)):
            out[f"reward/{name}"] = float(np.nanmean(column))
    own = [sum(e.mask) for e in episodes]
    out |= {
        "groups": float(len(found.seen)),
        "zero_variance_groups": float(sum(not g.informative for g in found.seen)),
        "dropped_groups": float(len(found.seen) - len(found.groups)),
        "unscored": float(rewards.size - scored.size),
        "refills": float(found.refills),
        "samples": float(len(episodes)),
        "answer_tokens": float(np.mean(own)),
        "truncated": float(np.mean([e.truncated for e in episodes])),
        "repetition": float(np.mean([repetition(e.own) for e in episodes])),
        "policy_version": float(version),
        "staleness": float(np.mean([version - e.version for e in episodes])),
    }
    out |= counted(episodes)
    if len(episodes) < len(everyone):
        theirs = every_reward[~own_samples]
        theirs = theirs[~np.isnan(theirs)]
        if theirs.size and scored.size:
            out |= {"opponent_reward": float(theirs.mean()), "wins": _wins(found.seen)}
    applied = [u for u in updates if not u.get("skipped")]
    for name in applied[0] if applied else ():
        if name not in _NOT_MEANS and not name.startswith("weight/"):
            out[name] = math.fsum(u[name] for u in applied) / len(applied)
    out["skipped"] = float(sum(u.get("skipped", 0.0) for u in updates))
    for name in ("sampler_weight", "ratio"):
        if f"{name}_squared" in out and "effective_sample_size" not in out:
            out["effective_sample_size"] = float(effective_sample_size(out[name], out[f"{name}_squared"]))
    return out


def _own(group: Group) -> np.ndarray:
    """Which of a group's samples the policy drew."""
    return np.array([not e.opponent for e in group.episodes])


def _wins(groups: Sequence[Group]) -> float:
    """The share of pairs of a policy's and an opponent's sample that the policy's wins; a tie is half of one."""
    wins = []
    for group in groups:
        own = _own(group)
        difference = group.reward[own][:, None] - group.reward[~own][None, :]
        wins += (0.5 * (1 + np.sign(difference[~np.isnan(difference)]))).tolist()
    return float(np.mean(wins)) if wins else math.nan


def counted(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means of what environments counted."""
    infos = [e.info for e in episodes if e.info]
    return {f"env/{name}": math.fsum(i[name] for i in infos) / len(infos) for name in (infos[0] if infos else ())}


def told_by(episode: Episode) -> dict[str, Any]:
    """The text of a record, and what an environment adds to it: the last turn, and its counts."""
    if episode.transcript is None:
        return {"text": episode.text}
    return {"text": episode.transcript, "judged": episode.text, "env": dict(episode.info or {})}


def sample_records(step: int, found: Step, credit: Credit | None, samples: int) -> Iterator[dict[str, Any]]:
    """One record per sample: its text, rewards and mean advantage (null where it was not trained on)."""
    places = {id(group): g for g, group in enumerate(found.groups)}
    for number, group in enumerate(found.seen):
        for s, episode in enumerate(group.episodes):
            advantage = None
            if credit is not None and id(group) in places:
                row = places[id(group)] * samples + s
                weight = credit.weights[row]
                if weight.any():
                    advantage = float(np.sum(credit.advantages[row] * weight) / np.sum(weight))
            yield {
                "step": step,
                "kind": "rollout",
                "example": group.problem.number,
                "group": number,
                "sample": s,
                "prompt": group.problem.text,
                **told_by(episode),
                "answer": group.problem.example.get("answer"),
                "rewards": {name: _number(column[s]) for name, column in group.columns.items()},
                "reward": _number(group.reward[s]),
                "advantage": advantage,
                "finish": episode.finish,
                "tokens": len(episode.tokens),
                "version": episode.version,
                **({"by": "opponent"} if episode.opponent else {}),
            }


def _number(x: Any) -> float | None:
    """JSON has no NaN: unscored is null."""
    return None if math.isnan(float(x)) else float(x)
