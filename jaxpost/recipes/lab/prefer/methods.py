"""From the name of a preference loss, or a preset, to a run on the lab's pairs: all but losses and reference is
the lab's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from jaxpost import config_io
from jaxpost.config import (
    AdamWSection,
    AnswerDataSection,
    ModelSection,
    RunSection,
    ScheduleSection,
    SourceSection,
    TrainSection,
)
from jaxpost.config_check_preference import check_preference, data_kind, needs_reference
from jaxpost.config_io import ConfigError
from jaxpost.config_preference import (
    CachedReference,
    LiveReference,
    NoReference,
    PreferenceConfig,
    ReferenceSection,
)
from jaxpost.config_preference_losses import NLLLoss, PreferenceLossSection, XPOLoss
from jaxpost.recipes.lab.model import LONGEST

LOSSES = {kind.kind: kind for kind in get_args(PreferenceLossSection) if kind is not XPOLoss}
"""Kind -> section, with the library's default numbers."""
SFT = "sft"
"""Likelihood of the chosen answers alone, every token alike."""
METHODS = ("sft", "dpo", "ipo", "kto", "orpo", "simpo", "sppo", "cpo", "apo_zero", "dpo+nll")
"""What is compared unless methods are named."""
SEQ_LEN = 8 + 2 * (1 + LONGEST) + 6
"""A prompt (with a few characters to spare) and two of the longest answers."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every method is given."""

    pairs: int = 320
    """Different pairs of a seed."""
    epochs: int = 1
    """Passes over them."""
    batch: int = 16
    """Pairs of an update: losses of single answers take both sides of as many."""
    answers: int = 8
    """Drawn for each problem, at temperature 1."""
    each: int = 2
    """Most pairs of one problem; no answer is in two of them."""
    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    """Learning rates of which every method has its best; one: for all."""

    def __post_init__(self) -> None:
        whole = {"pairs": self.pairs, "epochs": self.epochs, "batch": self.batch, "each": self.each}
        for name, value in whole.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; at least one is needed")
        if self.pairs % self.batch:
            raise ConfigError(f"{self.pairs} pairs are no whole number of updates of {self.batch}")
        if self.answers < 2:
            raise ConfigError(f"{self.answers} answers to a problem make no pair; at least two are needed")
        if not self.rates or min(self.rates) <= 0 or len(set(self.rates)) < len(self.rates):
            raise ConfigError("rates are different numbers above 0, at least one")

    @property
    def updates(self) -> int:
        """Of every run."""
        return self.epochs * self.pairs // self.batch


@dataclass(frozen=True)
class Method:
    """What is kept of a preset, or what a kind of loss stands for."""

    losses: tuple[PreferenceLossSection, ...]
    reference: ReferenceSection


def load_method(name: str) -> Method:
    """A method by a loss's kind (`dpo`), several joined by + with equal weights (`dpo+nll`), or a preset's path.

    >>> [loss.kind for loss in load_method("dpo+nll").losses], load_method("simpo").reference.kind
    (['dpo', 'nll'], 'none')

    Raises:
      ConfigError: no such loss, losses that do not go together, or a preset of another kind.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        config = config_io.load(path)
        if not isinstance(config, PreferenceConfig):
            raise ConfigError(f"{path}: `method: {config.method}`; losses come from presets of `method: preference`")
        start = config.reference
        if isinstance(start, CachedReference | LiveReference):
            start = dataclasses.replace(start, path=None)
        return Method(config.losses, start)
    if name == SFT:
        return Method((NLLLoss(mean="token"),), NoReference())
    unknown = [part for part in name.split("+") if part not in LOSSES]
    if unknown:
        raise ConfigError(
            f"{unknown[0]} is no preference loss ({SFT}, {', '.join(sorted(LOSSES))}) and no preset (a .yaml file)"
        )
    losses = tuple(LOSSES[part]() for part in name.split("+"))
    method = Method(losses, CachedReference() if needs_reference(losses) else NoReference())
    check_preference(lab_config(method, Plan(), name=name, rate=1e-4, seed=0))
    return method


def title_of(name: str) -> str:
    """How a method is called in tables and folders: its loss, or its file's stem.

    >>> title_of("dpo+nll"), title_of("configs/dpo/local_tr_dpo.yaml")
    ('dpo+nll', 'local_tr_dpo')
    """
    return Path(name).stem


def lab_config(
    method: Method,
    plan: Plan,
    *,
    name: str,
    rate: float,
    seed: int,
    model: Path = Path("model"),
    pairs: Path = Path("pairs.jsonl"),
    folder: Path = Path("run"),
) -> PreferenceConfig:
    """A method's losses and reference; the lab's model, pairs, batch, optimiser and number of updates.

    A row holds one pair, or one answer of a pair for losses of single answers, so that every update of every method
    reads equally many answers.
    """
    sides = 2 if data_kind(method.losses) == "unpaired" else 1
    return PreferenceConfig(
        model=ModelSection(path=str(model)),
        data=AnswerDataSection(
            train=(SourceSection(path=str(pairs)),), seq_len=SEQ_LEN, packing=False, on_long_row="error", seed=seed
        ),
        losses=method.losses,
        reference=method.reference,
        optim=AdamWSection(lr=rate, b2=0.95, schedule=ScheduleSection(kind="linear", warmup=0.1)),
        train=TrainSection(
            steps=plan.updates, batch_size=sides * plan.batch, save_every=100, keep_checkpoints=1, log_every=10
        ),
        run=RunSection(dir=str(folder), name=name, seed=seed, export=False),
    )


def settings(methods: dict[str, Method], plan: Plan, rates: dict[str, float]) -> dict[str, str]:
    """What decides each method's cells, beside the lab and its pairs."""
    return {
        name: config_io.dump(lab_config(method, plan, name=name, rate=rates[name], seed=0))
        for name, method in methods.items()
    }


def load_methods(names: Sequence[str]) -> dict[str, Method]:
    """Methods by their titles, in order.

    Raises:
      ConfigError: as `load_method`, none, or two of one name.
    """
    found = {title_of(name): load_method(name) for name in names}
    if not found or len(found) < len(names):
        raise ConfigError(f"methods need names of their own, at least one: {', '.join(map(title_of, names)) or 'none'}")
    return found
