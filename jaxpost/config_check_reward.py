"""What the values of a reward model's configuration must satisfy together. Imports no jax."""

from __future__ import annotations

from collections.abc import Iterator

from jaxpost.config_check import above, at_least, supervised
from jaxpost.config_io import ConfigError
from jaxpost.config_reward import BradleyTerryLoss, OutcomeLoss, PlackettLuceLoss, ProcessLoss, RewardConfig


def check_reward(config: RewardConfig) -> RewardConfig:
    """The configuration itself, if a run could follow it.

    Raises:
      ConfigError: all that cannot be, a line each, with the key and what to do.
    """
    problems = [*_head(config), *_loss(config), *supervised(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _head(config: RewardConfig) -> Iterator[str]:
    head, loss = config.head, config.loss
    yield from at_least("head.members", head.members, 1)
    yield from at_least("head.std", head.std, 0)
    yield from above("head.lr", head.lr, 0)
    if head.members > 1 and head.std == 0:
        yield "head.std is 0, so all head.members would start and stay alike; leave it out"
    names = config.data.objectives
    if len(set(names)) < len(names):
        yield f"data.objectives is {', '.join(names)}; name each objective once"
    if names and config.data_kind != "scores":
        yield f"loss.kind {loss.kind} reads no scores of several objectives; leave data.objectives out"
    if head.classes == 2 and not isinstance(loss, (OutcomeLoss, ProcessLoss)):
        yield f"head.classes 2 is for right and wrong (outcome, process); loss.kind {loss.kind} has one output"


def _loss(config: RewardConfig) -> Iterator[str]:
    loss = config.loss
    if isinstance(loss, (BradleyTerryLoss, PlackettLuceLoss)):
        yield from at_least("loss.centre", loss.centre, 0)
    if isinstance(loss, BradleyTerryLoss):
        yield from at_least("loss.margin", loss.margin, 0)
    smoothing = getattr(loss, "label_smoothing", 0.0)
    if not 0 <= smoothing < 0.5:
        yield f"loss.label_smoothing is {smoothing:g}; the share of wrong labels is at least 0 and below 0.5"
    if config.train.samples.prompts:
        yield "train.samples.prompts asks for texts, which a reward model does not write; leave it out"
    yield from at_least("data.max_length", config.data.max_length, 2)
