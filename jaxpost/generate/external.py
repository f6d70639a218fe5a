"""Any OpenAI-compatible address (vLLM, sglang, llama.cpp's server) as a Sampler.

Prompts travel as token ids, one request a sample, so a sample's failure and its seed are its own. Answers are data
from a stranger: every field is checked, nothing in them is evaluated.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxpost.generate.batching import Completion
from jaxpost.generate.http_json import Server, ServerError
from jaxpost.generate.params import SamplingParams
from jaxpost.text.tokenizer import Tokenizer

API_KEY = "JAXPOST_API_KEY"
"""The environment variable of the key. Not OpenAI's own: that key must not go to any address by accident."""

Score = Callable[[np.ndarray, np.ndarray], Any]
"""score(tokens [B T] int32, prompt_lengths [B] int32) -> [B T]: log-probability of each token given those before it."""

_ALWAYS = ("max_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_WHERE_SET = (
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
)


class Answer(NamedTuple):
    """One sample of a server."""

    completion: Completion
    """`logprobs` are the server's, as it defines them (vLLM's are of softmax(logits) unless it is told otherwise);
    empty where it gave none of its tokens."""
    prompt: tuple[int, ...]
    reencoded: bool = False
    """The server gave no token ids: `tokens` are our tokenizer's of its text, which may not be those it sampled."""
    learner_logprobs: tuple[float, ...] | None = None
    """Of `tokens`, by our own model; see `rescore`."""


class RowsFailed(RuntimeError):
    """Some samples failed; `completions` holds all of them, the others complete."""

    def __init__(self, told: str, completions: list[Completion]):
        super().__init__(told)
        self.completions = completions


def to_openai(params: Any) -> dict[str, Any]:
    """The body of a /v1/completions request for a sample with these SamplingParams, in vLLM's names.

    What has a different default somewhere is always said (llama.cpp's temperature is 0.8, vLLM takes the model's).

    Raises: ValueError for a parameter that no server knows.

    Example:
      >>> to_openai(SamplingParams(temperature=0.0, max_tokens=5, stop="."))["stop"]
      ['.']
    """
    if getattr(params, "no_repeat_ngram_size", 0):
        raise ValueError("no_repeat_ngram_size is not among the parameters of OpenAI-compatible servers; leave it out")
    body = {name: getattr(params, name) for name in _ALWAYS}
    for name in _WHERE_SET:
        value = getattr(params, name, None)
        if value not in (None, 0, False, (), []) or (name == "prompt_logprobs" and value == 0):
            body[name] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    if params.logit_bias:
        body["logit_bias"] = {str(token): value for token, value in params.logit_bias.items()}
    body["top_k"] = params.top_k if params.top_k > 0 else -1
    # Some servers give token ids only with log-probabilities.
    body["logprobs"] = max(params.logprobs or 0, 1)
    return body | {"return_token_ids": True, "return_tokens_as_token_ids": True}


class ExternalSampler:
    """Samples from a server, as `generate.sampler.Sampler` does from a model; made by `connect`."""

    def __init__(
        self,
        server: Server,
        model: str,
        tokenizer: Tokenizer,
        *,
        concurrency: int,
        extra: Mapping[str, Any],
        score: Callable[[Any, np.ndarray, np.ndarray], Any] | None,
    ):
        self.server, self.model, self.tokenizer = server, model, tokenizer
        self._concurrency, self._extra, self._score = concurrency, dict(extra), score

    def __call__(
        self,
        params: Any,
        prompts: Sequence[Sequence[int] | str],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        seed: int = 0,
        draw: int = 0,
        example_ids: Sequence[int] | None = None,
        errors: Literal["raise", "return"] = "raise",
        policy_version: int = 0,
    ) -> list[Completion]:
        """Samples n completions of every prompt, in order of prompt and sample.

        `params` only go to `score`: the server has weights of its own, and `policy_version` says which. With `score`
        the completions' log-probabilities are our model's. A sample that fails has finish "error" and says why.

        Raises:
          RowsFailed: with errors="raise", once all others are done; numbers them.
          ValueError: parameters that a server cannot take.
        """
        answers = self.answers(
            prompts, sampling, seed=seed, draw=draw, example_ids=example_ids, policy_version=policy_version
        )
        if (score := self._score) is not None:
            answers = rescore(answers, lambda tokens, lengths: score(params, tokens, lengths))
            answers = [a._replace(completion=a.completion._replace(logprobs=a.learner_logprobs or ())) for a in answers]
        completions = [a.completion for a in answers]
        failed = [(i, c.error) for i, c in enumerate(completions) if c.finish == "error"]
        if failed and errors == "raise":
            numbers = ", ".join(str(i) for i, _ in failed[:10]) + (" ..." if len(failed) > 10 else "")
            raise RowsFailed(
                f"{len(failed)} of {len(completions)} samples failed (numbers {numbers}); the first: {failed[0][1]}",
                completions,
            )
        return completions

    def answers(
        self,
        prompts: Sequence[Sequence[int] | str],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        seed: int = 0,
        draw: int = 0,
        example_ids: Sequence[int] | None = None,
        policy_version: int = 0,
    ) -> list[Answer]:
        """As a call, with all that is known of each sample; failures are returned, never raised.

        A text prompt is encoded with our tokenizer. The seed of a request is a hash of (seed, draw, example, sample).
        """
        wishes = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(prompts)
        ids = list(range(len(prompts))) if example_ids is None else list(example_ids)
        if not len(wishes) == len(ids) == len(prompts):
            raise ValueError(f"{len(prompts)} prompts with {len(wishes)} sampling parameters and {len(ids)} ids")
        bodies = [to_openai(wish) for wish in wishes]
        jobs = []
        for at, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True)):
            tokens = self._encode(prompt)
            for sample in range(wish.n):
                base = seed if wish.seed is None else wish.seed
                own = {"model": self.model, "prompt": list(tokens), "seed": _seed(base, draw, ids[at], sample)}
                body = {k: v for k, v in {**bodies[at], **own, **self._extra}.items() if v is not None}
                empty = Completion((), (), "error", example=ids[at], sample=sample, policy_version=policy_version)
                jobs.append((f"prompt {at}, sample {sample}", tokens, wish, body, empty))
        pool = ThreadPoolExecutor(max(1, min(self._concurrency, len(jobs))), thread_name_prefix="external")
        try:
            return list(pool.map(lambda job: self._sample(*job), jobs))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, prompt: Sequence[int] | str) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, add_bos=self.tokenizer.adds_bos))
        return tuple(int(token) for token in prompt)

    def _sample(
        self, name: str, prompt: tuple[int, ...], wish: SamplingParams, body: dict[str, Any], empty: Completion
    ) -> Answer:
        try:
            if not prompt:
                raise ServerError("the prompt is empty: give at least one token (a chat template adds some)")
            return _read(self.server.ask("POST", "/completions", body), prompt, wish, empty, self.tokenizer)
        except ServerError as error:
            return Answer(empty._replace(error=f"{name}: {error}"), prompt)


def connect(
    url: str,
    model: str,
    *,
    tokenizer: Tokenizer,
    api_key: str | None = None,
    timeout: float = 600.0,
    retries: int = 4,
    backoff: float = 0.5,
    concurrency: int = 64,
    extra: Mapping[str, Any] | None = None,
    score: Callable[[Any, np.ndarray, np.ndarray], Any] | None = None,
) -> ExternalSampler:
    """Connects to an OpenAI-compatible server and makes sure that it serves the model.

    Args:
      url: as http://localhost:8000/v1.
      tokenizer: the model's own; the server must run the same.
      api_key: the environment's JAXPOST_API_KEY if not given.
      timeout, retries, backoff: see `http_json.Server`.
      concurrency: most requests at once.
      extra: more of a request's body, which wins over ours; None leaves a key out, for servers that refuse it.
      score: score(params, tokens [B T], prompt_lengths [B]) -> log-probabilities [B T] by our model; see `rescore`.

    Raises:
      ServerError: the address cannot be reached, or refuses us.
      ValueError: another model is served (those that are, are listed); an address that is none.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; at least one request must be under way")
    key = os.environ.get(API_KEY) if api_key is None else api_key
    server = Server(url, key, timeout, retries, backoff)
    try:
        listed = server.ask("GET", "/models")
    except ServerError as error:
        if error.status != 404:  # some servers have no list
            raise
    else:
        rows = listed.get("data") if isinstance(listed, Mapping) else None
        names = [r.get("id") for r in rows if isinstance(r, Mapping)] if isinstance(rows, list) else []
        if names and model not in names:
            raise ValueError(f"{url} does not serve {model!r}; it serves {', '.join(map(repr, names))}")
    return ExternalSampler(server, model, tokenizer, concurrency=concurrency, extra=extra or {}, score=score)


def rescore(answers: Sequence[Answer], score: Score, *, rows: int = 8, multiple: int = 64) -> list[Answer]:
    """Gives each answer the log-probabilities of its tokens by our own model; failed and empty ones stay as they are.

    Answers are sorted by length into batches of `rows`, right-padded with 0 to a multiple of `multiple` tokens, so
    that few shapes are compiled.

    Args:
      score: score(tokens [B T] int32, prompt_lengths [B] int32) -> [B T] log-probability of token t given those
        before; what it says of padding and of prompts is not read.
    """
    out = list(answers)
    live = [i for i, a in enumerate(answers) if a.completion.finish != "error" and a.completion.tokens]
    live.sort(key=lambda i: len(answers[i].prompt) + len(answers[i].completion.tokens))
    for at in range(0, len(live), rows):
        chunk = live[at : at + rows]
        texts = [(*answers[i].prompt, *answers[i].completion.tokens) for i in chunk]
        tokens = np.zeros((rows, -(-max(map(len, texts)) // multiple) * multiple), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, (i, text) in enumerate(zip(chunk, texts, strict=True)):
            tokens[row, : len(text)] = text
            lengths[row] = len(answers[i].prompt)
        scored = np.asarray(score(tokens, lengths))
        if scored.shape != tokens.shape:
            raise ValueError(f"score gave {scored.shape} for tokens of {tokens.shape}; one number a token is wanted")
        for row, (i, text) in enumerate(zip(chunk, texts, strict=True)):
            own = tuple(float(p) for p in scored[row, lengths[row] : len(text)])
            out[i] = answers[i]._replace(learner_logprobs=own)
    return out


def _seed(*parts: int) -> int:
    """31 bits that depend on all of the numbers; every server's seed holds that many."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1


def _read(reply: Any, prompt: tuple[int, ...], wish: SamplingParams, empty: Completion, tokenizer: Tokenizer) -> Answer:
    """An Answer from the server's JSON. Raises: ServerError for what is not a completion."""
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, Mapping) or not isinstance(choice.get("text"), str):
        raise ServerError("the answer holds no completion (no choices[0].text)")
    reason, stop = choice.get("finish_reason"), choice.get("stop_reason")
    if reason not in ("stop", "length"):
        raise ServerError(f"the server ended the sample with {reason!r}, neither an end nor max_tokens")
    stop = stop if isinstance(stop, int | str) and not isinstance(stop, bool) else None
    ids, logprobs, best = _tokens(choice)
    reencoded = ids is None
    if ids is None:
        ids, logprobs, best = tokenizer.encode(choice["text"]), [], []
        ends = [stop] if isinstance(stop, int) else [] if wish.stop or wish.stop_token_ids else list(tokenizer.eos_ids)
        if reason == "stop" and len(ends) == 1:
            ids = [*ids, ends[0]]  # an end token is not part of the text
    wrong = next((t for t in ids if not 0 <= t < tokenizer.vocab_size), None)
    if wrong is not None:
        raise ServerError(f"token {wrong} is not one of our tokenizer's {tokenizer.vocab_size}: it has another")
    completion = empty._replace(
        tokens=tuple(ids),
        logprobs=tuple(logprobs),
        finish=reason,
        text=choice["text"],
        stop=stop,
        best=tuple(row[: wish.logprobs] for row in best) if wish.logprobs else (),
        prompt_logprobs=_prompt_logprobs(choice.get("prompt_logprobs"), prompt),
    )
    return Answer(completion, prompt, reencoded)


Best = list[tuple[tuple[int, float], ...]]


def _tokens(choice: Mapping[str, Any]) -> tuple[list[int] | None, list[float], Best]:
    """Token ids, their log-probabilities, and the best tokens of each place, in any of the forms that servers use."""
    given, told = choice.get("token_ids"), choice.get("logprobs")
    told = told if isinstance(told, Mapping) else {}
    best: Best = []
    if isinstance(told.get("content"), list):  # llama.cpp, as in chats
        rows = [row if isinstance(row, Mapping) else {} for row in told["content"]]
        ids, logprobs = [row.get("id") for row in rows], [row.get("logprob") for row in rows]
        best = [_pairs((r.get("id"), r.get("logprob")) for r in _dicts(row.get("top_logprobs"))) for row in rows]
    else:  # vLLM: ids as text, "token_id:5"
        ids, logprobs = [_named(t) for t in _list(told.get("tokens"))], _list(told.get("token_logprobs"))
        rows = [row if isinstance(row, Mapping) else {} for row in _list(told.get("top_logprobs"))]
        best = [_pairs((_named(name), p) for name, p in row.items()) for row in rows]
    ids = _whole(given if isinstance(given, list) else ids)
    if ids is None or (not ids and not isinstance(given, list)):
        return None, [], []
    numbers = [float(p) for p in logprobs if p is not None and _number(p)]
    if len(logprobs) not in (0, len(ids)) or len(numbers) < len(logprobs):
        raise ServerError(f"the answer has {len(logprobs)} log-probabilities, not all numbers, for {len(ids)} tokens")
    return ids, numbers, best if len(best) == len(ids) else []


def _whole(values: list[Any]) -> list[int] | None:
    """The values, if all are token ids."""
    return values if all(isinstance(t, int) and not isinstance(t, bool) for t in values) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in _list(value) if isinstance(row, Mapping)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _named(name: Any) -> int | None:
    head, _, number = name.partition(":") if isinstance(name, str) else ("", "", "")
    return int(number) if head == "token_id" and number.isascii() and number.isdigit() and len(number) < 10 else None


def _pairs(pairs: Iterable[tuple[Any, Any]]) -> tuple[tuple[int, float], ...]:
    good = [(t, float(p)) for t, p in pairs if isinstance(t, int) and _number(p)]
    return tuple(sorted(good, key=lambda pair: -pair[1]))


def _prompt_logprobs(told: Any, prompt: tuple[int, ...]) -> tuple[float, ...]:
    """vLLM's: at each place, token id -> {"logprob": ...}; the prompt's own token is always among them."""
    rows = _list(told)[1:]
    found = [row.get(str(t)) if isinstance(row, Mapping) else None for row, t in zip(rows, prompt[1:], strict=False)]
    values: list[Any] = [entry.get("logprob") if isinstance(entry, Mapping) else None for entry in found]
    return tuple(float(p) for p in values) if len(rows) == len(prompt) - 1 and all(map(_number, values)) else ()
