"""An `env` section -> answers of several turns: many conversations with tools at once, sampled by the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxpost.config_env import EnvSection, PythonTool, SearchTool, ToolSection
from jaxpost.config_rollout import RolloutSection
from jaxpost.data.sources import open_source
from jaxpost.envs import rollout as driver
from jaxpost.envs.chat import ToolEnv, describe, listed
from jaxpost.envs.contract import Codec
from jaxpost.envs.tools import Calculator, Python, Search, Tool
from jaxpost.generate.params import SamplingParams
from jaxpost.rewards.contract import Completion, Example, Sample
from jaxpost.rewards.runner import Scored
from jaxpost.rl.episodes import Episode, Problem
from jaxpost.sandbox.limits import Limits
from jaxpost.sandbox.run import run_python
from jaxpost.train.online_job import Draw, Wish


def system_of(section: EnvSection | None) -> str:
    """What every system turn says of the tools; "" without an environment."""
    if section is None:
        return ""
    return (
        describe(section.tools) if section.system is None else section.system.replace("{tools}", listed(section.tools))
    )


@dataclass(frozen=True)
class Environments:
    """Plays problems to their ends."""

    section: EnvSection
    rollout: RolloutSection
    codec: Codec
    context: int
    """The model's longest, in tokens."""
    tools: tuple[Tool, ...]
    identity: Mapping[str, str] = field(default_factory=dict)
    """Changes whenever what a tool knows does."""

    def play(self, sample: driver.Sample, problems: Sequence[Problem], wish: Wish, draw: Draw) -> list[Episode]:
        """`wish.samples` episodes of every problem, in order of problem and sample.

        The noise of a token depends on (seed, draw, problem, sample) and its place in the episode, never on the others
        that are sampled with it: the tools' answers being the same, so is the episode.
        """
        section, order = self.section, [(i, k) for i in range(len(problems)) for k in range(wish.samples)]
        envs = [_Conversation(self.codec, self.tools, max_calls=section.max_turns - 1, max_result=section.max_result,
                              system="", role=section.role) for _ in order]  # fmt: skip
        played = driver.rollout(
            envs,
            [{"tokens": problems[i].tokens} for i, _ in order],
            sample,
            sampling=SamplingParams(
                temperature=wish.temperature,
                max_tokens=wish.max_tokens,
                min_tokens=min(self.rollout.min_tokens, wish.max_tokens),
                stop=self._stop(),
            ),
            context=self.context,
            max_answer=section.max_tokens,
            max_turns=section.max_turns,
            seed=draw.seed,
            draw=draw.step,
            example_ids=[problems[i].number * wish.samples + k for i, k in order],
            workers=section.workers,
        )
        return [
            self._episode(i, k, env, one, draw.version)._replace(opened=problems[i].opened)
            for (i, k), env, one in zip(order, envs, played, strict=True)
        ]  # fmt: skip

    def _stop(self) -> tuple[str, ...]:
        ends = tuple(f"</{tool.name}>" for tool in self.tools) if self.section.stop_at_call else ()
        return (*self.rollout.stop, *ends)

    def _episode(self, problem: int, sample: int, env: _Conversation, one: driver.Episode, version: int) -> Episode:
        transcript = self.codec.decode(one.tokens, skip_special_tokens=False)
        return Episode(
            problem, sample, one.tokens, one.mask, one.logprobs,
            finish="turns" if env.cut else "stop" if one.finish == "done" else one.finish,
            text=self._last_turn(one),
            version=version,
            reward=None if one.error is None else math.nan,
            info={
                "turns": float(one.turns),
                "tool_calls": float(env.calls),
                "tool_errors": float(env.errors),
                "tool_tokens": float(len(one.mask) - sum(one.mask)),
                "failed": float(one.error is not None),
            },
            transcript=transcript if one.error is None else f"{transcript}\n[{one.error}]",
        )  # fmt: skip

    def _last_turn(self, one: driver.Episode) -> str:
        """Without special tokens, and without a stop string of the user's."""
        begin = len(one.mask)
        while begin and one.mask[begin - 1]:
            begin -= 1
        text = self.codec.decode(one.tokens[begin:])
        for stop in self.rollout.stop:
            text = text.partition(stop)[0]
        return text


class _Conversation(ToolEnv):
    """Begins with the problem's own tokens, which its samples share."""

    def reset(self, example: Mapping[str, Any]) -> tuple[int, ...]:
        self.begin(example)
        return tuple(example["tokens"])


def make_environments(
    section: EnvSection | None, rollout: RolloutSection, codec: Codec, *, context: int
) -> Environments | None:
    """Tools that work, and a corpus that is indexed; None without an `env` section.

    Raises:
      IsolationMissing: the sandbox that a Python tool asks for does not work on this machine.
      ValueError, FileNotFoundError: a corpus that cannot be read, or programs to be run in several processes.
    """
    if section is None:
        return None
    identity: dict[str, str] = {}
    tools = tuple(_tool(tool, f"env.tools.{i}", identity) for i, tool in enumerate(section.tools))
    return Environments(section, rollout, codec, context, tools, identity)


def _tool(section: ToolSection, key: str, identity: dict[str, str]) -> Tool:
    if isinstance(section, PythonTool):
        if jax.process_count() > 1:
            raise ValueError(
                f"{key}: what a program prints may differ between the {jax.process_count()} processes of this run, "
                "which must sample the same; use calculator or search, or one process"
            )
        limits = Limits(
            seconds=section.seconds, cpu_seconds=math.ceil(section.seconds), memory_mb=section.memory_mb,
            output_kb=section.output_kb,
        )  # fmt: skip
        run_python("", isolation=section.isolation)
        return Python(section.name, section.description, limits, section.isolation)
    if isinstance(section, SearchTool):
        return _search(section, key, identity)
    return Calculator(section.name, section.description)


def _search(section: SearchTool, key: str, identity: dict[str, str]) -> Search:
    reader = open_source(section.source)
    passages: list[str] = []
    for row in reader.rows():
        if row.value is None:
            raise ValueError(f"{row.where}: {row.error}")
        text = row.value.get("text")
        if not isinstance(text, str):
            raise ValueError(
                f"{row.where}: there is no text among {', '.join(row.value)}; "
                f"say {key}.source.columns '{{text: COLUMN}}'"
            )
        passages.append(text)
    if not passages:
        raise ValueError(f"{key}.source: {reader.name} has no passages; give another file")
    identity[key] = reader.digest()
    return Search(
        passages, count=section.count, max_chars=section.max_chars, name=section.name, description=section.description
    )


def judged(score: Callable[..., Scored]) -> Callable[..., Scored]:
    """Rewards read of an answer of several turns its last one, and the tokens that the policy chose; and before a text
    the tag of the thought that its prompt opened, without which an unfinished thought would look like an answer."""

    def of_last_turns(examples: Sequence[Example], completions: Sequence[Completion]) -> Scored:
        return score(examples, [_judged(completion) for completion in completions])

    return of_last_turns


def _judged(completion: Completion) -> Completion:
    if not isinstance(completion, Episode) or (completion.transcript is None and not completion.opened):
        return completion
    return Sample(completion.opened + completion.text, completion.own, completion.finish)
