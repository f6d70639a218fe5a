"""A supervised configuration -> a job for the loop, and the run itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jaxpost import sharding
from jaxpost.assemble.model import Pretrained
from jaxpost.assemble.supervised import open_model, reporter, run_folder, source_names, supervised_job, tell
from jaxpost.assemble.training import make_loss, make_training
from jaxpost.config import SFTConfig, SourceSection
from jaxpost.data.dataset import TokenDataset, prepare
from jaxpost.data.loader import BatchSource, make_source
from jaxpost.models import cost
from jaxpost.train.job import RunResult, SupervisedJob
from jaxpost.train.supervised import run_supervised
from jaxpost.weights.resolve import cache_folder


def train(config: SFTConfig, *, command: Sequence[str] = tuple(sys.argv)) -> RunResult:
    """Runs supervised fine-tuning as configured, or goes on with it where it stopped.

    Args:
      config: resolved and checked.
      command: as the user typed it, for the run's folder.

    Raises:
      ValueError, FileNotFoundError: a model, data, mesh or run folder that does not fit; each says what to do.
    """
    sharding.initialize_distributed()
    return run_supervised(make_job(config, command=command))


def make_job(config: SFTConfig, *, command: Sequence[str] = tuple(sys.argv)) -> SupervisedJob:
    """Everything that the loop needs, with names looked up, data tokenised and frozen weights in place."""
    pretrained = open_model(config)
    source, evals = _sources(config, pretrained, run_folder(config))
    num_steps = config.train.steps or source.num_steps(config.train.epochs)
    training = make_training(
        pretrained,
        loss=make_loss(config.loss, pretrained.model, pretrained.mesh),
        adapter=config.adapter,
        optim=config.optim,
        num_steps=num_steps,
        microbatches=config.train.microbatches,
        guard=config.train.guard,
        seed=config.run.seed,
    )
    flops = cost.flops_per_token(pretrained.config, config.data.seq_len, trained="lora" if training.frozen else "full")
    return supervised_job(
        config,
        pretrained,
        training,
        source=source,
        evals=evals,
        num_steps=num_steps,
        flops_per_token=flops,
        command=command,
    )


def _sources(config: SFTConfig, pretrained: Pretrained, folder: Path) -> tuple[BatchSource, dict[str, BatchSource]]:
    """The training source and one evaluation source per file of `data.eval`."""
    rows = config.train.batch_size // config.train.microbatches
    make = partial(_source, config, pretrained)
    train_data = _dataset(config, pretrained, config.data.train, folder / "rejected.jsonl")
    names = source_names(config.data.eval)
    evals = {
        name: make(_dataset(config, pretrained, (part,), folder / f"rejected_{name}.jsonl"), rows, endless=False)
        for name, part in zip(names, config.data.eval, strict=True)
    }
    return make(train_data, config.train.batch_size, endless=True), evals


def _source(
    config: SFTConfig, pretrained: Pretrained, dataset: TokenDataset, batch_size: int, *, endless: bool
) -> BatchSource:
    return make_source(
        dataset,
        seq_len=config.data.seq_len,
        batch_size=batch_size,
        packing=config.data.packing,
        seed=config.data.seed,
        endless=endless,
        pad_id=pretrained.tokenizer.pad_id,
        rows=sharding.local_rows(pretrained.mesh, batch_size),
        prefetch=config.data.prefetch,
    )


def _dataset(
    config: SFTConfig, pretrained: Pretrained, sources: Sequence[SourceSection], rejected: Path
) -> TokenDataset:
    report = reporter()
    data = prepare(
        config.data,
        sources,
        pretrained.tokenizer,
        cache_dir=cache_folder() / "tokens",
        report=report,
        rejected=None if report is None else rejected,
    )
    tell(data.stats)
    return data
