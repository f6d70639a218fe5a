"""Constrained output: regular expressions, choices and JSON schemas as masks of the tokens that may come next.

A grammar is compiled once for a tokenizer by llguidance (derivatives of regular expressions and an Earley parser over
the bytes of tokens). Each row then holds a matcher on the host; its face is `generate.matcher.Matcher`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpost.generate.matcher import Bits, all_but, has, only, tokens_of, words
from jaxpost.generate.schema import finite, too_low
from jaxpost.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

# Between two parts of a JSON text. Unbounded, a model can write spaces until its tokens are used up.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{0,20}"
_MOST_FORCED = 256


@dataclass(frozen=True)
class Constraint:
    """What a completion must be; exactly one of the three. The end token comes after it, and nothing else.

    Attributes:
      regex: the whole text matches it. Python's syntax without look-around, back-references, `{,n}`; ^ and $ only
        at the ends; \\d is [0-9], other classes of characters are Unicode's.
      choice: the text is one of these.
      json: a JSON schema, as a mapping or as its text (kept as text): the text is JSON that satisfies it, its keys in
        the schema's order, at most 20 characters of white space between parts.

    Raises: ValueError where not exactly one is given, or it cannot be one.

    Example:
      >>> Constraint(choice=["yes", "no"]).kind
      'choice'
    """

    regex: str | None = None
    choice: Sequence[str] | None = None
    json: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("regex", "choice", "json") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a constraint is exactly one of regex, choice and json; given: {', '.join(given) or 'none of them'}"
            )
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.regex is not None and not _encodable(self.regex):
            raise ValueError(f"the regex {self.regex!r} holds a lone surrogate, which no text in UTF-8 can match")

    @property
    def kind(self) -> str:
        """Which of the three was given."""
        return next(name for name in ("regex", "choice", "json") if getattr(self, name) is not None)

    def __str__(self) -> str:
        value = repr(getattr(self, self.kind))
        name = "JSON schema" if self.kind == "json" else self.kind
        return f"the {name} {value if len(value) <= 200 else value[:200] + ' ...'}"


def _encodable(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _choices(choice: Sequence[str]) -> tuple[str, ...]:
    if isinstance(choice, str) or not choice:
        raise ValueError(f"choice must be a list of at least one text, not {choice!r}")
    for number, text in enumerate(choice):
        if not isinstance(text, str) or not text or not _encodable(text):
            raise ValueError(f"choice {number} must be a text that is not empty, without lone surrogates; got {text!r}")
    return tuple(dict.fromkeys(choice))


def _schema_text(schema: Mapping[str, Any] | str) -> str:
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        parsed = json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON schema is nested too deeply") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"the JSON schema is not JSON ({error}): {str(schema)[:200]!r}") from error
    if not isinstance(parsed, Mapping):
        raise ValueError(f"a JSON schema is an object, as {{'type': 'object'}}; got {text[:200]!r}")
    return text


class Automaton:
    """A constraint compiled for a tokenizer; `start()` makes the matcher of a row. Made by `compile`."""

    def __init__(self, constraint: Constraint, tokenizer: LLTokenizer, vocab_size: int, end_ids: tuple[int, ...]):
        self.constraint, self.vocab_size = constraint, vocab_size
        self.ends = only(vocab_size, end_ids)
        self.end_ids = frozenset(end_ids)
        self.full_words = words(tokenizer.vocab_size)
        # A tokenizer may have more tokens than the model has rows.
        self.inside = all_but(vocab_size) if tokenizer.vocab_size > vocab_size else None
        self._first = _grammar(constraint, tokenizer)
        first = self.start()
        first.mask()
        if first.problem is not None:
            raise ValueError(f"{constraint} is unsatisfiable: no text that the tokenizer can write matches it")

    def start(self) -> GrammarMatcher:
        """A matcher of a row that has no token yet."""
        return GrammarMatcher(self, self._first.deep_copy())


class GrammarMatcher:
    """Where one row stands in its grammar; see `Matcher`.

    End tokens are allowed exactly where the grammar may stop, other special tokens nowhere. Text that is determined
    is written with the tokenizer's own tokens of it, so a mask may leave out tokens that would spell the same.
    """

    def __init__(self, automaton: Automaton, parser: LLMatcher):
        self.vocab_size = automaton.vocab_size
        self._automaton, self._parser = automaton, parser
        self._mask: Bits | None = None
        self._problem: str | None = None
        self._ended = False

    @property
    def finished(self) -> bool:
        """Nothing but an end token may follow, or one came."""
        return not np.any(self.mask() & ~self._automaton.ends)

    @property
    def problem(self) -> str | None:
        """Why the parser gave up (a grammar too large for its limits, a text that no token continues), or None."""
        return self._problem

    def mask(self) -> Bits:
        """Tokens allowed next, as `Matcher.mask`."""
        if self._mask is None:
            self.fill([self])
        return self._automaton.ends if self._mask is None else self._mask

    def advance(self, token: int) -> bool:
        """Takes a token; False, and no change, where the mask has it not, or an end token came before."""
        if self._ended or not has(self.mask(), token):
            return False
        if token in self._automaton.end_ids:
            self._ended, self._mask = True, self._automaton.ends
            return True
        self._mask = None
        if self._parser.try_consume_tokens([token]) != 1:
            self._fail(self._parser.get_error() or f"token {token} was offered and then refused")
        return True

    def forced(self) -> list[int]:
        """The tokens that must come next, as `Matcher.forced`; an end token too where it is the only one."""
        ahead, out = self.fork(), []
        while not ahead._ended and len(out) < _MOST_FORCED:
            bits = ahead.mask()
            if int(np.bitwise_count(bits).sum()) != 1:
                break
            out += tokens_of(bits)
            ahead.advance(out[-1])
        return out

    def fork(self) -> GrammarMatcher:
        """A copy that goes its own way; it takes microseconds."""
        copy = GrammarMatcher(self._automaton, self._parser.deep_copy())
        copy._mask, copy._problem, copy._ended = self._mask, self._problem, self._ended
        return copy

    def leaf(self) -> GrammarMatcher:
        """Itself."""
        return self

    @staticmethod
    def fill(matchers: Sequence[GrammarMatcher]) -> None:
        """Computes the masks of many in one call, in threads, without Python's lock."""
        waiting = list({id(m): m for m in matchers if m._mask is None}.values())
        for size in {m._automaton.full_words for m in waiting}:
            group = [m for m in waiting if m._automaton.full_words == size]
            buffer = np.zeros((len(group), size), np.int32)
            jobs = [(m._parser, row) for row, m in enumerate(group)]
            _executor().unsafe_compute_mask_ptr(jobs, buffer.ctypes.data, size * 4, len(group))
            for m, row in zip(group, buffer, strict=True):
                m._settle(row)

    def _settle(self, full: np.ndarray) -> None:
        """Takes the mask over the tokenizer's words that llguidance computed."""
        automaton = self._automaton
        bits = full.view(np.uint32)
        if automaton.inside is not None:
            bits = bits[: len(automaton.inside)] & automaton.inside
        if self._parser.is_accepting():
            bits |= automaton.ends
        else:
            bits &= ~automaton.ends
        if self._parser.is_error():
            self._fail(self._parser.get_error())
        elif not bits.any():
            self._fail("no token continues the text")
        else:
            bits.flags.writeable = False
            self._mask = bits

    def _fail(self, reason: str) -> None:
        self._problem = reason.strip().splitlines()[0] if reason.strip() else "the parser stopped"
        self._mask = self._automaton.ends


def compile(
    constraint: Constraint,
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    end_ids: Sequence[int] | None = None,
) -> Automaton:
    """Compiles a constraint for a tokenizer; the same call again costs nothing.

    Args:
      vocab_size: the model's, where it has more rows than the tokenizer has tokens; the rest is never allowed.
      end_ids: tokens that end a row; the tokenizer's own if not given.

    Raises:
      ValueError: a malformed or unsatisfiable grammar, named; a tokenizer without end token, or whose tokens'
        bytes are not known.
    """
    ends = tokenizer.eos_ids if end_ids is None else end_ids
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    ends = tuple(sorted(set(ends)))
    if not ends or not 0 <= ends[0] <= ends[-1] < size:
        raise ValueError(f"constrained output needs end tokens within the vocabulary of {size}; they are {list(ends)}")
    return _compile(constraint, tokenizer, size, ends)


@lru_cache(maxsize=256)
def _compile(constraint: Constraint, tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...]) -> Automaton:
    return Automaton(constraint, _vocabulary(tokenizer, vocab_size, end_ids), vocab_size, end_ids)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...]) -> LLTokenizer:
    """llguidance's tree of the tokens' bytes. Special tokens are marked, so that no text contains them."""
    from llguidance import LLTokenizer

    state = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    state.update(post_processor=None, truncation=None, padding=None)
    if (state.get("decoder") or {}).get("type") == "Metaspace":
        # The same bytes in the words that llguidance knows.
        state["decoder"] = {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": state["decoder"]["replacement"]}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        }
    special = {*tokenizer.hf.all_special_ids, *end_ids}
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    for token in special:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        content = tokenizer.hf.convert_ids_to_tokens(token)
        added[token] = {"id": token, "content": content, **plain, **added.get(token, {}), "special": True}
    state["added_tokens"] = [added[token] for token in sorted(added)]
    size = max(vocab_size, 1 + max(tokenizer.hf.get_vocab().values()))
    try:
        return LLTokenizer(json.dumps(state), n_vocab=size, eos_token=list(end_ids))
    except ValueError as error:
        raise ValueError(f"constrained output cannot use this tokenizer: {error}") from error


@lru_cache(maxsize=1)
def _executor() -> LLExecutor:
    from llguidance import LLExecutor

    return LLExecutor()


def _grammar(constraint: Constraint, tokenizer: LLTokenizer) -> LLMatcher:
    from llguidance import LLMatcher, regex_to_lark

    if constraint.json is not None:
        if (bound := too_low(json.loads(str(constraint.json)))) is not None:
            raise ValueError(f"{constraint} cannot be used: the upper bound {bound:g} is below -2^62; raise it")
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                str(constraint.json), overrides={"whitespace_pattern": _WHITESPACE}
            )
        except ValueError as error:
            raise ValueError(f"{constraint} cannot be used: {error}") from error
    else:
        regex = constraint.regex
        if constraint.choice is not None:
            regex = "|".join("".join(map(_literal, text)) for text in constraint.choice)
        digits = "d"  # \d is [0-9]
        grammar = LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(regex or '', digits)}/")
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        raise ValueError(f"{constraint} cannot be used: {_reason(matcher.get_error())}")
    if constraint.json is not None and not finite(json.loads(str(constraint.json))):
        raise ValueError(f"{constraint} is unsatisfiable: what it requires contains itself, so no text ends")
    return matcher


def _literal(letter: str) -> str:
    return letter if letter.isascii() and letter.isalnum() else f"\\x{{{ord(letter):x}}}"


def _reason(error: str) -> str:
    """The sentence of an error that shows the grammar with a caret below it."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return told[0] if told else lines[0] if lines else "unknown error"
