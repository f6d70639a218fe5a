"""`jaxpost generate --server`: an OpenAI-compatible server answers, our own model says how probable that was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpost import sharding
from jaxpost.assemble.answer import (
    answered,
    check_turns,
    encode_prompt,
    keep_programs,
    readable,
    turns_of,
)
from jaxpost.assemble.answer_file import Done, Prompt, parts
from jaxpost.assemble.commands import load_bound
from jaxpost.assemble.wishes import read_wishes
from jaxpost.generate import external
from jaxpost.generate.reply import Answer
from jaxpost.generate.samples import Completion
from jaxpost.ops import platform
from jaxpost.ops.logprobs import token_stats
from jaxpost.text.messages import DataError
from jaxpost.text.tokenizer import Tokenizer
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
    own: Sequence[Any] | None = None,
    policy_version: int = 0,
    shape: Mapping[str, Any] | None = None,
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
      shape: what every answer must match, as `answer.generate`'s; one that does not is told as a failure.
      sampling, seed, system, chat, own, out, progress: as `answer.generate`.

    Raises:
      ServerError: the address cannot be reached, or refuses us.
      ValueError: as `answer.generate`; parameters that a server does not know. A request that fails is told in its row.
    """
    check_turns(system, chat=chat)
    wishes = read_wishes(sampling or {}, own, len(prompts), shape)

    def make(todo: list[int], done: Done) -> tuple[int, Iterable[tuple[Completion, Mapping[str, Any]]]]:
        sampler = external.connect(url, name, tokenizer=None, concurrency=requests)
        encode, score = _as_they_are(system, chat=chat), None
        if model is not None:
            sampler.tokenizer, encode, score = _by_our_model(model, system, chat=chat)
        theirs = [i for i in todo if own is not None and own[i] and i not in wishes.faults]
        refused = {i: sampler.problem(wishes.sampling[i], wishes.shapes[i]) for i in theirs}
        faults = {i: f'"sampling": {told}' for i, told in refused.items() if told is not None}
        todo, asked, failed = readable(prompts, wishes, todo, encode, {**wishes.faults, **faults})
        more: dict[str, Any] = {"policy_version": policy_version, "skip": done}
        more["shape"] = [wishes.shapes[i] for i in todo]
        stream = sampler.stream(asked, [wishes.sampling[i] for i in todo], seed=seed, example_ids=todo, **more)
        answers: Iterable[Answer] = (answer for _, answer in stream)
        total = len(failed) + sum((i, k) not in done for i in todo for k in range(wishes.sampling[i].n))
        told = ((a.completion, _told(a)) for a in (answers if score is None else score(answers)))
        return total, chain(((c, {"policy_version": policy_version}) for c, _ in failed), told)

    by = {"model": name or model, "seed": seed, "system": system, "chat": chat, "shape": shape}
    yield from answered(prompts, wishes, make, by=by, out=out, progress=progress)


def _as_they_are(system: str | None, *, chat: bool) -> Callable[[Prompt], Any]:
    """What makes messages or a text of a prompt."""

    def encode(prompt: Prompt) -> Any:
        bare, tools = parts(prompt)
        if tools:
            raise DataError("its tools are shown by a chat format of ours: name the server's model in the place of -")
        return turns_of(bare, system) if chat or not isinstance(bare, str) else bare

    return encode


def _by_our_model(
    model: str, system: str | None, *, chat: bool
) -> tuple[Tokenizer, Callable[[Prompt], Any], Callable[[Iterable[Answer]], Iterable[Answer]]]:
    """A model's tokenizer, what makes token ids of a prompt, and what gives answers its log-probabilities."""
    keep_programs()
    pretrained, params = load_bound(model)
    encode = partial(encode_prompt, pretrained.tokenizer, system=system, chat=chat)
    shards = sharding.row_shards(pretrained.mesh)
    return pretrained.tokenizer, encode, partial(_scored, pretrained.model, params, rows=-(-8 // shards) * shards)


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
    told |= {"reencoded": True} if answer.reencoded else {}
    return told | ({"untold": list(answer.untold)} if answer.untold else {})


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
