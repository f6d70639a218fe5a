"""A configuration of any method -> its run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxpost.assemble import rl, sft
from jaxpost.config_io import Config
from jaxpost.config_rl import RLConfig
from jaxpost.train.job import RunResult


def train(config: Config, *, command: Sequence[str] = tuple(sys.argv)) -> RunResult:
    """Trains as configured, or goes on where the run stopped; see `sft.train` and `rl.train`."""
    run = rl.train if isinstance(config, RLConfig) else sft.train
    return run(config, command=command)
