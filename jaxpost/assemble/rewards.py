"""A `reward` section -> the reward functions that it names, in worker processes."""

from __future__ import annotations

import math
import traceback
from dataclasses import replace
from pathlib import Path

from jaxpost.config_rewards import (
    ChoiceSection,
    CodeSection,
    FinishedSection,
    FunctionSection,
    GymSection,
    JudgeSection,
    MathSection,
    MathVerifySection,
    ModelRewardSection,
    OneBoxSection,
    OverlongSection,
    ReachesSection,
    RepetitionSection,
    RewardPart,
    RewardSection,
    ScriptSection,
    TargetLengthSection,
    ThinkFormatSection,
)
from jaxpost.rewards import answers, combine, gym, puzzles, style, verify
from jaxpost.rewards.code import CodeTests
from jaxpost.rewards.contract import RewardFn
from jaxpost.rewards.functions import FromFile, load
from jaxpost.rewards.runner import Pool
from jaxpost.rewards.scored import JudgeScore, ModelScore
from jaxpost.sandbox.limits import Limits

REWARDS: dict[type, type] = {
    MathSection: answers.MathAnswer,
    MathVerifySection: verify.MathVerify,
    GymSection: gym.GymAnswer,
    ChoiceSection: answers.MultipleChoice,
    ReachesSection: puzzles.Reaches,
    ThinkFormatSection: style.ThinkFormat,
    OneBoxSection: style.OneBox,
    FinishedSection: style.Finished,
    OverlongSection: style.Overlong,
    TargetLengthSection: style.TargetLength,
    RepetitionSection: style.Repetition,
    ScriptSection: style.Script,
    ModelRewardSection: ModelScore,
    JudgeSection: JudgeScore,
}
"""What each section names; a section has the reward's own fields, and how its score is combined."""

COMBINED = {"sum": combine.Sum, "product": combine.Product, "min": combine.Min}
SPARE_SECONDS = 2.0
"""For the sandbox to start and end, beside a program's own time."""
_OURS = ("kind", "weight", "clip_low", "clip_high")


def make_pool(section: RewardSection, *, key: str = "reward") -> Pool:
    """Workers that score with what a section says.

    Raises:
      ValueError: no parts, parts of one name, limits that do not fit; `key` names the section.
      FileNotFoundError: a function's file is not there.
      IsolationMissing: the sandbox that a code reward asks for does not work on this machine.
      ModuleNotFoundError: math-verify, where it is asked for, is not installed.
    """
    reward = make_reward_at(section, key=key)
    for part in section.parts + section.gates:
        if isinstance(part, ModelRewardSection) and not part.path:
            raise ValueError(f"{key}: the model reward {part.name!r} names no model; give it a path: [FOLDER]")
        if isinstance(part, JudgeSection):
            _check_judge(part, key)
        if isinstance(part, CodeSection | MathVerifySection):
            _check_time(part, section.seconds, key)
    for leaf in combine.leaves(reward):
        if isinstance(leaf, CodeTests | verify.MathVerify):
            leaf.prepare()  # what is missing is told now, not after the first samples
    try:
        return Pool(reward, workers=section.workers, seconds=section.seconds)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _check_time(part: CodeSection | MathVerifySection, seconds: float, key: str) -> None:
    """A row's limit must leave room for the part's own, or every slow answer is unscored in the place of wrong."""
    spare = SPARE_SECONDS if isinstance(part, CodeSection) else 0.0
    if not 0 < part.seconds < seconds - spare + 1e-9:
        raise ValueError(
            f"{key}: {part.name!r} may take {part.seconds:g} s; give a row that and {spare or 'a little'} more: "
            f"{key}.seconds is {seconds:g}"
        )


def _check_judge(part: JudgeSection, key: str) -> None:
    where = f"{key}: the judge {part.name!r}"
    if not part.path and not part.server:
        raise ValueError(f"{where} names no model; give it a path, or the address of a server")
    if (part.mode == "rubric") != bool(part.criteria):
        raise ValueError(
            f"{where} has mode {part.mode} and {len(part.criteria)} criteria; a rubric needs some, and only it"
        )
    if part.low >= part.high or part.verdicts < 1:
        raise ValueError(
            f"{where} has the scale {part.low} to {part.high} and {part.verdicts} verdicts; that says nothing"
        )
    if part.verdicts > 1 and part.temperature == 0:
        raise ValueError(f"{where} would give {part.verdicts} times the same verdict at temperature 0; raise it")


def make_reward_at(section: RewardSection, *, key: str) -> RewardFn:
    """`make_reward`, whose faults name the section's key."""
    try:
        return make_reward(section)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from None


def make_reward(section: RewardSection) -> RewardFn:
    """The function that a `reward` section describes; one part without a gate is itself."""
    if not section.parts:
        raise ValueError("it has no parts; add one, such as {kind: math}")
    parts = [_part(part) for part in section.parts]
    weights = tuple(part.weight for part in section.parts)
    if section.combine == "sum":
        alone = len(parts) == 1 and weights == (1.0,)
        value = parts[0] if alone else combine.Sum(tuple(parts), weights=weights)
    else:
        if any(weight != 1.0 for weight in weights):
            raise ValueError(f"weights belong to combine: sum, not {section.combine}")
        value = COMBINED[section.combine](tuple(parts))
    if not section.gates:
        return value
    if any(gate.weight != 1.0 for gate in section.gates):
        raise ValueError("gates open or shut, and have no weight; leave it out, or set the threshold")
    gates = [_part(gate) for gate in section.gates]
    condition = gates[0] if len(gates) == 1 else combine.Min(tuple(gates), name="gates")
    value = replace(value, name="value") if isinstance(value, combine.Combined) else value
    return combine.Gate((condition, value), threshold=section.threshold, otherwise=section.closed)


def _part(section: RewardPart) -> RewardFn:
    if isinstance(section, FunctionSection):
        path, _, name = section.path.rpartition(":")
        # Absolute, because the workers may start elsewhere; loaded here once, so that a wrong name is told at once.
        reward: RewardFn = FromFile(f"{Path(path).expanduser().resolve()}:{name}" if path else section.path)
        _try(reward.spec)
    else:
        fields = {name: value for name, value in vars(section).items() if name not in _OURS}
        reward = _code(section) if isinstance(section, CodeSection) else REWARDS[type(section)](**fields)
    if section.clip_low is None and section.clip_high is None:
        return reward
    low = float("-inf") if section.clip_low is None else section.clip_low
    high = float("inf") if section.clip_high is None else section.clip_high
    return combine.Clip((reward,), low=low, high=high, name=f"clipped_{getattr(reward, 'name', 'reward')}")


def _code(part: CodeSection) -> CodeTests:
    limits = Limits(
        seconds=part.seconds, cpu_seconds=math.ceil(part.seconds), memory_mb=part.memory_mb, output_kb=part.output_kb
    )
    return CodeTests(part.key, part.partial, part.isolation, limits, part.tolerance, part.name)


def _try(spec: str) -> None:
    """Runs a function's file once, so that what is wrong with it is said before anything starts."""
    try:
        load(spec)
    except (ValueError, FileNotFoundError):
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file may raise, or a script's end
        file = spec.rpartition(":")[0]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = file if line is None else f"{file}:{line}"
        raise ValueError(f"{where} could not be run: {type(error).__name__}: {error}") from error
