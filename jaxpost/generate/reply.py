"""What an OpenAI-compatible server answers, read: data from a stranger, of which every field is checked."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxpost.generate.http_json import ServerError
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.samples import Completion
from jaxpost.text.messages import DataError
from jaxpost.text.tokenizer import Tokenizer


class Answer(NamedTuple):
    """One sample of a server."""

    completion: Completion
    """`logprobs` are the server's, as it defines them (vLLM's are of softmax(logits) unless it is told otherwise);
    empty where it gave none of its tokens."""
    prompt: tuple[int, ...]
    """Empty where the server was given text."""
    reencoded: bool = False
    """The server gave no token ids: `tokens` are our tokenizer's of its text, which may not be those it sampled."""
    learner_logprobs: tuple[float, ...] | None = None
    """Of `tokens`, by our own model; see `external.rescore`."""
    count: int | None = None
    """Tokens of the sample, as the server counts them; only where no tokenizer tells which they are."""
    untold: tuple[str, ...] = ()
    """What was asked for and the server did not tell: "logprobs", "prompt_logprobs"."""


def read(
    reply: Any, prompt: tuple[int, ...], wish: SamplingParams, empty: Completion, tokenizer: Tokenizer | None
) -> Answer:
    """An Answer from the server's JSON, of /completions or of /chat/completions.

    Args:
      empty: the completion without what was sampled.
      tokenizer: the model's; without it the tokens stay unknown.

    Raises:
      ServerError: what is not a completion.
    """
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    choice = choice if isinstance(choice, Mapping) else {}
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else choice.get("text")
    if not isinstance(text, str):
        raise ServerError("the answer holds no completion (no choices[0].text or .message.content)")
    reason, stop = choice.get("finish_reason"), choice.get("stop_reason")
    if reason not in ("stop", "length"):
        raise ServerError(f"the server ended the sample with {reason!r}, neither an end nor max_tokens")
    stop = stop if isinstance(stop, int | str) and not isinstance(stop, bool) else None
    empty = empty._replace(finish=reason, text=text, stop=stop)
    if tokenizer is None:
        usage = reply.get("usage")
        count = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
        counted = isinstance(count, int) and not isinstance(count, bool) and count >= 0
        return Answer(empty, prompt, count=count if counted else None)
    ids, logprobs, best = _tokens(choice)
    reencoded = ids is None
    if ids is None:
        try:
            ids, logprobs, best = tokenizer.encode(text), [], []
        except DataError as error:
            raise ServerError(f"{error}: {text[:200]!r}") from None
        ends = [stop] if isinstance(stop, int) else [] if wish.stop or wish.stop_token_ids else list(tokenizer.eos_ids)
        if reason == "stop" and len(ends) == 1:
            ids = [*ids, ends[0]]  # an end token is not part of the text
    wrong = next((t for t in ids if not 0 <= t < tokenizer.vocab_size), None)
    if wrong is not None:
        raise ServerError(f"token {wrong} is not one of our tokenizer's {tokenizer.vocab_size}: it has another")
    told = choice.get("prompt_logprobs")
    known = _prompt_logprobs(told, prompt)
    completion = empty._replace(
        tokens=tuple(ids),
        logprobs=tuple(logprobs),
        best=tuple(row[: wish.logprobs] for row in best) if wish.logprobs is not None else (),
        prompt_logprobs=known,
        prompt_best=_prompt_best(told, wish.prompt_logprobs) if known else (),
    )
    return Answer(completion, prompt, reencoded, untold=_untold(completion, wish, len(prompt)))


def _untold(completion: Completion, wish: SamplingParams, prompt: int) -> tuple[str, ...]:
    """The first token of a prompt, and an answer without tokens, have no log-probabilities that could be lacking."""
    lacks = {
        "logprobs": bool(completion.tokens) and not (completion.logprobs and (completion.best or not wish.logprobs)),
        "prompt_logprobs": prompt > 1 and not completion.prompt_logprobs,
    }
    return tuple(name for name, lacking in lacks.items() if lacking and getattr(wish, name) is not None)


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
    # Compared, not converted: JSON may hold whole numbers that no float can.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


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


def _prompt_best(told: Any, wanted: int | None) -> tuple[tuple[tuple[int, float], ...], ...]:
    """The `wanted` most probable tokens at each place; the prompt's own, which vLLM adds, counts as any other."""
    if not wanted:
        return ()
    found = []
    for place in _list(told)[1:]:
        told_of = place.items() if isinstance(place, Mapping) else ()
        pairs = ((_named(f"token_id:{t}"), entry.get("logprob")) for t, entry in told_of if isinstance(entry, Mapping))
        found.append(_pairs(pairs)[:wanted])
    return tuple(found)
