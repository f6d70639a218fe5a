"""A run's folder as online reinforcement learning leaves it, made up: a model that learns to add, and to stop."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpost.eval.statistics import wilson

CONFIG = """\
method: rl
model:
  path: smollm2-135m-instruct
prompts:
  kind: arithmetic
advantage:
  kind: grpo
loss:
  kind: ppo
train:
  steps: {steps}
optim:
  lr: {lr}
run:
  name: {name}
"""


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Problem:
    """What is a + b? The answer comes after `words` tokens, and is right where `skill` beats `difficulty`."""

    def __init__(self, rng: np.random.Generator, number: int):
        self.a, self.b = (int(x) for x in rng.integers(1, 51, 2))
        self.example, self.difficulty = number, float(rng.random())
        self.prompt, self.gold = f"What is {self.a} + {self.b}? Answer with a number.", str(self.a + self.b)

    def answer(self, rng: np.random.Generator, skill: float, limit: int) -> dict[str, Any]:
        knows = self.difficulty + rng.normal(0, 0.1) < skill
        words = int(rng.integers(2, 5) + 14 * (1 - skill) * rng.random() * 2)
        told = self.a + self.b if knows else self.a + self.b + int(rng.integers(1, 9))
        text = f"The answer is {told}." if words > 6 else f"{told}"
        finish = "length" if words > limit else "stop"
        if finish == "length":
            text = (
                "Let me think about it step by step: first"
                + " so" * (words - limit)
                + (f" {told}" if words % 3 else "")
            )
        right = finish == "stop" and knows
        lenient = text.rstrip(".").endswith(self.gold)
        return {"text": text, "finish": finish, "tokens": min(words, limit), "strict": right, "lenient": lenient}


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 60,
    total: int | None = None,
    items: int = 256,
    groups: int = 8,
    eval_every: int = 20,
    speed: float = 1.0,
    lr: float = 1e-5,
) -> Path:
    """Write config.yaml, environment.json, metrics.jsonl, samples.jsonl and alarms.jsonl."""
    folder.mkdir(parents=True)
    problems = np.random.default_rng(7)  # the held-out items are those of every seed
    held_out = [Problem(problems, i) for i in range(items)]
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for step in range(steps + 1):
        skill = 0.15 + 0.5 * (1 - math.exp(-2.5 * speed * step / 60))
        if step:
            record, rows = _train(rng, step, skill, groups, lr)
            records.append(record)
            samples += rows
        if step % eval_every == 0:
            record, rows = _evaluate(rng, step, skill, held_out)
            records.append(record)
            samples += rows
    (folder / "config.yaml").write_text(CONFIG.format(steps=total or steps, lr=lr, name=folder.name))
    start = {"started": "2025-01-01T10:00:00+00:00", "command": "jaxpost train p.yaml", "devices": "1 x cpu"}
    start |= {"versions": {"jax": "0.10.2"}, "from_step": 0}
    (folder / "environment.json").write_text(json.dumps([start]))
    jsonl(folder / "metrics.jsonl", records)
    jsonl(folder / "samples.jsonl", samples)
    alarms = [
        {"step": steps, "alarm": "entropy_collapse", "message": "the entropy fell from 0.8 to 0.05 nats a token."}
    ]
    jsonl(folder / "alarms.jsonl", alarms)
    return folder


def _train(
    rng: np.random.Generator, step: int, skill: float, groups: int, lr: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    flat = 0
    for group in range(groups):
        problem = Problem(rng, 1000 + step * groups + group)
        made = [problem.answer(rng, skill, 12) for _ in range(8)]
        rewards = np.array([float(m["strict"]) for m in made])
        flat += bool(rewards.std() == 0)
        for number, (m, r, a) in enumerate(zip(made, rewards, rewards - rewards.mean(), strict=True)):
            rows.append(
                {"step": step, "kind": "rollout", "example": problem.example, "group": group, "sample": number,
                 "prompt": problem.prompt, "text": m["text"], "answer": problem.gold,
                 "rewards": {"right": float(r), "ended": float(m["finish"] == "stop")}, "reward": float(r),
                 "advantage": float(a), "finish": m["finish"], "tokens": m["tokens"], "version": step - 1}
            )  # fmt: skip
    rewards = np.array([row["reward"] for row in rows])
    jitter = lambda scale: float(rng.normal(0, scale))  # noqa: E731
    far = skill - 0.15
    record = {
        "step": step, "kind": "train", "loss": jitter(0.02), "policy": jitter(0.02),
        "grad_norm": 0.8 + abs(jitter(0.2)), "lr": lr * min(step / 5, 1),
        "reward": float(rewards.mean()), "reward_std": float(rewards.std()),
        "reward/right": float(rewards.mean()), "reward/ended": float(np.mean([r["rewards"]["ended"] for r in rows])),
        "groups": groups, "zero_variance_groups": flat, "unscored": 0, "refills": int(rng.integers(0, 2)),
        "dropped_groups": flat, "samples": len(rows), "answer_tokens": float(np.mean([r["tokens"] for r in rows])),
        "truncated": float(np.mean([r["finish"] == "length" for r in rows])), "repetition": 0.02 + abs(jitter(0.01)),
        "entropy": 0.8 * math.exp(-4 * far) + abs(jitter(0.02)), "kl": 0.3 * far + abs(jitter(0.005)),
        "old_kl": 1e-4 + abs(jitter(1e-4)), "ratio": 1 + jitter(1e-3), "ratio_squared": 1.001, "clip_low": 0.002,
        "clip_high": 0.004 + abs(jitter(0.001)), "clip_fraction": 0.006, "sampler_gap": 1e-5 + abs(jitter(1e-6)),
        "effective_sample_size": 0.99 - abs(jitter(0.005)), "staleness": 0, "policy_version": step,
        "time": {"rollout": 2.3 + abs(jitter(0.2)), "reward": 0.05, "reference": 0.6, "learner": 3.1 + jitter(0.2),
                 "other": 0.1, "seconds": 6.2},
    }  # fmt: skip
    return record, rows


def _evaluate(
    rng: np.random.Generator, step: int, skill: float, problems: Sequence[Problem]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    record: dict[str, Any] = {"step": step, "kind": "eval"}
    rows: list[dict[str, Any]] = []
    for problem in problems:
        made = problem.answer(rng, skill, 12)
        for name in ("strict", "lenient"):
            rows.append(_row(step, name, problem, made, made[name]))
        for number in range(4):
            drawn = problem.answer(rng, skill - 0.05, 12)
            rows.append(_row(step, "sampled", problem, drawn, drawn["strict"]) | {"sample": number})
    for name in ("strict", "lenient", "sampled"):
        mine = [row for row in rows if row["eval"] == name]
        accuracy, low, high = wilson(int(sum(row["score"] for row in mine)), len(mine))
        record |= {
            f"{name}/accuracy": accuracy,
            f"{name}/low": low,
            f"{name}/high": high,
            f"{name}/items": len(problems),
        }
        record[f"{name}/truncated"] = float(np.mean([row["finish"] == "length" for row in mine]))
        record[f"{name}/answer_tokens"] = float(np.mean([row["tokens"] for row in mine]))
    record["time"] = {"seconds": 4.5}
    return record, rows


def _row(step: int, name: str, problem: Problem, made: dict[str, Any], right: bool) -> dict[str, Any]:
    return {
        "step": step, "kind": "eval", "eval": name, "example": problem.example, "sample": 0, "prompt": problem.prompt,
        "text": made["text"], "answer": problem.gold, "rewards": {"right": float(right)}, "score": float(right),
        "finish": made["finish"], "tokens": made["tokens"],
    }  # fmt: skip
