"""A reward model's configuration -> a job for the supervised loop, and the run itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import sharding
from jaxpost.adapters import peft
from jaxpost.adapters.bind import merge
from jaxpost.assemble.answer_data import answer_sources
from jaxpost.assemble.model import Pretrained
from jaxpost.assemble.readout import KEY, Readout, readout_of
from jaxpost.assemble.reward_scores import judge, read_groups, read_head, save_reward_model
from jaxpost.assemble.supervised import open_model, supervised_job
from jaxpost.assemble.training import Training, head_network, make_training
from jaxpost.config import LoRASection
from jaxpost.config_reward import BradleyTerryLoss, OutcomeLoss, PlackettLuceLoss, RegressionLoss, RewardConfig
from jaxpost.data.answer_rows import AnswerSource
from jaxpost.losses import reward
from jaxpost.models import cost, heads
from jaxpost.train.job import RunResult, SupervisedJob
from jaxpost.train.supervised import run_supervised
from jaxpost.types import Model, Terms, TrainState
from jaxpost.weights import heads as stored_heads


def train(config: RewardConfig, *, command: Sequence[str] = tuple(sys.argv)) -> RunResult:
    """Trains a reward model as configured, or goes on with it where it stopped.

    Raises:
      ValueError, FileNotFoundError: a model, data, mesh or run folder that does not fit; each says what to do.
    """
    sharding.initialize_distributed()
    return run_supervised(make_job(config, command=command))


def make_job(config: RewardConfig, *, command: Sequence[str] = tuple(sys.argv)) -> SupervisedJob:
    """Everything that the loop needs, with names looked up, data tokenised and frozen weights in place."""
    pretrained = open_model(config, trunk=True)
    sources = answer_sources(config, pretrained, kind=config.data_kind, scored=True)
    _check_probabilities(config, sources)
    source = sources.pop("train")
    num_steps = config.train.steps or source.num_steps(config.train.epochs)
    readout = readout_of(config)
    loss = make_reward_loss(config, pretrained.model)
    training = make_training(
        pretrained,
        loss=loss,
        eval_loss=partial(loss, keep=True),
        keep=(reward.OUTPUTS,),
        adapter=config.adapter,
        optim=config.optim,
        num_steps=num_steps,
        microbatches=config.train.microbatches,
        networks={"head": _head(config, pretrained, readout)},
        network_lr=config.head.lr,
        hyper=reward_hyper(config),
        guard=config.train.guard,
        seed=config.run.seed,
    )
    lora = isinstance(config.adapter, LoRASection)
    job = supervised_job(
        config,
        pretrained,
        training,
        source=source,
        evals=sources,
        num_steps=num_steps,
        flops_per_token=cost.flops_per_token(
            pretrained.config, config.data.seq_len, trained="lora" if lora else "full"
        ),
        command=command,
    )
    return replace(
        job,
        examine=_examiner(config, readout, sources),
        export=reward_exporter(config, pretrained, training, readout) if config.run.export else None,
    )


def _check_probabilities(config: RewardConfig, sources: Mapping[str, AnswerSource]) -> None:
    """Cross-entropy with grades as probabilities has no least value. Raises: ValueError naming the source."""
    if not isinstance(config.loss, OutcomeLoss):
        return
    for name, source in sources.items():
        for labels, stats in zip(source.dataset.labels or (), source.dataset.stats, strict=False):
            wrong = labels[(labels < 0.0) | (labels > 1.0)]
            if wrong.size:
                raise ValueError(
                    f"data.{'train' if name == 'train' else 'eval'}: {stats.name} has the score {wrong[0]:g}, but "
                    f"loss.kind outcome reads scores as probabilities from 0 to 1; take loss.kind regression"
                )


def make_reward_loss(config: RewardConfig, model: Model) -> Callable[..., tuple[Terms, Terms]]:
    """The loss that a `loss` section names, with the head's members and objectives; takes `keep` too."""
    section, head = config.loss, config.head
    if isinstance(section, (BradleyTerryLoss, PlackettLuceLoss)):
        objective = reward.bradley_terry if isinstance(section, BradleyTerryLoss) else reward.plackett_luce
        return partial(
            reward.ranking_loss, model, read_head, objective=objective, name=section.kind, centred=section.centre > 0
        )
    loss = partial(reward.label_loss, model, read_head, members=head.members, classes=head.classes)
    if isinstance(section, RegressionLoss):
        return partial(loss, objective=reward.squared_error, name="regression")
    return partial(loss, at="tokens" if isinstance(section, OutcomeLoss) and section.at == "tokens" else "marks")


def reward_hyper(config: RewardConfig) -> dict[str, float]:
    """The loss's traced scalars."""
    section = config.loss
    names = ("margin", "label_smoothing", "centre")
    return {name: value for name in names if (value := getattr(section, name, 0.0))}


def _head(config: RewardConfig, pretrained: Pretrained, readout: Readout) -> Any:
    """The head that the model's folder has, if it has one of this shape, else a new one."""
    table = heads.head_table(pretrained.config.width, readout.outputs, bias=readout.steps, std=config.head.std)
    if stored_heads.has_head(pretrained.folder):
        stored = stored_heads.read_head(pretrained.folder)
        shapes = {leaf: np.shape(x) for leaf, x in stored.params.items()}
        if shapes == {row.path[0]: row.shape for row in table}:
            return head_network(table, load=lambda: jax.tree.map(jnp.asarray, stored.params))
    return head_network(table, seed=config.run.seed)


def _examiner(
    config: RewardConfig, readout: Readout, sources: Mapping[str, AnswerSource]
) -> Callable[[str, Sequence[Any]], Mapping[str, float]]:
    """Judges the scores of an evaluation source, answer by answer, as its batches' loss has read them."""

    def examine(name: str, kept: Sequence[Any]) -> Mapping[str, float]:
        source = replace(sources[name], rows=None)  # what is kept has all processes' rows
        scored = read_groups(source, [batch[reward.OUTPUTS] for batch in kept], readout)
        found = judge(scored, graded=isinstance(config.loss, RegressionLoss), objectives=config.objectives)
        # The loop names numbers by their source where there are several.
        return found if len(sources) > 1 else {f"{name}/{key}": value for key, value in found.items()}

    return examine


def reward_exporter(
    config: RewardConfig, pretrained: Pretrained, training: Training, readout: Readout
) -> Callable[[TrainState, Path], None]:
    """Writes a classifier's folder as transformers has it, or an adapter with its head as PEFT has it."""

    def export(state: TrainState, folder: Path) -> None:
        params = training.eval_params(state)
        if isinstance(config.adapter, LoRASection):
            peft.save(
                folder,
                pretrained.config,
                params["policy"],
                training.frozen["scales"],
                base_model=pretrained.section.path,
                rslora=config.adapter.rslora,
                overwrite=True,
                head=params["head"],
                tokens=readout.steps,
                about={KEY: readout.to_json()},
            )
        else:
            policy = merge(training.policy(params, training.frozen))
            save_reward_model(folder, pretrained, policy, params["head"], readout)

    return export
