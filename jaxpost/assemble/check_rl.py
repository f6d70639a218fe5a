"""What can be known of a run's problems and rewards before it starts, each fault by file, row and key."""

from __future__ import annotations

from collections.abc import Mapping

from jaxpost.assemble.prompts import Problems
from jaxpost.assemble.references import check_references
from jaxpost.assemble.rewards import make_reward_at
from jaxpost.config_rl import RLConfig


def check_problems(config: RLConfig, room: int, problems: Problems, evals: Mapping[str, Problems]) -> None:
    """Nothing, if prompts fit into the context and rewards can read every row.

    Args:
      room: the model's longest context, in tokens.

    Raises:
      ValueError: prompts that are too long, rows without what a reward reads, references that score nothing.
      FileNotFoundError: a reward function's file that is not there.
    """
    limit, named = config.answer_tokens, "rollout.max_tokens" if config.env is None else "env.max_tokens"
    _check_room(problems, limit, room, "prompts", named)
    check_references(make_reward_at(config.reward, key="reward"), problems.rows, key="prompts")
    for i, section in enumerate(config.evals):
        key, found = f"evals.{i}", evals[section.name]
        if config.env is not None:
            _check_room(found, limit, room, f"{key}.prompts", named)
        else:
            _check_room(found, section.max_tokens or limit, room, f"{key}.prompts", f"{key}.max_tokens")
        reward = make_reward_at(section.reward or config.reward, key=f"{key}.reward" if section.reward else "reward")
        check_references(reward, found.rows, key=f"{key}.prompts")


def _check_room(problems: Problems, answer: int, room: int, key: str, limit: str) -> None:
    if problems.longest + answer <= room:
        return
    what = f"lower {limit}" if answer >= room else f"lower {limit}, or leave long prompts out with --{key}.max_tokens N"
    raise ValueError(
        f"{problems.longest_row.where}: a prompt of {problems.longest} tokens and an answer of {answer} ({limit}) "
        f"exceed the model's context of {room}; {what}"
    )
