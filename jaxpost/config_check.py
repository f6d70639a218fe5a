"""What a configuration's values must satisfy together, checked before anything is loaded. Imports no jax."""

from __future__ import annotations

import string
from collections.abc import Iterator

from jaxpost.config import (
    AdafactorSection,
    AdamWSection,
    CrossEntropySection,
    DataSection,
    DFTSection,
    FullSection,
    LionSection,
    LoRASection,
    MeshSection,
    MuonSection,
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
    problems = [*_data(config.data), *_loss(config.loss), *_adapter(config.adapter), *_optim(config.optim)]
    problems += [*_mesh(config.mesh, config.train), *_train(config), *_run(config.run)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _at_least(key: str, value: int | float | None, least: int | float) -> Iterator[str]:
    if value is not None and value < least:
        yield f"{key} is {value:g}; it must be at least {least:g}"


def _above(key: str, value: int | float | None, least: int | float) -> Iterator[str]:
    if value is not None and value <= least:
        yield f"{key} is {value:g}; it must be above {least:g}"


def _fraction(key: str, value: float | None) -> Iterator[str]:
    """A decay rate or share: 0 <= value < 1."""
    if value is not None and not 0 <= value < 1:
        yield f"{key} is {value:g}; it must be at least 0 and below 1"


def _data(data: DataSection) -> Iterator[str]:
    if not data.train:
        yield "data.train names no file; add one to the preset or say --data.train.0.path my.jsonl"
    for name, sources in (("train", data.train), ("eval", data.eval)):
        for i, source in enumerate(sources):
            key = f"data.{name}.{i}"
            yield from _above(f"{key}.weight", source.weight, 0)
            yield from _at_least(f"{key}.limit", source.limit, 1)
            yield from _at_least(f"{key}.skip", source.skip, 0)
    yield from _at_least("data.seq_len", data.seq_len, 2)
    for key in ("seed", "workers", "prefetch"):
        yield from _at_least(f"data.{key}", getattr(data, key), 0)


def _loss(loss: CrossEntropySection | DFTSection) -> Iterator[str]:
    yield from _at_least("loss.z_loss", loss.z_loss, 0)
    yield from _at_least("loss.chunk_tokens", loss.chunk_tokens, 1)
    if isinstance(loss, CrossEntropySection):
        yield from _fraction("loss.label_smoothing", loss.label_smoothing)


def _adapter(adapter: FullSection | LoRASection) -> Iterator[str]:
    if isinstance(adapter, FullSection):
        if not adapter.trainable:
            yield 'adapter.trainable is empty, so nothing would be trained; "*" trains everything'
        return
    yield from _at_least("adapter.rank", adapter.rank, 1)
    yield from _above("adapter.alpha", adapter.alpha, 0)
    if not adapter.targets:
        yield "adapter.targets is empty, so nothing would be trained; all-linear trains every projection"


def _optim(optim: AdamWSection | AdafactorSection | LionSection | MuonSection) -> Iterator[str]:
    yield from _above("optim.lr", optim.lr, 0)
    yield from _above("optim.clip_norm", optim.clip_norm, 0)
    yield from _fraction("optim.ema_decay", optim.ema_decay)
    yield from _at_least("optim.weight_decay", optim.weight_decay, 0)
    if isinstance(optim, (AdamWSection, LionSection)):
        yield from _fraction("optim.b1", optim.b1)
        yield from _fraction("optim.b2", optim.b2)
    if isinstance(optim, AdamWSection):
        yield from _above("optim.eps", optim.eps, 0)
    if isinstance(optim, AdafactorSection):
        yield from _fraction("optim.decay_rate", optim.decay_rate)
    if isinstance(optim, MuonSection):
        yield from _fraction("optim.momentum", optim.momentum)
        yield from _at_least("optim.ns_steps", optim.ns_steps, 1)
        yield from _above("optim.adam_lr", optim.adam_lr, 0)
    schedule = optim.schedule
    yield from _at_least("optim.schedule.warmup", schedule.warmup, 0)
    yield from _at_least("optim.schedule.decay", schedule.decay, 0)
    if not 0 <= schedule.final <= 1:
        yield f"optim.schedule.final is {schedule.final:g}; it is a fraction of optim.lr, from 0 to 1"
    if schedule.kind == "wsd" and schedule.warmup < 1 and schedule.decay < 1 and schedule.warmup + schedule.decay > 1:
        yield "optim.schedule.warmup and optim.schedule.decay together exceed all steps; lower one of them"


def _mesh(mesh: MeshSection, train: TrainSection) -> Iterator[str]:
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor, "seq": mesh.seq, "expert": mesh.expert}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            yield f"mesh.{name} is {size}; give a number of devices, or -1 for all that remain"
    open_axes = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        yield f"{' and '.join(open_axes)} are all -1; only one axis can take the devices that remain"
    rows = mesh.data * mesh.fsdp
    if rows > 0 and train.batch_size % rows:
        what = f"train.batch_size {train.batch_size} cannot be split over mesh.data x mesh.fsdp = {rows} devices"
        yield f"{what}; make it a multiple of {rows}"


def _train(config: SFTConfig) -> Iterator[str]:
    train = config.train
    yield from _at_least("train.steps", train.steps, 1)
    yield from _above("train.epochs", train.epochs, 0)
    for key in ("batch_size", "microbatches", "keep_checkpoints", "log_every", "eval_batches"):
        yield from _at_least(f"train.{key}", getattr(train, key), 1)
    for key in ("save_every", "eval_every"):
        yield from _at_least(f"train.{key}", getattr(train, key), 0)
    yield from _at_least("train.samples.max_tokens", train.samples.max_tokens, 1)
    yield from _at_least("train.samples.temperature", train.samples.temperature, 0)
    yield from _at_least("train.samples.tensor", train.samples.tensor, 1)
    yield from _at_least("train.guard.max_skips", train.guard.max_skips, 1)
    yield from _above("train.guard.spike_factor", train.guard.spike_factor, 1)
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


def _run(run: RunSection) -> Iterator[str]:
    if not run.name or "/" in run.name or run.name in (".", ".."):
        yield f"run.name is {run.name!r}; it names a folder, so it must be a word without slashes"
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(run.dir) if name is not None}
    except ValueError:
        fields = {run.dir}
    if fields - {"name"}:
        yield f"run.dir is {run.dir!r}; {{name}} is the only thing in braces that it may hold"
    if "://" in run.dir:
        yield f"run.dir is {run.dir!r}; a run folder appends, locks and renames: mount the bucket and give that folder"
    if run.seed < 0 or run.seed >= 2**32:
        yield f"run.seed is {run.seed}; it must be at least 0 and below 2**32"
