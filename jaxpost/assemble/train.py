"""A configuration of any method -> its run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax

from jaxpost.assemble import preference, reward_model, rl, sft
from jaxpost.config_io import Config, ConfigError
from jaxpost.config_preference import PreferenceConfig
from jaxpost.config_reward import RewardConfig
from jaxpost.config_rl import RLConfig
from jaxpost.config_search import SearchConfig
from jaxpost.train.job import RunResult


def writes() -> bool:
    """Whether this process writes the run's folder: one of a group does."""
    return jax.process_index() == 0


def train(config: Config, *, command: Sequence[str] = tuple(sys.argv)) -> RunResult:
    """Trains as configured, or goes on where the run stopped; see `train` of the method's module."""
    if isinstance(config, SearchConfig):
        raise ConfigError("a preset of method search trains nothing: run it with `jaxpost search PRESET`")
    if isinstance(config, PreferenceConfig):
        return preference.train(config, command=command)
    if isinstance(config, RewardConfig):
        return reward_model.train(config, command=command)
    if isinstance(config, RLConfig):
        return rl.train(config, command=command)
    return sft.train(config, command=command)
