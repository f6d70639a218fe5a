"""What a request may ask of the sampler (`rows.py` packs it into arrays)."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

LogprobsMode = Literal["raw", "temperature", "processed"]
LOGPROBS_MODES: tuple[LogprobsMode, ...] = ("raw", "temperature", "processed")

# OpenAI's and Hugging Face's names for one of our fields; names of which the meaning differs are in `_translate`.
_ALIASES = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
}
_OTHER_NAMES = ("do_sample", "top_logprobs")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's wishes: vLLM's names and meanings.

    The order is vLLM's: allowed tokens, bad words and repeated n-grams are banned; end tokens are banned before
    `min_tokens`; the bias is added; the repetition, frequency and presence penalties follow; then temperature, min_p,
    top_k, top_p. Greedy requests (temperature 0) skip the last four.

    Raises:
      ValueError: a value out of range, or two that contradict each other; names the keys and the values.

    Example:
      >>> SamplingParams(temperature=0.0, stop="END").stop
      ('END',)
    """

    n: int = 1
    """Samples of the prompt."""
    max_tokens: int = 256
    """Most new tokens of a sample."""
    min_tokens: int = 0
    """No end token before this many new ones, and a stop string that is whole among them counts for nothing."""
    temperature: float | int = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Only the k most probable tokens; 0 or -1 is off."""
    top_p: float | int = 1.0
    """Only the smallest set of most probable tokens that holds this much probability; 1 is off."""
    min_p: float | int = 0.0
    """Only tokens at least this fraction as probable as the best; 0 is off."""
    repetition_penalty: float | int = 1.0
    """Divides positive and multiplies negative logits of tokens of the prompt and the answer; 1 is off."""
    presence_penalty: float | int = 0.0
    """Subtracted from the logits of tokens of the answer."""
    frequency_penalty: float | int = 0.0
    """Subtracted once for each time that the token is in the answer."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens twice, prompt included; 0 is off. (Hugging Face's; vLLM has no such name.)"""
    stop: Sequence[str] = ()
    """Strings that end the answer."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the answer, beside the model's own end tokens."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or an end token that is no special token, at the end of the text."""
    ignore_eos: bool = False
    """The model's own end tokens do not end the answer."""
    seed: int | None = None
    """Below 2^32; None: the sampler's."""
    logit_bias: Mapping[int, float | int] = field(default_factory=dict)
    """Token id -> what is added to its logit."""
    allowed_token_ids: Sequence[int] | None = None
    """Only these; None: all."""
    bad_words: Sequence[str] = ()
    """Words that the answer may not hold."""
    logprobs: int | None = None
    """Log-probabilities of this many best tokens beside the sampled one's; None: none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, under softmax(logits)."""
    logprobs_mode: LogprobsMode = "temperature"
    """Of softmax(logits): "raw"; of softmax(logits / T), the policy of RL: "temperature"; of what was drawn from, after
    every processor: "processed". For a greedy request T counts as 1."""

    def __post_init__(self) -> None:
        for part in fields(self):
            object.__setattr__(self, part.name, _checked(part.name, getattr(self, part.name)))
        self._check_together()

    def _check_together(self) -> None:
        if self.top_p == 0:
            raise ValueError("top_p is 0; it must be above 0 and at most 1 (1 is off; top_k=1 keeps the best token)")
        if self.repetition_penalty < 1 / _LARGEST:
            told = f"repetition_penalty is {self.repetition_penalty:g}; it must be above 0 (1 is off)"
            raise ValueError(told if self.repetition_penalty == 0 else f"{told}, and no less than {1 / _LARGEST:g}")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}: lower it")
        if self.allowed_token_ids == ():
            raise ValueError("allowed_token_ids is empty, so nothing can be sampled; leave it out to allow all tokens")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> SamplingParams:
        """Reads a request under vLLM's, OpenAI's or Hugging Face's names; a value of None is left at its default.

        `do_sample: false` is temperature 0; `logprobs: true` with `top_logprobs: k` is k.

        Raises:
          ValueError: an unknown name (the nearest known one is told), two names of one thing with different values,
            or what the constructor does not accept.

        Example:
          >>> SamplingParams.from_mapping({"max_new_tokens": 5, "do_sample": False}).temperature
          0.0
        """
        return cls(**said(mapping))

    def updated(self, mapping: Mapping[str, Any]) -> SamplingParams:
        """These wishes with a mapping's in their place, under the names that `from_mapping` knows.

        Raises:
          ValueError: as `from_mapping`; `do_sample: true` where the temperature stays 0.

        Example:
          >>> SamplingParams(n=2, max_tokens=9).updated({"max_new_tokens": 5}).max_tokens
          5
        """
        found = replace(self, **said(mapping))
        if mapping.get("do_sample") is True and found.temperature == 0:
            raise ValueError("do_sample=True, but temperature=0 is greedy: say a temperature too")
        return found


_MOST = 2**31 - 1
"""Of what rows hold as int32."""
_LARGEST = 1e30
"""Logits are float32: they must stay finite when they are multiplied, divided or added to."""

_INTEGERS: dict[str, tuple[int, int | None]] = {
    "n": (1, None),
    "max_tokens": (1, _MOST),
    "min_tokens": (0, _MOST),
    "top_k": (-1, None),
    "no_repeat_ngram_size": (0, _MOST),
    "seed": (0, 2**32 - 1),
    "logprobs": (0, None),
    "prompt_logprobs": (0, None),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, _LARGEST),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, _LARGEST),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


def said(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """What a request says under any of the known names, in `SamplingParams`' own; nothing of what it leaves out.

    Raises:
      ValueError: as `SamplingParams.from_mapping`, but for values that contradict each other only together.

    Example:
      >>> said({"max_new_tokens": 5, "min_tokens": 9})
      {'max_tokens': 5, 'min_tokens': 9}
    """
    known = {f.name for f in fields(SamplingParams)}
    names = {**{name: name for name in known}, **_ALIASES, **{name: name for name in _OTHER_NAMES}}
    given: dict[str, Any] = {}
    under: dict[str, str] = {}
    for name, value in mapping.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown sampling parameter {name!r} (value {value!r}); the nearest name is {near!r}")
        if value is None:
            continue
        target = names[name]
        if target in given and given[target] != value:
            raise ValueError(f"{under[target]}={given[target]!r} and {name}={value!r} say the same thing: keep one")
        given[target], under[target] = value, name
    return {name: _checked(name, value) for name, value in _translate(given).items()}


def own_name(name: str) -> str:
    """The field of `SamplingParams` that a known name is said of; any other name as it is.

    Example:
      >>> own_name("max_new_tokens"), own_name("do_sample"), own_name("stop")
      ('max_tokens', 'temperature', 'stop')
    """
    return {**_ALIASES, "do_sample": "temperature", "top_logprobs": "logprobs"}.get(name, name)


def _translate(given: dict[str, Any]) -> dict[str, Any]:
    """Names that are not one of our fields under another name."""
    given = dict(given)
    if given.get("seed") == -1:  # vLLM's older way of saying None
        given["seed"] = None
    sampled = given.pop("do_sample", None)
    if sampled is False:
        if given.get("temperature", 0) != 0 and "temperature" in given:
            raise ValueError(f"do_sample=False is greedy, but temperature={given['temperature']}: keep one of them")
        given["temperature"] = 0.0
    elif sampled is True and given.get("temperature") == 0:
        raise ValueError("do_sample=True, but temperature=0 is greedy: keep one of them")
    elif sampled not in (None, True):
        raise ValueError(f"do_sample is {sampled!r}; write true or false")
    best = given.pop("top_logprobs", None)
    wanted = given.get("logprobs", best)
    if wanted is False and not best:
        given["logprobs"] = None
    elif isinstance(wanted, bool) and wanted:
        given["logprobs"] = best or 0
    elif best is not None:
        if wanted != best:
            raise ValueError(f"logprobs={wanted} and top_logprobs={best} contradict each other: keep one")
        given["logprobs"] = best
    return given


def _checked(name: str, value: Any) -> Any:
    """A field's value in its own type, within its range."""
    if value is None and name in ("seed", "logprobs", "prompt_logprobs", "allowed_token_ids"):
        return None
    if name in _INTEGERS:
        return _integer(name, value, *_INTEGERS[name])
    if name in _NUMBERS:
        return _number(name, value, *_NUMBERS[name])
    if name in ("stop", "bad_words"):
        return _strings(name, value)
    if name in ("stop_token_ids", "allowed_token_ids"):
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise ValueError(f"{name} is {value!r}; write a list of token ids")
        return tuple(_integer(f"a token id in {name}", i, 0) for i in value)
    if name == "logit_bias":
        return _bias(value)
    if name == "logprobs_mode":
        if value not in LOGPROBS_MODES:
            raise ValueError(f"logprobs_mode is {value!r}; write one of {', '.join(LOGPROBS_MODES)}")
    elif not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; write true or false")
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}; write a text or a list of texts")
    texts = (value,) if isinstance(value, str) else tuple(value)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} holds {text!r}; each must be a text of at least one character")
    return texts


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        top = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {low}{top}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float) -> float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= value <= high:  # so NaN is refused too
        raise ValueError(f"{name} is {value!r}; it must be a number of at least {low:g} and at most {high:g}")
    return float(value)


def _bias(bias: Any) -> dict[int, float]:
    """JSON writes the ids as strings."""
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias is {bias!r}; write token ids with what is added to their logits")
    out = {}
    for token, value in bias.items():
        number = int(token) if isinstance(token, str) and token.isdecimal() else token
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not real or not -_LARGEST <= value <= _LARGEST:
            raise ValueError(f"logit_bias of token {token} is {value!r}; it must be a number within {_LARGEST:g} of 0")
        out[_integer("a token id in logit_bias", number, 0)] = float(value)
    return out
