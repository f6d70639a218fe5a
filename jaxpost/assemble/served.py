"""`jaxpost generate --server`: an OpenAI-compatible server answers, our own model says how probable that was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpost import sharding
from jaxpost.assemble.answer import (
    Done,
    Prompt,
    answered,
    check_turns,
    encode_prompt,
    keep_programs,
    read_wishes,
    turns_of,
)
from jaxpost.assemble.commands import load_bound
from jaxpost.generate import external
from jaxpost.generate.reply import Answer
from jaxpost.generate.samples import Completion
from jaxpost.ops import platform
from jaxpost.ops.logprobs import token_stats
from jaxpost.types import Inputs, Model, Params


def ask_server(
    url: str,
    prompts: Sequence[Prompt],
    *,
    name: str | None = None,
    model: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    system: str | None = None,
    chat: bool = True,
    requests: int = 32,
    own: Sequence[Mapping[str, Any]] | None = None,
    policy_version: int = 0,
    out: Path | None = None,
    progress: Any = None,
) -> Iterator[dict[str, Any]]:
    """Has a server answer prompts; rows as `answer.generate`'s, with "policy_version".

    With a `model` of our own, its tokenizer and chat format make the prompts' token ids, and rows have "token_ids" and
    "learner_logprobs": log softmax(logits) of each of these tokens by that model ("reencoded": the server told its text
    alone, which may be other tokens than it drew). Without, the server's chat format and tokenizer count.

    Args:
      url: as http://localhost:8000/v1; the key is the environment's JAXPOST_API_KEY.
      name: of the model, as the server calls it; None: the only one that it serves.
      model: folder (a PEFT adapter folder too), hub id or `smollm2-135m-instruct`: what the server runs.
      requests: most that are under way at once.
      policy_version: of the server's weights, for the rows.
      sampling, seed, system, chat, own, out, progress: as `answer.generate`.

    Raises:
      ServerError: the address cannot be reached, or refuses us.
      ValueError: as `answer.generate`; parameters that a server does not know. A request that fails is told in its row.
    """
    check_turns(system, chat=chat)
    wishes = read_wishes(sampling or {}, own, len(prompts))

    def make(todo: list[int], done: Done) -> tuple[int, Iterable[tuple[Completion, Mapping[str, Any]]]]:
        sampler = external.connect(url, name, tokenizer=None, concurrency=requests)
        asked: list[Any] = [turns_of(p, system) if chat or not isinstance(p, str) else p for p in prompts]
        score: Callable[[Iterable[Answer]], Iterable[Answer]] | None = None
        if model is not None:
            keep_programs()
            pretrained, params = load_bound(model)
            sampler.tokenizer = pretrained.tokenizer
            asked = [encode_prompt(pretrained.tokenizer, p, system=system, chat=chat) for p in prompts]
            shards = sharding.row_shards(pretrained.mesh)
            score = partial(_scored, pretrained.model, params, rows=-(-8 // shards) * shards)
        stream = sampler.stream(
            [asked[i] for i in todo],
            [wishes[i] for i in todo],
            seed=seed,
            example_ids=todo,
            policy_version=policy_version,
            skip=done,
        )
        answers: Iterable[Answer] = (answer for _, answer in stream)
        total = sum((i, k) not in done for i in todo for k in range(wishes[i].n))
        return total, ((a.completion, _told(a)) for a in (answers if score is None else score(answers)))

    yield from answered(prompts, wishes, make, out=out, progress=progress)


def _told(answer: Answer) -> dict[str, Any]:
    """What a row says of a server's answer, beside what it says of all answers."""
    completion = answer.completion
    told: dict[str, Any] = {"policy_version": completion.policy_version}
    if completion.finish == "error":
        return told
    if answer.learner_logprobs is None and not completion.tokens:
        return told | {"tokens": answer.count}
    told |= {"token_ids": list(completion.tokens)}
    told |= {"learner_logprobs": [round(p, 6) for p in answer.learner_logprobs or ()]}
    return told | ({"reencoded": True} if answer.reencoded else {})


def _scored(model: Model, params: Params, answers: Iterable[Answer], *, rows: int) -> Iterator[Answer]:
    """Answers with our log-probabilities, `rows` at a time, as they come."""
    program = jax.jit(partial(_logprobs, model))

    def score(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.asarray(program(params, tokens))

    waiting: list[Answer] = []
    for answer in answers:
        waiting.append(answer)
        if len(waiting) == rows:
            yield from external.rescore(waiting, score, rows=rows)
            waiting = []
    yield from external.rescore(waiting, score, rows=rows)


def _logprobs(model: Model, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """log softmax(logits) of every token given those before it; of a row's first one it means nothing."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = model.forward(params, Inputs(tokens, positions, jnp.ones_like(tokens))).hidden
    chunk = platform.choices().chunk_tokens
    stats = token_stats(model.unembed, params, hidden, jnp.roll(tokens, -1, axis=1), chunk_tokens=chunk)
    return jnp.roll(stats.logprob, 1, axis=1)
