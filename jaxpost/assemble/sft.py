"""A supervised configuration -> a job for the loop, and the run itself."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxpost import config_io, sharding
from jaxpost.adapters import peft
from jaxpost.adapters.bind import merge
from jaxpost.assemble.model import Pretrained, load_model, on_mesh
from jaxpost.assemble.training import Training, make_loss, make_training
from jaxpost.config import AdapterSection, LoRASection, SampleSection, SFTConfig, SourceSection
from jaxpost.data.dataset import Progress, TokenDataset, prepare
from jaxpost.data.loader import BatchSource, make_source
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import Sampler, make_sampler
from jaxpost.models import cost
from jaxpost.text.messages import DataError
from jaxpost.train.job import RunResult, SupervisedJob
from jaxpost.train.supervised import run_supervised
from jaxpost.types import Params, TrainState
from jaxpost.weights import huggingface
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
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch_size, mesh, microbatches=config.train.microbatches)
    pretrained = load_model(config.model, mesh)
    if config.data.seq_len > pretrained.config.max_positions:
        raise ValueError(
            f"--data.seq_len {config.data.seq_len} exceeds the model's context of {pretrained.config.max_positions}"
        )
    folder = Path(config.run.dir.format(name=config.run.name))
    source, evals = _sources(config, pretrained, folder)
    num_steps = config.train.steps or source.num_steps(config.train.epochs)
    training = make_training(
        pretrained,
        loss=make_loss(config.loss, pretrained.model, mesh),
        adapter=config.adapter,
        optim=config.optim,
        num_steps=num_steps,
        microbatches=config.train.microbatches,
        guard=config.train.guard,
        seed=config.run.seed,
    )
    return SupervisedJob(
        folder=folder,
        config_text=config_io.dump(config),
        train=config.train,
        run=config.run,
        num_steps=num_steps,
        step=training.step,
        init_state=training.init_state,
        abstract_state=training.abstract_state,
        source=source,
        frozen=training.frozen,
        hyper=training.hyper,
        mesh=mesh,
        place=partial(sharding.to_global, mesh=mesh),
        evals=evals,
        eval_step=training.eval_step,
        eval_params=training.eval_params,
        lr_at=training.lr_at,
        sample=_sampler(config, pretrained, training),
        export=exporter(config.adapter, pretrained, training) if config.run.export else None,
        flops_per_token=cost.flops_per_token(
            pretrained.config, config.data.seq_len, trained="lora" if training.frozen else "full"
        ),
        identity={"model": model_identity(pretrained), "tokenizer": pretrained.tokenizer.fingerprint},
        command=tuple(command),
    )


def model_identity(pretrained: Pretrained) -> str:
    """A fingerprint of the base model: its configuration, and names and sizes of its weight files."""
    digest = hashlib.sha256((pretrained.folder / "config.json").read_bytes())
    for file in sorted(pretrained.folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()


def _sources(config: SFTConfig, pretrained: Pretrained, folder: Path) -> tuple[BatchSource, dict[str, BatchSource]]:
    """The training source and one evaluation source per file of `data.eval`."""
    rows = config.train.batch_size // config.train.microbatches
    make = partial(_source, config, pretrained)
    train_data = _dataset(config, pretrained, config.data.train, folder / "rejected.jsonl")
    names = _names(config.data.eval)
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


def _names(sources: Sequence[SourceSection]) -> list[str]:
    """A short, distinct name for each source: its file's stem, numbered where two are alike."""
    stems = [Path(s.path).name.split(".")[0] or "data" for s in sources]
    return [stem if stems.count(stem) == 1 else f"{stem}_{i}" for i, stem in enumerate(stems)]


def _dataset(
    config: SFTConfig, pretrained: Pretrained, sources: Sequence[SourceSection], rejected: Path
) -> TokenDataset:
    main = jax.process_index() == 0

    def report(progress: Progress) -> None:
        print(progress, file=sys.stderr, flush=True)

    data = prepare(
        config.data,
        sources,
        pretrained.tokenizer,
        cache_dir=cache_folder() / "tokens",
        report=report if main else None,
        rejected=rejected if main else None,
    )
    for stats in data.stats if main else ():
        lost = {**stats.bad, **stats.dropped} | ({"truncated": stats.truncated} if stats.truncated else {})
        note = "".join(f", {n} {kind}" for kind, n in lost.items())
        share = stats.trained_tokens / max(stats.tokens, 1)
        print(
            f"{stats.name}: {stats.examples} of {stats.rows} rows, {stats.tokens} tokens, {share:.0%} trained{note}",
            file=sys.stderr,
        )
    return data


def _sampler(
    config: SFTConfig, pretrained: Pretrained, training: Training
) -> Callable[[Params, Params], list[dict[str, str]]] | None:
    section: SampleSection = config.train.samples
    if not section.prompts:
        return None
    tokenizer = pretrained.tokenizer
    prompts = [chat_prompt(tokenizer, text, config.data.system_prompt) for text in section.prompts]
    if section.tensor is not None:
        pretrained = on_mesh(pretrained, sharding.remesh(pretrained.mesh, {"tensor": section.tensor, "data": -1}))
    sample = text_sampler(pretrained, rows=min(8, len(prompts)))
    wish = SamplingParams(max_tokens=section.max_tokens, temperature=section.temperature)

    def answers(params: Params, frozen: Params) -> list[dict[str, str]]:
        completions = sample(training.policy(params, frozen), prompts, wish, seed=config.run.seed)
        sample.forget()  # Between evaluations training needs the memory.
        return [{"prompt": text, "text": c.text} for text, c in zip(section.prompts, completions, strict=True)]

    return answers


def text_sampler(pretrained: Pretrained, **settings: Any) -> Sampler:
    """A sampler for one model and its tokenizer, on the model's mesh; settings as `generate.sampler.make_sampler`."""
    tokenizer = pretrained.tokenizer
    return make_sampler(
        pretrained.model,
        eos_ids=tokenizer.eos_ids,
        context=pretrained.config.max_positions,
        encode=tokenizer.encode,
        decode=tokenizer.decode,
        mesh=pretrained.mesh,
        **settings,
    )


def chat_prompt(tokenizer: Any, text: str, system: str | None) -> list[int]:
    """Token ids of one user turn in the model's chat format; of the bare text where it has none."""
    try:
        turns = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]
        return tokenizer.encode(tokenizer.render(turns, add_generation_prompt=True))
    except DataError:
        if system:
            raise
        return tokenizer.encode(text, add_bos=tokenizer.adds_bos)


def exporter(adapter: AdapterSection, pretrained: Pretrained, training: Training) -> Callable[[TrainState, Path], None]:
    """Writes the policy as a Hugging Face folder, or an adapter as a PEFT folder."""

    def export(state: TrainState, folder: Path) -> None:
        params = training.eval_params(state)
        if isinstance(adapter, LoRASection):
            peft.save(
                folder,
                pretrained.config,
                params["policy"],
                training.frozen["scales"],
                base_model=pretrained.section.path,
                rslora=adapter.rslora,
                overwrite=True,
            )
            return
        policy = merge(training.policy(params, training.frozen))
        huggingface.save(folder, pretrained.config, policy, tokenizer_from=pretrained.tokenizer_folder, overwrite=True)

    return export
