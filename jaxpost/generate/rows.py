"""Sampling parameters as arrays: one row a sequence, all of them traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt32

from jaxpost.generate.params import LOGPROBS_MODES, SamplingParams

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy (vLLM's bound)."""

Encode = Callable[[str], Sequence[int]]


class RowParams(NamedTuple):
    """SamplingParams as arrays: row b is one sequence's. Widths are powers of two, so few programs are compiled.

    NumPy from `pack`, arrays of jax where traced; every field leads with B, so rows are taken with one `tree.map`.
    """

    temperature: Float32[Any, " B"]
    """0 is greedy."""
    top_k: Int32[Any, " B"]
    """0 is off."""
    top_p: Float32[Any, " B"]
    """Above 0, so that the best token is kept, also where float32 rounds what was asked for to 0."""
    min_p: Float32[Any, " B"]
    repetition: Float32[Any, " B"]
    presence: Float32[Any, " B"]
    frequency: Float32[Any, " B"]
    ngram: Int32[Any, " B"]
    min_tokens: Int32[Any, " B"]
    seed: UInt32[Any, " B"]
    bias_ids: Int32[Any, "B Nb"]
    """Padded with -1."""
    bias: Float32[Any, "B Nb"]
    bad_words: Int32[Any, "B W Lw"]
    """Tokens of each banned word, right-padded with -1."""
    allowed: UInt32[Any, "B Vw"]
    """Bit i of word w: token 32 w + i may be sampled; bits past the vocabulary are 1."""
    end_ids: Int32[Any, "B E"]
    """Tokens that end the row, padded with -1."""
    logprobs_mode: Int32[Any, " B"]
    """Place in LOGPROBS_MODES."""


class Widths(NamedTuple):
    """Least padded widths of `pack`, for a batch whose rows change while its program should not."""

    bias: int = 1
    words: int = 1
    word: int = 1
    ends: int = 1

    @staticmethod
    def of(rows: RowParams) -> Widths:
        """Those of packed rows."""
        return Widths(rows.bias.shape[1], *rows.bad_words.shape[1:], rows.end_ids.shape[1])


def pack(
    params: Sequence[SamplingParams],
    *,
    vocab_size: int,
    eos_ids: Sequence[int],
    encode: Encode | None = None,
    seed: int = 0,
    at_least: Widths | None = None,
) -> RowParams:
    """One row for each of `params` (repeat one for its n samples), on the host.

    A bad word is banned as it is and after a space, where that gives other tokens (as in vLLM).

    Args:
      eos_ids: the model's own end tokens; rows with `ignore_eos` go without them.
      encode: text -> token ids without special tokens; needed only for bad words.
      seed: for rows without one of their own; below 2^32.
      at_least: widths that the result has at least.

    Raises:
      ValueError: a token id outside the vocabulary, a row in which no token is left, a bad word without tokens, a seed
        out of range.

    Example:
      >>> rows = pack([SamplingParams(top_k=5)] * 2, vocab_size=40, eos_ids=[3])
      >>> rows.top_k.tolist(), rows.allowed.shape
      ([5, 5], (2, 2))
    """
    _check_seed(seed)
    made: dict[int, _Row] = {}
    for one in params:
        if id(one) not in made:
            made[id(one)] = _Row.of(one, vocab_size, eos_ids, encode)
    rows = [made[id(one)] for one in params]
    least = at_least or Widths()
    bias = _bucket([len(row.params.logit_bias) for row in rows], least.bias)
    words = _bucket([len(row.words) for row in rows], least.words)
    word = _bucket([len(w) for row in rows for w in row.words], least.word)
    ends = _bucket([len(row.ends) for row in rows], least.ends)
    scalar = lambda name, dtype: np.asarray([getattr(row.params, name) for row in rows], dtype)  # noqa: E731
    temperature = scalar("temperature", np.float32)
    return RowParams(
        temperature=np.where(temperature < GREEDY_BELOW, np.float32(0), temperature),
        top_k=np.minimum([max(row.params.top_k, 0) for row in rows], vocab_size).astype(np.int32),
        top_p=np.maximum(scalar("top_p", np.float32), np.finfo(np.float32).tiny),
        min_p=scalar("min_p", np.float32),
        repetition=scalar("repetition_penalty", np.float32),
        presence=scalar("presence_penalty", np.float32),
        frequency=scalar("frequency_penalty", np.float32),
        ngram=scalar("no_repeat_ngram_size", np.int32),
        min_tokens=scalar("min_tokens", np.int32),
        seed=np.asarray([seed if row.params.seed is None else row.params.seed for row in rows], np.uint32),
        bias_ids=_padded([list(row.params.logit_bias) for row in rows], bias, -1, np.int32),
        bias=_padded([list(row.params.logit_bias.values()) for row in rows], bias, 0, np.float32),
        bad_words=np.stack(
            [_padded([*row.words, *[()] * (words - len(row.words))], word, -1, np.int32) for row in rows]
        ),
        allowed=np.stack([row.allowed for row in rows]),
        end_ids=_padded([row.ends for row in rows], ends, -1, np.int32),
        logprobs_mode=np.asarray([LOGPROBS_MODES.index(row.params.logprobs_mode) for row in rows], np.int32),
    )


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it must be a whole number of at least 0 and at most {2**32 - 1}")


def candidates(beams: int, end_ids: Int32[np.ndarray, " E"]) -> int:
    """Best next tokens that a beam search looks at: after as many ends as there can be, enough are left to go on with.

    Example:
      >>> candidates(4, np.array([2, 7, -1, -1], np.int32))
      12
    """
    return max(2, 1 + int(np.sum(end_ids >= 0))) * beams


class _Row(NamedTuple):
    """What needs the vocabulary or the tokenizer."""

    params: SamplingParams
    ends: tuple[int, ...]
    words: tuple[tuple[int, ...], ...]
    allowed: np.ndarray

    @staticmethod
    def of(params: SamplingParams, vocab_size: int, eos_ids: Sequence[int], encode: Encode | None) -> _Row:
        own = () if params.ignore_eos else tuple(int(i) for i in eos_ids)
        ends = tuple(dict.fromkeys((*own, *params.stop_token_ids)))
        words = _bad_words(params.bad_words, encode)
        groups = {
            "stop_token_ids": params.stop_token_ids,
            "eos_ids": own,
            "logit_bias": tuple(params.logit_bias),
            "allowed_token_ids": params.allowed_token_ids or (),
            "bad_words": tuple(i for word in words for i in word),
        }
        for name, ids in groups.items():
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise ValueError(f"{name} has token id {token}; the vocabulary has ids 0 to {vocab_size - 1}")
        may = np.ones(vocab_size, bool)
        if params.allowed_token_ids is not None:
            may[:] = False
            may[list(params.allowed_token_ids)] = True
        _check_some_left(params, may, words, ends)
        return _Row(params, ends, words, pack_bits(may))


def _check_some_left(
    params: SamplingParams, may: np.ndarray, words: Sequence[Sequence[int]], ends: Sequence[int]
) -> None:
    left = may.copy()
    left[[word[0] for word in words if len(word) == 1]] = False
    if not left.any():
        raise ValueError(
            f"bad_words={list(params.bad_words)} bans every token of allowed_token_ids: nothing can be sampled"
        )
    left[list(ends)] = False
    if params.min_tokens > 0 and not left.any():
        raise ValueError(
            f"min_tokens={params.min_tokens} bans the end tokens, and allowed_token_ids has no others: "
            "nothing can be sampled"
        )


def _bad_words(words: Sequence[str], encode: Encode | None) -> tuple[tuple[int, ...], ...]:
    if words and encode is None:
        raise ValueError(f"bad_words={list(words)} needs a tokenizer, and this sampler has none")
    out: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip()):
            tokens = tuple(int(i) for i in encode(text)) if encode else ()
            if not tokens:
                raise ValueError(f"bad_words holds {word!r}, which has no tokens")
            out[tokens] = None
    return tuple(out)


def pack_bits(may: np.ndarray) -> np.ndarray:
    """bool [..., V] -> uint32 [..., ceil(V/32)]: bit i of word w is entry 32 w + i; bits past the end are 1.

    Example:
      >>> pack_bits(np.array([True, False, True])).tolist() == [0xFFFFFFFD]
      True
    """
    short = -may.shape[-1] % 32
    full = np.concatenate([may, np.ones((*may.shape[:-1], short), bool)], axis=-1)
    return np.packbits(full, axis=-1, bitorder="little").view("<u4").astype(np.uint32)


def _bucket(sizes: Sequence[int], least: int) -> int:
    most = max([1, least, *sizes])
    return 1 << (most - 1).bit_length()


def _padded(rows: Sequence[Sequence[Any]], width: int, fill: int, dtype: Any) -> np.ndarray:
    out = np.full((len(rows), width), fill, dtype)
    for at, row in enumerate(rows):
        out[at, : len(row)] = row
    return out
