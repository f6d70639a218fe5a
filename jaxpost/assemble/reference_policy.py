"""A `reference` section -> log-probabilities beside the data, or the network that computes them in every step."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxpost import sharding
from jaxpost.adapters import peft
from jaxpost.adapters.bind import bind
from jaxpost.assemble.model import Pretrained, load_model
from jaxpost.assemble.training import chunk_tokens_of
from jaxpost.config import LoRASection
from jaxpost.config_preference import CachedReference, LiveReference, PreferenceConfig
from jaxpost.data.answer_rows import AnswerSource
from jaxpost.data.answers import AnswerDataset
from jaxpost.data.reference import GroupLogprobs, Part, ReferenceCache, file_hash
from jaxpost.losses import rescore
from jaxpost.train.agree import told
from jaxpost.train.progress import duration
from jaxpost.types import AnswerBatch, Params
from jaxpost.weights.resolve import cache_folder

TELL = 10.0
"""Seconds between lines on how far a pass is."""
VERSION = 1
"""Of what a number in the cache means."""


def start_policy(config: PreferenceConfig, pretrained: Pretrained) -> Pretrained:
    """The model whose weights the reference has: the trained one before the first step, or another by `path`.

    Raises:
      ValueError: another model with another tokenizer.
    """
    section = config.reference
    if not isinstance(section, (CachedReference, LiveReference)) or section.path is None:
        return pretrained
    other = load_model(replace(config.model, path=section.path, revision=None, tokenizer=None), pretrained.mesh)
    if other.tokenizer.fingerprint != pretrained.tokenizer.fingerprint:
        raise ValueError(
            f"reference.path {section.path} has another tokenizer than model.path {config.model.path}, so its "
            "log-probabilities are of other tokens"
        )
    return other


def reference_params(config: PreferenceConfig, pretrained: Pretrained) -> Params:
    """The reference's weights as the model reads them."""
    reference = start_policy(config, pretrained)
    params = reference.load()
    adapter = config.adapter
    if reference is not pretrained or not isinstance(adapter, LoRASection) or adapter.init_from is None:
        return params
    placed = jax.device_put(peft.load(adapter.init_from, pretrained.config), sharding.replicated(pretrained.mesh))
    return bind(params, *placed)


def frozen_reference(config: PreferenceConfig, pretrained: Pretrained) -> Mapping[str, Params]:
    """What a live reference adds to what stands still; nothing where the base under a new adapter is the reference."""
    section = config.reference
    if not isinstance(section, LiveReference):
        return {}
    new_adapter = isinstance(config.adapter, LoRASection) and config.adapter.init_from is None
    return {} if new_adapter and section.path is None else {"reference": reference_params(config, pretrained)}


def with_cached(
    config: PreferenceConfig,
    pretrained: Pretrained,
    sources: Mapping[str, AnswerSource],
    one_pass: Callable[[AnswerDataset], AnswerSource],
) -> dict[str, AnswerSource]:
    """Sources whose batches bring the reference's log-probabilities, computed now where they are not in the cache.

    Args:
      one_pass: a data set in order, once, with all rows of a batch in every process.
    """
    folder = cache_folder() / "reference"
    key = _model_key(config, pretrained, folder / "hashes")
    caches = {}
    for name, source in sources.items():
        digest = hashlib.sha256(f"{key} {source.dataset.fingerprint}".encode()).hexdigest()[:32]
        caches[name] = ReferenceCache(folder, digest, _offsets(source.dataset))
    # All processes compute together, so they must agree on what is missing.
    missing = list(told([name for name, cache in caches.items() if cache.read() is None]))
    if missing:
        params = reference_params(config, pretrained)
        score = _scorer(config, pretrained)
        for name in missing:
            _run(name, caches[name], one_pass(sources[name].dataset), partial(score, params))
    found = {name: cache.read() for name, cache in caches.items()}
    return {name: source.with_reference(_needed(found[name])) for name, source in sources.items()}


def _needed(found: GroupLogprobs | None) -> GroupLogprobs:
    if found is None:
        raise ValueError(
            "another process has the reference's log-probabilities in its cache and this one has not; empty the folder "
            "`reference` of the cache on every machine, or share it between them"
        )
    return found


def _model_key(config: PreferenceConfig, pretrained: Pretrained, memory: Path) -> str:
    """Changes with all that changes a log-probability, the data apart."""
    reference = start_policy(config, pretrained)
    files = [reference.folder / "config.json", *sorted(reference.folder.glob("*.safetensors"))]
    if isinstance(config.adapter, LoRASection) and config.adapter.init_from and reference is pretrained:
        adapter = Path(config.adapter.init_from)
        files += sorted(path for path in adapter.iterdir() if path.suffix in (".json", ".safetensors"))
    hashes = told([file_hash(path, memory) for path in files])
    about = (VERSION, hashes, config.model.param_dtype, config.model.compute_dtype, pretrained.tokenizer.fingerprint)
    return hashlib.sha256(repr(about).encode()).hexdigest()


def _offsets(data: AnswerDataset) -> np.ndarray:
    sizes = [sum(len(answer.tokens) for answer in data.group(i).answers) for i in range(len(data))]
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _scorer(config: PreferenceConfig, pretrained: Pretrained) -> Callable[[Params, AnswerBatch], np.ndarray]:
    """Log-probabilities of a batch's answers, on every process; jitted once."""
    model, mesh = pretrained.model, pretrained.mesh
    chunk = chunk_tokens_of(None, mesh)

    def run(params: Params, batch: AnswerBatch) -> jax.Array:
        return rescore.logprobs(model, params, batch, {}, chunk_tokens=chunk)

    jitted = jax.jit(run, out_shardings=sharding.replicated(mesh))

    def score(params: Params, batch: AnswerBatch) -> np.ndarray:
        with jax.set_mesh(mesh):
            return np.asarray(jax.device_get(jitted(params, sharding.spread(batch, mesh))))

    return score


def _run(name: str, cache: ReferenceCache, source: AnswerSource, score: Callable[[AnswerBatch], np.ndarray]) -> None:
    """The pass itself, from where it stopped."""
    count = source.num_batches_per_epoch
    # Processes may share a disk and tread on one another's parts: several keep them in memory, and start anew.
    alone, parts = jax.process_count() == 1, []
    done = cache.batches_done(source.fingerprint) if alone else 0
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if jax.process_index() == 0 else lambda text: None
    say(f"reference log-probabilities of {name}: {count - done} of {count} batches to compute")
    began = last = time.monotonic()
    for index in range(done, count):
        batch = source.batch(index)
        part = _part(source.read(index, score(batch)))
        if alone:
            cache.add(index, part)
        else:
            parts.append(part)
        now = time.monotonic()
        if now - last >= TELL:
            last = now
            left = (now - began) / (index + 1 - done) * (count - index - 1)
            say(f"reference log-probabilities of {name}: batch {index + 1} of {count}, {duration(left)} left")
    cache.finish(cache.stored(count) if alone else parts)
    if count > done:
        say(f"reference log-probabilities of {name}: computed in {duration(time.monotonic() - began)}, kept")


def _part(found: Mapping[int, np.ndarray]) -> Part:
    values = np.concatenate(list(found.values())) if found else np.zeros(0, np.float32)
    return Part(np.array(list(found), np.int64), values)
