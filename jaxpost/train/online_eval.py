"""Held-out problems: how many does the policy get right, with intervals."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from jaxpost.eval.statistics import mean_pass_at_k, mean_share
from jaxpost.rewards.canonical import math_answer
from jaxpost.rl.episodes import Episode
from jaxpost.train.online_job import Draw, Evaluation, OnlineJob
from jaxpost.train.online_log import counted, told_by
from jaxpost.types import Params

_SEED_OFFSET = 1_000_003
"""Evaluations draw other noise than training does."""


class Result(NamedTuple):
    """One evaluation."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    line: str
    """For the console."""


def evaluate(job: OnlineJob, evaluation: Evaluation, params: Params, version: int) -> Result:
    """Answers every problem and judges the answers; the same noise every time, so that changes are paired.

    Accuracy is the mean over problems of the share of right samples, with `mean_share`'s interval; an unscored answer
    is not right, nor one whose environment failed. See `online_log` for file records.
    """
    section, problems = evaluation.section, evaluation.problems
    draw = Draw(0, version, (job.run.seed + _SEED_OFFSET) % 2**32)
    episodes = job.generate(params, job.frozen, problems, evaluation.wish, draw)
    scored = evaluation.score([problems[e.problem].example for e in episodes], episodes)
    columns = scored.rewards
    judged = next(iter(columns.values()))
    given = [one if e.reward is None else e.reward for e, one in zip(episodes, judged, strict=True)]
    score = np.reshape(np.asarray(given, np.float64), (len(problems), section.samples))
    right = np.nan_to_num(score, nan=-math.inf) >= section.threshold
    name, counts = section.name, right.sum(axis=1)
    share = mean_share(counts / section.samples)
    metrics = {
        f"{name}/accuracy": share.value,
        f"{name}/low": share.low,
        f"{name}/high": share.high,
        f"{name}/items": float(len(problems)),
        f"{name}/unscored": float(np.isnan(score).sum()),
        f"{name}/truncated": float(np.mean([e.truncated for e in episodes])),
        f"{name}/answer_tokens": float(np.mean([sum(e.mask) for e in episodes])),
    }
    metrics |= {f"{name}/{key}": value for key, value in counted(episodes).items()}
    for k in section.pass_at:
        metrics[f"{name}/pass@{k}"] = mean_pass_at_k(np.full(len(problems), section.samples), counts, k).value
    if section.vote:
        metrics[f"{name}/vote@{section.samples}"] = _voted(episodes, right)
    for column, values in columns.items():
        if not np.all(np.isnan(values)):
            metrics[f"{name}/reward/{column}"] = float(np.nanmean(values))
    samples = [
        {
            "eval": name,
            "example": problems[e.problem].number,
            "sample": e.sample,
            "prompt": problems[e.problem].text,
            **told_by(e),
            "answer": problems[e.problem].example.get("answer"),
            "rewards": {c: None if math.isnan(v[i]) else float(v[i]) for c, v in columns.items()},
            "score": float(right[e.problem, e.sample]),
            "finish": e.finish,
            "tokens": len(e.tokens),
        }
        for i, e in enumerate(episodes)
    ]
    return Result(metrics, samples, _line(name, section.samples, metrics))


def _voted(episodes: list[Episode], right: np.ndarray) -> float:
    """The share of problems whose most frequent final answer is right; the first one of those that are as frequent."""
    won = []
    for problem in range(right.shape[0]):
        answers = {e.sample: math_answer(e.opened + e.text) for e in episodes if e.problem == problem}
        votes = Counter(answer for answer in answers.values() if answer is not None)
        best = votes.most_common(1)[0][0] if votes else None
        won.append(best is not None and any(right[problem, s] for s, answer in answers.items() if answer == best))
    return float(np.mean(won))


def _line(name: str, samples: int, metrics: dict[str, float]) -> str:
    accuracy, low, high = (100 * metrics[f"{name}/{key}"] for key in ("accuracy", "low", "high"))
    items, cut = int(metrics[f"{name}/items"]), 100 * metrics[f"{name}/truncated"]
    line = f"{name}: {accuracy:.1f}% right [{low:.1f}, {high:.1f}] of {items}"
    more = {k.partition("/")[2]: v for k, v in metrics.items() if "@" in k and not k.endswith("pass@1")}
    line += "".join(f", {k} {100 * v:.1f}%" for k, v in more.items())
    return f"{line}, {cut:.0f}% cut off, {metrics[f'{name}/answer_tokens']:.1f} tokens"
