"""`jaxpost chat`: a conversation whose cache is kept from turn to turn, written out as it is drawn."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import sharding
from jaxpost.assemble.answer import encode_prompt, keep_programs
from jaxpost.assemble.commands import load_bound
from jaxpost.assemble.matchers import start_thinking, thinking_budget
from jaxpost.config_io import plain_value
from jaxpost.generate.engine import Engine
from jaxpost.generate.layout import Text
from jaxpost.generate.matcher import masks
from jaxpost.generate.noise import row_keys
from jaxpost.generate.params import SamplingParams, own_name, said
from jaxpost.generate.rows import RowParams, pack
from jaxpost.generate.samples import why_stuck
from jaxpost.generate.thinking import ThinkingMatcher
from jaxpost.text.messages import parse_message
from jaxpost.text.stop import StopDetector

HELP = """\
/reset            begin a new conversation
/system TEXT      set the system turn (alone: remove it) and begin a new conversation
/set NAME=VALUE   a sampling parameter: temperature, top_p, max_tokens, stop ... (alone: show them)
/undo             take back the last turn and its answer
/save FILE        write the conversation as JSON messages
/load FILE        go on with a saved conversation
/help             this
/exit             leave (or Ctrl-D); Ctrl-C stops an answer"""

_STEPS = 8
"""Tokens between two pieces of text."""
_DEFAULTS = {"temperature": 0.7, "max_tokens": 512}
"""Of a conversation, in the place of `SamplingParams`'."""


class Conversation:
    """Messages, and the engine's text that holds them.

    Args:
      model: folder, hub id or `smollm2-135m-instruct`.
      sampling: sampling parameters by name.
      thinking: a budget of thinking for every answer, as `matchers.thinking_budget`.
    """

    def __init__(
        self,
        model: str,
        *,
        system: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        thinking: Mapping[str, int] | None = None,
        seed: int = 0,
    ):
        keep_programs()
        self.pretrained, params = load_bound(model)
        self.tokenizer = self.pretrained.tokenizer
        # Under one name each: what is said as max_new_tokens takes the place of max_tokens.
        self.settings: dict[str, Any] = _DEFAULTS | said(sampling or {})
        self.seed, self.system = seed, system
        self.wish = _wish(self.settings)
        self._rows(self.wish)
        self.thinking = thinking_budget(self.tokenizer, thinking) if thinking else None
        self.messages: list[dict[str, str]] = []
        self.context = min(self.pretrained.config.max_positions, 8192)
        self.engine = Engine(
            self.pretrained.model,
            cache_tokens=self.context * sharding.row_shards(self.pretrained.mesh),
            max_steps=_STEPS,
            mesh=self.pretrained.mesh,
        )
        self.weights = self.engine.weights(params)
        self._text: Text | None = None

    def set(self, assignment: str) -> None:
        """Changes a sampling parameter, written NAME=VALUE; without a value it goes back to its default.

        Raises:
          ValueError: an unknown name or a wrong value; nothing has changed.
        """
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} is not NAME=VALUE, as in temperature=0.7")
        name, new = name.strip(), plain_value(value)
        changed = said({name: new})
        settings = self.settings | changed | ({name: new} if name in changed else {})  # shown as it was written
        if new is None:
            settings.pop(own := own_name(name), None)
            settings |= {own: _DEFAULTS[own]} if own in _DEFAULTS else {}
        elif not changed:  # as do_sample=true, which asks for a temperature
            self.wish.updated({name: new})
        wish = _wish(settings)
        self._rows(wish)
        self.wish, self.settings = wish, settings

    def say(self, text: str) -> Iterator[str]:
        """Adds a user turn and gives the answer in pieces; stopped early, what was said is kept.

        Raises:
          ValueError: the conversation with the answer does not fit the context, or nothing can be drawn.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        tokens = encode_prompt(self.tokenizer, turns, system=self.system, chat=True)
        if len(tokens) + self.wish.max_tokens > self.context:
            raise ValueError(
                f"the conversation has {len(tokens)} tokens; with max_tokens={self.wish.max_tokens} it does not fit "
                f"the {self.context} that are kept: /reset, /undo, or /set max_tokens to less"
            )
        with _undisturbed():
            self._read(tokens)
        answer: list[str] = []
        try:
            for piece in self._draw(len(tokens)):
                answer.append(piece)
                yield piece
        finally:
            self.messages = [*turns, {"role": "assistant", "content": "".join(answer)}]

    def reset(self) -> None:
        """Forgets all turns."""
        self.messages = []

    def undo(self) -> None:
        """Forgets the last turn and its answer."""
        del self.messages[-2:]

    def _read(self, tokens: list[int]) -> None:
        """Brings the cache to these tokens; what it shares with the last text's beginning stays as it is."""
        old = self._text
        self._text = None
        if old is not None:
            pairs = zip(old.tokens, tokens, strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old.tokens), len(tokens)))
            try:
                if 0 < same < len(tokens):
                    self.engine.retract(old, len(old.tokens) - same)
                    self.engine.append(self.weights, [old], [tokens[same:]])
                    self._text = old
                    return
            except ValueError:
                pass  # A sliding window has passed the place where the texts part: read all of it again.
            self.engine.release([old])
        [self._text] = self.engine.admit(self.weights, [tokens])

    def _rows(self, wish: SamplingParams) -> RowParams:
        """The parameters as arrays. Raises: ValueError for what does not fit the model, as a token that it lacks."""
        size, tokenizer = self.pretrained.config.vocab_size, self.tokenizer
        return pack([wish], vocab_size=size, eos_ids=tokenizer.eos_ids, encode=tokenizer.encode, seed=self.seed)

    def _matcher(self, text: Text) -> ThinkingMatcher | None:
        """The budget of thinking of an answer that follows a text."""
        if self.thinking is None:
            return None
        matcher = start_thinking(self.pretrained, self.thinking, text.tokens)
        return matcher.endless() if self.wish.ignore_eos else matcher

    def _draw(self, prompt_length: int) -> Iterator[str]:
        """The answer in pieces, up to an end token, a stop string or `max_tokens`.

        Raises:
          ValueError: every token is banned, after the pieces before it.
        """
        text = self._text
        assert text is not None
        text.prompt_length = prompt_length
        rows = self._rows(self.wish)
        turn, first = jnp.asarray([len(self.messages)]), jnp.zeros(1, jnp.int32)
        keys = np.asarray(jax.random.key_data(row_keys(jnp.asarray(rows.seed), turn, first, first)))
        stops, told = StopDetector(self.wish.stop), 0
        limit, size = prompt_length + self.wish.max_tokens, self.pretrained.config.vocab_size
        matcher = self._matcher(text)
        while True:
            # What may come next is known one token ahead.
            steps, mask = (_STEPS, None) if matcher is None else (1, masks([matcher], size))
            before = len(text.tokens)
            with _undisturbed():
                decoded = self.engine.extend(self.weights, [text], rows, keys, [limit], steps=steps, mask=mask)
            if matcher is not None and len(text.tokens) > before:
                if not matcher.advance(text.tokens[-1]):
                    self.engine.retract(text, 1)  # An early end: the next mask says what to write in its place.
                    continue
                matcher = None if matcher.over else matcher
            over = not decoded.live[0]
            cut = decoded.ended[0] and not self.wish.include_stop_str_in_output
            whole = self.tokenizer.decode(text.tokens[prompt_length : len(text.tokens) - cut])
            # A character may still lack bytes.
            ready = len(whole) if over else len(whole.rstrip("\ufffd"))
            if ready > told:
                least = text.tokens[prompt_length:][: self.wish.min_tokens]  # what no stop string may end
                early = len(self.tokenizer.decode(least).rstrip("\ufffd")) - told
                yield stops.feed(whole[told:ready], max(0, early))
                told = ready
            if stops.found is not None:
                if self.wish.include_stop_str_in_output:
                    yield stops.found
                return
            if over:
                yield stops.flush()
                if decoded.stuck[0]:
                    raise ValueError(why_stuck(self.wish, constrained=matcher is not None))
                return


def _wish(settings: Mapping[str, Any]) -> SamplingParams:
    """Raises: ValueError for what a conversation cannot have."""
    wish = SamplingParams.from_mapping(settings)
    if wish.n != 1:
        raise ValueError("a conversation has one answer: n stays 1")
    if wish.logprobs is not None or wish.prompt_logprobs is not None:
        raise ValueError("a conversation shows no log-probabilities: `jaxpost generate --json` does")
    return wish


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A first Ctrl-C waits until the block is done: a program that is left takes the cache with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    old = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
    if came:
        raise KeyboardInterrupt


def chat(conversation: Conversation, ask: Callable[[], str], write: Callable[[str], None]) -> None:
    """Asks for turns and answers them until the input ends; lines that begin with / are commands (`HELP`)."""
    while True:
        try:
            line = ask().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            write("\n(/exit leaves)\n")
            continue
        if not line:
            continue
        if line == "/exit":
            return
        try:
            if line.startswith("/"):
                write(command(conversation, line) + "\n")
                continue
            for piece in conversation.say(line):
                write(piece)
            write("\n")
        except KeyboardInterrupt:
            write(" (stopped)\n")
        except (ValueError, OSError) as error:
            write(f"{error}\n")


def command(conversation: Conversation, line: str) -> str:
    """Does what a line that begins with / says; what to tell the user.

    Raises:
      ValueError, OSError: an unknown command, a wrong value, a file that cannot be read or written.
    """
    name, *parts = line.split(maxsplit=1)
    rest = "".join(parts).strip()
    if rest and name in ("/help", "/reset", "/undo"):
        raise ValueError(f"{name} stands alone; {rest!r} says nothing to it")
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.reset()
        return "(a new conversation)"
    if name == "/undo":
        conversation.undo()
        return f"({len(conversation.messages)} messages)"
    if name == "/system":
        conversation.system = rest or None
        conversation.reset()
        return "(a new conversation)"
    if name == "/set":
        if rest:
            conversation.set(rest)
        return "  ".join(f"{key}={value}" for key, value in conversation.settings.items())
    if name in ("/save", "/load") and not rest:
        raise ValueError(f"{name} needs a file: {name} talk.json")
    if name == "/save":
        saved = {"system": conversation.system, "messages": conversation.messages}
        Path(rest).write_text(json.dumps(saved, ensure_ascii=False, indent=1), encoding="utf-8")
        return f"(wrote {rest})"
    if name == "/load":
        conversation.system, conversation.messages = _saved(Path(rest))
        return f"({len(conversation.messages)} messages)"
    raise ValueError(f"{name} is no command: /help lists them")


def _saved(path: Path) -> tuple[str | None, list[dict[str, str]]]:
    """Raises: ValueError for a file of something else, or of messages that no template can write."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8-sig"))
        system, messages = (
            saved.get("system"),
            [{"role": m["role"], "content": m["content"]} for m in saved["messages"]],
        )
        if not all(isinstance(text, str) for text in (system or "", *(m["content"] for m in messages))):
            raise ValueError("not text")
        for message in messages:
            parse_message(message)
        return system, messages
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} holds no saved conversation (/save writes one)") from None
