"""What a run was, in a line and a handful of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxpost.report import page
from jaxpost.report.read import Run
from jaxpost.report.results import Evaluation, means
from jaxpost.report.text import clean, number, p_value, percent
from jaxpost.train.progress import duration


def method_of(run: Run) -> str:
    """The method, as the configuration has it: of reinforcement learning, what it is composed of."""
    parts = [run.setting(key) for key in ("method", "advantage.kind", "loss.kind", "adapter.kind")]
    losses = run.setting("losses")
    if isinstance(losses, list):
        parts.insert(1, " + ".join(str(each.get("kind")) for each in losses if isinstance(each, dict)))
    return clean(" · ".join(str(part) for part in parts if part and part != "full") or "a run", 80)


def model_of(run: Run) -> str:
    """The model that was trained."""
    return clean(run.setting("model.path") or "an unknown model", 200)


def task_of(run: Run) -> str:
    """Where prompts or examples came from: the configuration's sources, by path or name."""
    found: list[str] = []
    for key in ("prompts", "data.train"):
        value = run.setting(key)
        for source in value if isinstance(value, list) else [value]:
            found += [str(v) for v in _names(source)]
    return clean(", ".join(dict.fromkeys(found)), 200)


def _names(source: Any) -> list[Any]:
    if isinstance(source, dict) and isinstance(source.get("sources"), list) and source["sources"]:
        return [name for each in source["sources"] for name in _names(each)]
    if isinstance(source, dict):
        return [source[key] for key in ("path", "kind", "name") if isinstance(source.get(key), str)][:1]
    return [source] if isinstance(source, str) else []


def last_step(run: Run) -> int:
    """How many steps were done."""
    return max((r["step"] for r in run.records), default=0)


def seconds_of(run: Run) -> float:
    """Seconds of training and evaluation that metrics.jsonl accounts for."""
    total, before = 0.0, 0
    for record in run.records:
        spent = record.get("time")
        if not isinstance(spent, dict):
            continue
        if (seconds := number(spent.get("seconds"))) is not None:
            total += seconds
        elif (each := number(spent.get("seconds_per_update"))) is not None:
            total += each * max(record["step"] - before, 0)
        if record.get("kind") == "train":
            before = record["step"]
    return total


def status(run: Run) -> str:
    """How far it came."""
    done, total = last_step(run), number(run.setting("train.steps"))
    of = f" of {int(total)}" if total is not None else ""
    going_on = " (in progress, or stopped)" if total is not None and done < total and not _all_drawn(run) else ""
    starts = f", in {len(run.starts)} attempts" if len(run.starts) > 1 else ""
    return f"{done}{of} steps{going_on}{starts}"


def _all_drawn(run: Run) -> bool:
    """Whether an online run ended before its last step because all of `train.samples` were drawn."""
    most, each = number(run.setting("train.samples")), number(run.setting("rollout.samples"))
    drawn = number(run.train[-1].get("problems")) if run.train else None
    return most is not None and each is not None and drawn is not None and drawn * each >= most


def headline(run: Run) -> tuple[str, str]:
    """The run's name, and a line that says what it was."""
    parts = [f"{method_of(run)} of {model_of(run)}"]
    if task := task_of(run):
        parts.append(f"on {task}")
    if run.starts:
        parts.append(f"on {run.starts[-1].get('devices', '')}")
    if seconds := seconds_of(run):
        parts.append(f"in {duration(seconds)}")
    return run.name, " ".join(parts)


def tiles(run: Run, found: Sequence[Evaluation]) -> str:
    """The numbers to see first."""
    shown = []
    if found:
        one = found[0].accuracy
        if one.before is not None:
            after = f" → {percent(one.after.value)}" if one.after is not None else ""
            test = f", {p_value(one.test.p)}" if one.test else ""
            shown.append((f"{percent(one.before.value)}{after}", f"accuracy on {found[0].name}{test}"))
    else:
        losses = [row for row in means(run, found) if row[0].rpartition("/")[2] == "loss"]
        shown += [(f"{first:.4f} → {last:.4f}", f"held-out {name}") for name, first, last in losses[:3]]
    if rewards := [v for r in run.train if (v := number(r.get("reward"))) is not None]:
        n = max(len(rewards) // 10, 1)
        shown.append((f"{_mean(rewards[:n]):.3g} → {_mean(rewards[-n:]):.3g}", "reward, first and last tenth"))
    shown.append((str(last_step(run)), "steps"))
    if seconds := seconds_of(run):
        shown.append((duration(seconds), "training and evaluation"))
    if run.train and ("reward" in run.train[-1] or "rewards/margin" in run.train[-1]):
        shown.append((str(len(run.alarms)), "alarms"))
    return page.tiles(shown)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
