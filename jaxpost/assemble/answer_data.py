"""Judged rows of a configuration -> batches of answers, whatever the method learns from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from jaxpost import sharding
from jaxpost.assemble.model import Pretrained
from jaxpost.assemble.supervised import Sections, reporter, run_folder, source_names, tell
from jaxpost.config import AnswerDataSection, ModelSection, SourceSection
from jaxpost.data.answer_rows import AnswerSource, make_answer_source
from jaxpost.data.answers import AnswerDataset, prepare_answers
from jaxpost.data.groups import Kind
from jaxpost.weights.resolve import cache_folder


@runtime_checkable
class AnswerSections(Sections, Protocol):
    """What the configurations of methods that learn from answers share."""

    @property
    def data(self) -> AnswerDataSection: ...
    @property
    def share_prompts(self) -> bool | None: ...


EACH: dict[Kind, str] = {
    "pairs": "pairs",
    "rankings": "rankings",
    "unpaired": "answers",
    "scores": "groups of answers",
    "steps": "answers",
}
"""What a group of each kind is called; a row can make several."""


def shares_prompts(wish: bool | None, model: ModelSection) -> bool:
    """Whether answers of a group stand behind one copy of their prompt, which splash attention cannot read."""
    splash = model.attention == "splash" or (model.attention == "auto" and jax.default_backend() == "tpu")
    return not splash if wish is None else wish


def answer_dataset(
    config: AnswerSections, pretrained: Pretrained, sources: Sequence[SourceSection], rejected: Path, *, kind: Kind
) -> AnswerDataset:
    """Tokenised groups of some sources; what is left out is told."""
    report = reporter()
    data = prepare_answers(
        config.data,
        sources,
        pretrained.tokenizer,
        kind=kind,
        cache_dir=cache_folder() / "tokens",
        share_prompts=shares_prompts(config.share_prompts, config.model),
        report=report,
        rejected=None if report is None else rejected,
    )
    tell(data.stats, each=EACH[kind])
    return data


def answer_sources(
    config: AnswerSections, pretrained: Pretrained, *, kind: Kind, **options: Any
) -> dict[str, AnswerSource]:
    """The training source as "train", and one evaluation source per file of `data.eval`.

    Args:
      kind: what rows are read as.
      options: the method's own (`scored`, `mismatched` ...) of `make_answer_source`.
    """
    folder = run_folder(config)
    data = partial(answer_dataset, config, pretrained, kind=kind)
    make = partial(_source, config, pretrained, options)
    rows = config.train.batch_size // config.train.microbatches
    train = data(config.data.train, folder / "rejected.jsonl")
    found = {"train": make(train, config.train.batch_size, endless=True)}
    for name, part in zip(source_names(config.data.eval), config.data.eval, strict=True):
        name = f"{name}_eval" if name == "train" else name
        found[name] = make(data((part,), folder / f"rejected_{name}.jsonl"), rows, endless=False)
    return found


def _source(
    config: AnswerSections,
    pretrained: Pretrained,
    options: Mapping[str, Any],
    dataset: AnswerDataset,
    batch_size: int,
    *,
    endless: bool,
) -> AnswerSource:
    return make_answer_source(
        dataset,
        seq_len=config.data.seq_len,
        batch_size=batch_size,
        share_prompts=shares_prompts(config.share_prompts, config.model),
        packing=config.data.packing,
        seed=config.data.seed,
        endless=endless,
        pad_id=pretrained.tokenizer.pad_id,
        rows=sharding.local_rows(pretrained.mesh, batch_size),
        prefetch=config.data.prefetch,
        **options,
    )
