"""Any OpenAI-compatible address (vLLM, sglang, llama.cpp's server) as a Sampler.

Prompts travel as token ids, one request a sample, so a sample's failure and its seed are its own. Without a tokenizer
of the model's they travel as text, or as messages that the server puts in its own chat format.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np

from jaxpost.generate.external_shape import check, fault, in_words_of
from jaxpost.generate.grammar import Constraint
from jaxpost.generate.http_json import Server, ServerError
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.reply import Answer, read
from jaxpost.generate.samples import Completion
from jaxpost.text.tokenizer import Tokenizer

API_KEY = "JAXPOST_API_KEY"
"""The environment variable of the key. Not OpenAI's own: that key must not go to any address by accident."""

Prompt = Sequence[int] | str | Sequence[Mapping[str, Any]]
"""Token ids, a text, or the messages of a conversation (only without a tokenizer: the server has the chat format)."""

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


def to_plain_openai(params: SamplingParams) -> dict[str, Any]:
    """The body of a request to any server, OpenAI's own too: vLLM's names only where the parameters ask for something.

    Raises: ValueError for log-probabilities, which mean nothing without a tokenizer, and as `to_openai`.

    Example:
      >>> to_plain_openai(SamplingParams(max_tokens=5, top_k=3))
      {'max_tokens': 5, 'temperature': 1.0, 'top_p': 1.0, 'top_k': 3}
    """
    if params.logprobs is not None or params.prompt_logprobs is not None:
        raise ValueError("log-probabilities of a server's answers need the model's own tokenizer: give a local model")
    usual = to_openai(SamplingParams())
    said = ("max_tokens", "temperature", "top_p")
    return {k: v for k, v in to_openai(params).items() if k in said or usual.get(k) != v}


class ExternalSampler:
    """Samples from a server, as `generate.sampler.Sampler` does from a model; made by `connect`."""

    def __init__(
        self,
        server: Server,
        model: str,
        tokenizer: Tokenizer | None,
        *,
        concurrency: int,
        extra: Mapping[str, Any],
        score: Callable[[Any, np.ndarray, np.ndarray], Any] | None,
        owner: str | None = None,
    ):
        self.server, self.model, self.tokenizer, self.owner = server, model, tokenizer, owner
        self._concurrency, self._extra, self._score = concurrency, dict(extra), score

    def __call__(
        self,
        params: Any,
        prompts: Sequence[Prompt],
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
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """As a call, with all that is known of each sample; `options` as `stream`; failures are returned."""
        found = dict(self.stream(prompts, sampling, **options))
        return [found[number] for number in range(len(found))]

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        seed: int = 0,
        draw: int = 0,
        example_ids: Sequence[int] | None = None,
        policy_version: int = 0,
        skip: Collection[tuple[int, int]] = (),
        shape: Constraint | Sequence[Constraint | None] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Yields (number, answer) as the server ends them; failures are yielded, never raised.

        A text prompt is encoded with our tokenizer. The seed of a request is a hash of (seed, draw, example, sample).

        Args:
          skip: (example, sample) of those that are not wanted; numbers count the others.
          shape: what every answer, or each prompt's, must keep to, in the words that the server is known to know; a
            whole answer that does not is a failure.

        Raises:
          ValueError: parameters, or a shape, that the server cannot take.
        """
        wishes = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(prompts)
        ids = list(range(len(prompts))) if example_ids is None else list(example_ids)
        if not len(wishes) == len(ids) == len(prompts):
            raise ValueError(f"{len(prompts)} prompts with {len(wishes)} sampling parameters and {len(ids)} ids")
        shapes = list(shape) if isinstance(shape, Sequence) else [shape] * len(prompts)
        for each in dict.fromkeys(each for each in shapes if each is not None):
            check(each)
        requests = [self._request(*asked) for asked in zip(prompts, wishes, shapes, strict=True)]
        jobs = []
        for at, (request, wish) in enumerate(zip(requests, wishes, strict=True)):
            for sample in (k for k in range(wish.n) if (ids[at], k) not in skip):
                own = {"seed": _seed(seed if wish.seed is None else wish.seed, draw, ids[at], sample)}
                body = {k: v for k, v in {**request, **own, **self._extra}.items() if v is not None}
                empty = Completion((), (), "error", example=ids[at], sample=sample, policy_version=policy_version)
                jobs.append((f"prompt {ids[at]}, sample {sample}", wish, shapes[at], body, empty))
        yield from _together(self._sample, jobs, self._concurrency)

    def problem(self, wish: SamplingParams, shape: Constraint | None = None) -> str | None:
        """Why the server cannot take these parameters, or None."""
        try:
            if shape is not None:
                check(shape)
            self._request("x", wish, shape)
        except ValueError as error:
            return str(error)
        return None

    def _request(self, prompt: Prompt, wish: SamplingParams, shape: Constraint | None) -> dict[str, Any]:
        """The body that all samples of a prompt share."""
        chat = self.tokenizer is None and not isinstance(prompt, str)
        held = {} if shape is None else in_words_of(self.owner, shape, chat=chat)
        if self.tokenizer is not None:
            tokens: Any = prompt
            if isinstance(prompt, str):
                tokens = self.tokenizer.encode(prompt, add_bos=self.tokenizer.adds_bos)
            return to_openai(wish) | held | {"model": self.model, "prompt": [int(token) for token in tokens]}
        given = {"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
        return to_plain_openai(wish) | held | {"model": self.model} | given

    def _sample(
        self, name: str, wish: SamplingParams, shape: Constraint | None, body: dict[str, Any], empty: Completion
    ) -> Answer:
        given = body.get("prompt")
        prompt = tuple(given) if isinstance(given, list) else ()
        try:
            if not (given or body.get("messages")):
                raise ServerError("the prompt is empty: give at least one token (a chat template adds some)")
            path = "/chat/completions" if "messages" in body else "/completions"
            answer = read(self.server.ask("POST", path, body), prompt, wish, empty, self.tokenizer)
            done = answer.completion
            # What a stop string or max_tokens has cut off says nothing of the whole.
            whole = shape is not None and done.finish == "stop" and not isinstance(done.stop, str) and not wish.stop
            if shape is not None and whole and (wrong := fault(shape, done.text)) is not None:
                raise ServerError(f"{wrong}: {done.text[:200]!r}")
            return answer
        except ServerError as error:
            return Answer(empty._replace(error=f"{name}: {error}"), prompt)


def _together(work: Callable[..., Answer], jobs: Sequence[Any], count: int) -> Iterator[tuple[int, Answer]]:
    """(number, work(*job)) as they end, `count` at once; left early, none begins any more."""
    waiting, done = deque(enumerate(jobs)), SimpleQueue[tuple[int, Future[Answer]]]()

    def run() -> None:
        while True:
            try:
                number, job = waiting.popleft()
            except IndexError:
                return
            answer = Future[Answer]()
            try:
                answer.set_result(work(*job))
            except BaseException as error:
                answer.set_exception(error)
            done.put((number, answer))

    try:
        for _ in range(min(count, len(jobs))):
            # A pool's threads would keep a process that is interrupted until the server has answered.
            threading.Thread(target=run, name="external", daemon=True).start()
        for _ in jobs:
            number, answer = done.get()
            yield number, answer.result()
    finally:
        waiting.clear()


def connect(
    url: str,
    model: str | None = None,
    *,
    tokenizer: Tokenizer | None,
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
      model: as the server calls it; None: the only one that it serves.
      tokenizer: the model's own; the server must run the same. None: text and messages go to the server as they are.
      api_key: the environment's JAXPOST_API_KEY if not given.
      timeout, retries, backoff: see `http_json.Server`.
      concurrency: most requests at once.
      extra: more of a request's body, which wins over ours; None leaves a key out, for servers that refuse it.
      score: score(params, tokens [B T], prompt_lengths [B]) -> log-probabilities [B T] by our model; see `rescore`.

    Raises:
      ServerError: the address cannot be reached, or refuses us.
      ValueError: another model is served, or none is named and there are several (those that are, are listed); an
        address that is none.
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
        listed = {}
    rows = listed.get("data") if isinstance(listed, Mapping) else None
    names = [r.get("id") for r in rows if isinstance(r, Mapping)] if isinstance(rows, list) else []
    told = ", ".join(map(repr, names)) or "models that it does not list"
    if names and model is not None and model not in names:
        raise ValueError(f"{url} does not serve {model!r}; it serves {told}")
    if model is None:
        if len(names) != 1:
            raise ValueError(f"{url} serves {told}: name one")
        model = str(names[0])
    owners = {r.get("owned_by") for r in rows if isinstance(r, Mapping)} if isinstance(rows, list) else set()
    owner = str(owners.pop()) if len(owners) == 1 else None
    return ExternalSampler(
        server, model, tokenizer, concurrency=concurrency, extra=extra or {}, score=score, owner=owner
    )


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
