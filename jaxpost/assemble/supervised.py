"""What every job of the supervised loop is made of, whatever the method: sources told, samples, exports, identity."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from jaxpost import config_io, sharding
from jaxpost.adapters import peft
from jaxpost.adapters.bind import merge
from jaxpost.assemble.model import Pretrained, load_model, on_mesh
from jaxpost.assemble.training import Training
from jaxpost.config import (
    AdapterSection,
    LoRASection,
    ModelSection,
    SampleSection,
    SourceSection,
)
from jaxpost.config_check import Supervised
from jaxpost.data.dataset import Progress, SourceStats
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import Sampler, make_sampler
from jaxpost.text.messages import DataError
from jaxpost.train.job import Source, SupervisedJob, WatchFn
from jaxpost.types import Params, TrainState
from jaxpost.weights import huggingface


@runtime_checkable
class Sections(Supervised, Protocol):
    """What a job reads of the configurations of supervised methods."""

    @property
    def model(self) -> ModelSection: ...


def open_model(config: Sections, *, trunk: bool = False) -> Pretrained:
    """The model on its mesh, if rows of `data.seq_len` tokens can be dealt to the mesh and fit the model.

    Args:
      trunk: without the language model's head (`load_model`).

    Raises:
      ValueError, FileNotFoundError: it does not fit, or there is none; says what to do.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch_size, mesh, microbatches=config.train.microbatches)
    pretrained = load_model(config.model, mesh, trunk=trunk)
    if config.data.seq_len > pretrained.config.max_positions:
        raise ValueError(
            f"--data.seq_len {config.data.seq_len} exceeds the model's context of {pretrained.config.max_positions}"
        )
    return pretrained


def run_folder(config: Sections) -> Path:
    return Path(config.run.dir.format(name=config.run.name))


def supervised_job(
    config: Sections,
    pretrained: Pretrained,
    training: Training,
    *,
    source: Source,
    evals: Mapping[str, Source],
    num_steps: int,
    flops_per_token: float,
    command: Sequence[str],
    watch: WatchFn | None = None,
    identity: Mapping[str, str] | None = None,
) -> SupervisedJob:
    """A job of the supervised loop from its parts.

    Args:
      watch: raises alarms over records of training.
      identity: what else a resumed run must share, beside the base model and the tokenizer.
    """
    return SupervisedJob(
        folder=run_folder(config),
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
        mesh=pretrained.mesh,
        place=partial(sharding.to_global, mesh=pretrained.mesh),
        evals=evals,
        eval_step=training.eval_step,
        eval_params=training.eval_params,
        lr_at=training.lr_at,
        sample=_sampler(config, pretrained, training),
        export=exporter(config.adapter, pretrained, training) if config.run.export else None,
        flops_per_token=flops_per_token,
        watch=watch,
        identity={
            "model": model_identity(pretrained),
            "tokenizer": pretrained.tokenizer.fingerprint,
            **(identity or {}),
        },
        command=tuple(command),
    )


def model_identity(pretrained: Pretrained) -> str:
    """A fingerprint of the base model: its configuration, and names and sizes of its weight files."""
    digest = hashlib.sha256((pretrained.folder / "config.json").read_bytes())
    for file in sorted(pretrained.folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()


def source_names(sources: Sequence[SourceSection]) -> list[str]:
    """A short, distinct name for each source: its file's stem, numbered where two are alike."""
    stems = [Path(s.path).name.split(".")[0] or "data" for s in sources]
    return [stem if stems.count(stem) == 1 else f"{stem}_{i}" for i, stem in enumerate(stems)]


def reporter() -> Callable[[Progress], None] | None:
    """Says how far tokenisation is; None on a process that does not speak."""
    if jax.process_index() != 0:
        return None
    return lambda progress: print(progress, file=sys.stderr, flush=True)


def tell(sources: Sequence[SourceStats], *, each: str = "") -> None:
    """A line for every source: what of it is trained on, and what is not and why.

    Args:
      each: what examples are called where a row can make several; "": an example is a row.
    """
    for stats in sources if jax.process_index() == 0 else ():
        lost = {**stats.bad, **stats.dropped} | ({"truncated": stats.truncated} if stats.truncated else {})
        note = "".join(f", {n} {kind}" for kind, n in lost.items())
        share = stats.trained_tokens / max(stats.tokens, 1)
        print(
            f"{stats.name}: {stats.examples} {each and f'{each} '}of {stats.rows} rows, {stats.tokens} tokens, "
            f"{share:.0%} trained{note}",
            file=sys.stderr,
        )


def _sampler(
    config: Sections, pretrained: Pretrained, training: Training
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
        turns = [{"role": "user", "content": text}]
        return tokenizer.encode(tokenizer.render(turns, add_generation_prompt=True, system=system))
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
