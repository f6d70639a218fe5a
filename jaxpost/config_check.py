"""What a configuration's values must satisfy together, checked before anything is loaded. Imports no jax."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from jaxpost.config import (
    AdafactorSection,
    AdamWSection,
    AdapterSection,
    CrossEntropySection,
    DataSection,
    DFTSection,
    FullSection,
    LionSection,
    LoRASection,
    MeshSection,
    MuonSection,
    OptimSection,
    RunSection,
    SFTConfig,
    TrainSection,
)
from jaxpost.config_io import ConfigError


def check(config: SFTConfig) -> SFTConfig:
    """The configuration itself, if a run could follow it.

    >>> from jaxpost.config import SourceSection
    >>> data = DataSection(train=(SourceSection(path="a.jsonl"),))
    >>> check(SFTConfig(data=data, train=TrainSection(batch_size=4, microbatches=3)))
    Traceback (most recent call last):
      ...
    jaxpost.config_io.ConfigError: train.batch_size 4 is not a multiple of train.microbatches 3; take 1, 2 or 4

    Raises:
      ConfigError: the first thing that cannot be, with the key and what to do; further ones on lines of their own.
    """
    problems = [*_loss(config.loss), *supervised(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


@runtime_checkable
class Supervised(Protocol):
    """What the configurations of supervised methods share."""

    @property
    def data(self) -> DataSection: ...
    @property
    def adapter(self) -> AdapterSection: ...
    @property
    def optim(self) -> OptimSection: ...
    @property
    def mesh(self) -> MeshSection: ...
    @property
    def train(self) -> TrainSection: ...
    @property
    def run(self) -> RunSection: ...


def supervised(config: Supervised) -> Iterator[str]:
    """Problems of the sections that all supervised methods share."""
    yield from _data(config.data)
    yield from adapter(config.adapter)
    yield from optim(config.optim)
    yield from mesh(config.mesh)
    yield from _rows(config.mesh, config.train)
    yield from _train(config)
    yield from run(config.run)


def at_least(key: str, value: int | float | None, least: int | float) -> Iterator[str]:
    if value is not None and value < least:
        yield f"{key} is {value:g}; it must be at least {least:g}"


def above(key: str, value: int | float | None, least: int | float) -> Iterator[str]:
    if value is not None and value <= least:
        yield f"{key} is {value:g}; it must be above {least:g}"


def fraction(key: str, value: float | None) -> Iterator[str]:
    """A decay rate or share: 0 <= value < 1."""
    if value is not None and not 0 <= value < 1:
        yield f"{key} is {value:g}; it must be at least 0 and below 1"


def _data(data: DataSection) -> Iterator[str]:
    if not data.train:
        yield "data.train names no file; add one to the preset or say --data.train.0.path my.jsonl"
    for name, sources in (("train", data.train), ("eval", data.eval)):
        for i, source in enumerate(sources):
            key = f"data.{name}.{i}"
            yield from above(f"{key}.weight", source.weight, 0)
            yield from at_least(f"{key}.limit", source.limit, 1)
            yield from at_least(f"{key}.skip", source.skip, 0)
    yield from at_least("data.seq_len", data.seq_len, 2)
    for key in ("seed", "workers", "prefetch"):
        yield from at_least(f"data.{key}", getattr(data, key), 0)


def _loss(loss: CrossEntropySection | DFTSection) -> Iterator[str]:
    yield from at_least("loss.z_loss", loss.z_loss, 0)
    yield from at_least("loss.chunk_tokens", loss.chunk_tokens, 1)
    if isinstance(loss, CrossEntropySection):
        yield from fraction("loss.label_smoothing", loss.label_smoothing)


def adapter(section: FullSection | LoRASection) -> Iterator[str]:
    """Problems of this section."""
    if isinstance(section, FullSection):
        if not section.trainable:
            yield 'adapter.trainable is empty, so nothing would be trained; "*" trains everything'
        return
    yield from at_least("adapter.rank", section.rank, 1)
    yield from above("adapter.alpha", section.alpha, 0)
    if not section.targets:
        yield "adapter.targets is empty, so nothing would be trained; all-linear trains every projection"


def optim(section: AdamWSection | AdafactorSection | LionSection | MuonSection) -> Iterator[str]:
    """Problems of this section."""
    yield from above("optim.lr", section.lr, 0)
    yield from above("optim.clip_norm", section.clip_norm, 0)
    yield from fraction("optim.ema_decay", section.ema_decay)
    yield from at_least("optim.weight_decay", section.weight_decay, 0)
    if isinstance(section, (AdamWSection, LionSection)):
        yield from fraction("optim.b1", section.b1)
        yield from fraction("optim.b2", section.b2)
    if isinstance(section, AdamWSection):
        yield from above("optim.eps", section.eps, 0)
    if isinstance(section, AdafactorSection):
        yield from fraction("optim.decay_rate", section.decay_rate)
    if isinstance(section, MuonSection):
        yield from fraction("optim.momentum", section.momentum)
        yield from at_least("optim.ns_steps", section.ns_steps, 1)
        yield from above("optim.adam_lr", section.adam_lr, 0)
    schedule = section.schedule
    yield from at_least("optim.schedule.warmup", schedule.warmup, 0)
    yield from at_least("optim.schedule.decay", schedule.decay, 0)
    if not 0 <= schedule.final <= 1:
        yield f"optim.schedule.final is {schedule.final:g}; it is a fraction of optim.lr, from 0 to 1"
    if schedule.kind == "wsd" and schedule.warmup < 1 and schedule.decay < 1 and schedule.warmup + schedule.decay > 1:
        yield "optim.schedule.warmup and optim.schedule.decay together exceed all steps; lower one of them"


def mesh(section: MeshSection) -> Iterator[str]:
    """Sizes of the mesh."""
    sizes = {axis: getattr(section, axis) for axis in ("data", "fsdp", "tensor", "seq", "expert")}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            yield f"mesh.{name} is {size}; give a number of devices, or -1 for all that remain"
    open_axes = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        yield f"{' and '.join(open_axes)} are all -1; only one axis can take the devices that remain"


def _rows(mesh: MeshSection, train: TrainSection) -> Iterator[str]:
    rows = mesh.data * mesh.fsdp
    if rows > 0 and train.batch_size % rows:
        what = f"train.batch_size {train.batch_size} cannot be split over mesh.data x mesh.fsdp = {rows} devices"
        yield f"{what}; make it a multiple of {rows}"


def _train(config: Supervised) -> Iterator[str]:
    train = config.train
    yield from at_least("train.steps", train.steps, 1)
    yield from above("train.epochs", train.epochs, 0)
    for key in ("batch_size", "microbatches", "keep_checkpoints", "log_every", "eval_batches"):
        yield from at_least(f"train.{key}", getattr(train, key), 1)
    for key in ("save_every", "eval_every"):
        yield from at_least(f"train.{key}", getattr(train, key), 0)
    yield from at_least("train.samples.max_tokens", train.samples.max_tokens, 1)
    yield from at_least("train.samples.temperature", train.samples.temperature, 0)
    yield from at_least("train.samples.tensor", train.samples.tensor, 1)
    yield from at_least("train.guard.max_skips", train.guard.max_skips, 1)
    yield from above("train.guard.spike_factor", train.guard.spike_factor, 1)
    if train.batch_size >= 1 and train.microbatches >= 1 and train.batch_size % train.microbatches:
        fits = [str(n) for n in range(1, train.batch_size + 1) if train.batch_size % n == 0]
        words = f"{', '.join(fits[:-1])} or {fits[-1]}" if len(fits) > 1 else fits[0]
        what = f"train.batch_size {train.batch_size} is not a multiple of train.microbatches {train.microbatches}"
        yield f"{what}; take {words}"
    schedule = config.optim.schedule
    needed = sum(part for part in (schedule.warmup, schedule.decay * (schedule.kind == "wsd")) if part >= 1)
    if train.steps is not None and needed > train.steps:
        what = f"optim.schedule.warmup (and decay) take {needed:g} steps, but train.steps is {train.steps}"
        yield f"{what}; shorten them, or give fractions below 1"
    if train.eval_every and not config.data.eval and not train.samples.prompts:
        yield "train.eval_every asks for evaluations, but data.eval names no file and train.samples.prompts is empty"


def run(section: RunSection) -> Iterator[str]:
    """Problems of this section."""
    if not section.name or "/" in section.name or section.name in (".", ".."):
        yield f"run.name is {section.name!r}; it names a folder, so it must be a word without slashes"
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(section.dir) if name is not None}
    except ValueError:
        fields = {section.dir}
    if fields - {"name"}:
        yield f"run.dir is {section.dir!r}; {{name}} is the only thing in braces that it may hold"
    if "://" in section.dir:
        what = "a run folder appends, locks and renames: mount the bucket and give that folder"
        yield f"run.dir is {section.dir!r}; {what}"
    if section.seed < 0 or section.seed >= 2**32:
        yield f"run.seed is {section.seed}; it must be at least 0 and below 2**32"
