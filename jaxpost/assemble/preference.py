"""A preference configuration -> a job for the supervised loop, and the run itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from jaxpost import sharding
from jaxpost.assemble.answer_data import answer_sources, shares_prompts
from jaxpost.assemble.model import Pretrained
from jaxpost.assemble.preference_losses import make_preference_loss, preference_hyper
from jaxpost.assemble.prompt_weights import with_prompt_weights
from jaxpost.assemble.reference_policy import frozen_reference, reference_params, with_cached
from jaxpost.assemble.supervised import open_model, supervised_job
from jaxpost.assemble.training import make_training
from jaxpost.config import LoRASection
from jaxpost.config_check_preference import data_kind, needs_mismatched, needs_reference
from jaxpost.config_preference import CachedReference, PreferenceConfig, RefreshedReference
from jaxpost.config_preference_losses import BCOLoss
from jaxpost.data.answer_rows import AnswerSource, make_answer_source
from jaxpost.data.answers import AnswerDataset
from jaxpost.models import cost
from jaxpost.train.job import RunResult, SupervisedJob
from jaxpost.train.supervised import run_supervised
from jaxpost.train.watch_preference import watch


def train(config: PreferenceConfig, *, command: Sequence[str] = tuple(sys.argv)) -> RunResult:
    """Runs preference optimisation as configured, or goes on with it where it stopped.

    Raises:
      ValueError, FileNotFoundError: a model, data, mesh or run folder that does not fit; each says what to do.
    """
    sharding.initialize_distributed()
    return run_supervised(make_job(config, command=command))


def make_job(config: PreferenceConfig, *, command: Sequence[str] = tuple(sys.argv)) -> SupervisedJob:
    """Everything that the loop needs: data tokenised, the reference's log-probabilities or its weights in place."""
    pretrained = open_model(config)
    sources = answer_sources(
        config,
        pretrained,
        kind=data_kind(config.losses),
        mismatched=needs_mismatched(config.losses),
        unweighted=() if config.special_tokens == "count" else pretrained.tokenizer.special_ids,
    )
    matched = [loss for loss in config.losses if isinstance(loss, BCOLoss) and loss.prompt_weights != "none"]
    if matched:
        params, tokens = reference_params(config, pretrained), config.data.seq_len * config.train.batch_size
        sources = with_prompt_weights(
            matched[0], pretrained, params, sources, tokens=tokens // config.train.microbatches
        )
        del params
    if isinstance(config.reference, CachedReference):
        sources = with_cached(config, pretrained, sources, partial(_pass, config, pretrained))
    source = sources.pop("train")
    num_steps = config.train.steps or source.num_steps(config.train.epochs)
    live = needs_reference(config.losses) and not isinstance(config.reference, CachedReference)
    refreshed = isinstance(config.reference, RefreshedReference)
    training = make_training(
        pretrained,
        loss=make_preference_loss(
            config.losses, pretrained.model, pretrained.mesh, live_reference=live, chunk_tokens=config.chunk_tokens
        ),
        adapter=config.adapter,
        optim=config.optim,
        num_steps=num_steps,
        microbatches=config.train.microbatches,
        frozen=frozen_reference(config, pretrained),
        hyper=preference_hyper(config.losses),
        refresh={"every": config.reference.every, "mix": config.reference.mix} if refreshed else None,
        guard=config.train.guard,
        seed=config.run.seed,
    )
    per_token = partial(cost.flops_per_token, pretrained.config, config.data.seq_len)
    lora = isinstance(config.adapter, LoRASection)
    return supervised_job(
        config,
        pretrained,
        training,
        source=source,
        evals=sources,
        num_steps=num_steps,
        flops_per_token=per_token(trained="lora" if lora else "full") + (per_token(trained="none") if live else 0.0),
        watch=partial(watch, limits=config.watch, centred=needs_reference(config.losses)),
        command=command,
    )


def _pass(config: PreferenceConfig, pretrained: Pretrained, dataset: AnswerDataset) -> AnswerSource:
    """A data set in order, packed as densely as it goes, every row in every process."""
    section = config.reference
    given = section.batch_size if isinstance(section, CachedReference) else None
    batch_size = given or config.train.batch_size // config.train.microbatches
    sharding.check_batch(batch_size, pretrained.mesh)
    return make_answer_source(
        dataset,
        seq_len=config.data.seq_len,
        batch_size=batch_size,
        share_prompts=shares_prompts(config.share_prompts, config.model),
        endless=False,
        pad_id=pretrained.tokenizer.pad_id,
    )
