"""An example becomes tokens and loss weights: text -> pieces -> token ids, each with the weight of its piece.

What is trained, by `mask`:

    assistant    assistant turns, end-of-turn token included; a turn with `train: false` or `loss_weight: 0` is read
                 only. A plain prompt and completion are a user and an assistant turn.
    weights      the same, each turn times its `loss_weight`
    completion   the completion of prompt_completion rows: its assistant turns, or, of plain text, all of it and the
                 end token, without any template
    all          every token

The first token of an example is never a target (nothing predicts it), so its weight is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxpost.data.formats import Example, LanguageModeling, PromptCompletion, Tools
from jaxpost.text.messages import Conversation, DataError, Message
from jaxpost.text.tokenizer import Tokenizer


@runtime_checkable
class Coding(Protocol):
    """What becomes of a source's examples: the part of their preparation that differs between kinds of data.

    A frozen dataclass of options: worker processes get a copy, and its `repr` is part of the cache's key.
    """

    @property
    def kind(self) -> str | None:
        """What judged rows are read as; None: rows for supervised training."""
        ...

    def split(self, example: Example, tokenizer: Tokenizer, notes: Counter[str]) -> list[Any]:
        """Pieces of text of an example; a str among them is why a part of it is dropped. Raises: DataError."""
        ...

    def encode(self, items: Sequence[Any], tokenizer: Tokenizer) -> list[Any]:
        """Of each item tokens that know their `cut` (tokens beyond the window), a DataError, or why it is dropped."""
        ...

    def arrays(self, encoded: Sequence[Any]) -> dict[str, np.ndarray]:
        """What is kept on disk; `tokens` and `weights` are flat and of equal length."""
        ...


class Pieced(NamedTuple):
    """Texts that are concatenated, the weight of each, and whether the sequence ends with the end token."""

    pieces: list[str]
    weights: list[float]
    add_bos: bool
    end_weight: float | None


class Encoded(NamedTuple):
    """tokens int32 [n], weights float32 [n]; `full_length` is n before any truncation."""

    tokens: np.ndarray
    weights: np.ndarray
    full_length: int

    @property
    def cut(self) -> int:
        """Tokens beyond the window."""
        return self.full_length - len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What decides the tokens of a row for supervised training, beside the tokenizer."""

    mask: str
    seq_len: int
    system_prompt: str | None = None
    on_long_row: str = "truncate"

    @property
    def kind(self) -> None:
        """Rows for supervised training."""
        return None

    def split(self, example: Example, tokenizer: Tokenizer, notes: Counter[str]) -> list[Pieced]:
        """One example's pieces."""
        return [to_pieces(example, tokenizer, self, notes)]

    def encode(self, items: Sequence[Pieced], tokenizer: Tokenizer) -> list[Encoded | DataError | str]:
        """Tokens and weights, an error, or why the row is dropped."""
        reason = "too long" if self.on_long_row == "drop" else "nothing trained within the window"
        return [reason if found is None else found for found in encode_batch(items, tokenizer, self)]

    def arrays(self, encoded: Sequence[Encoded]) -> dict[str, np.ndarray]:
        """tokens [n], weights [n], offsets [examples + 1]."""
        lengths = [len(e.tokens) for e in encoded]
        return {
            "tokens": np.concatenate([e.tokens for e in encoded]),
            "weights": np.concatenate([e.weights for e in encoded]),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        }


def to_pieces(example: Example, tokenizer: Tokenizer, options: EncodeOptions, notes: Counter[str]) -> Pieced:
    """Splits an example into pieces of text, each trained with one weight.

    Raises: DataError where the example's format and the mask do not go together.
    """
    mask = options.mask
    if example.tools and any(isinstance(value, str) for value in vars(example).values()):
        raise DataError("tools stand beside plain text, which has no place for them; use messages", kind="tools")
    if isinstance(example, LanguageModeling):
        if isinstance(example.content, str):
            if mask != "all":
                raise DataError(f"plain text has no assistant turns, so mask: {mask} trains none of it; use mask: all")
            return Pieced([example.content], [1.0], tokenizer.adds_bos, 1.0)
        if mask == "completion":
            raise DataError("mask: completion needs rows of prompt and completion, not messages; use mask: assistant")
        return _conversation(example.content, 0, example.tools, tokenizer, options, notes)
    if isinstance(example, PromptCompletion):
        prompt, completion = example.prompt, example.completion
        if isinstance(prompt, str) and isinstance(completion, str):
            if mask in ("completion", "all"):
                return Pieced([prompt, completion], [1.0 if mask == "all" else 0.0, 1.0], tokenizer.adds_bos, 1.0)
            notes["plain pairs shown as a user and an assistant turn"] += 1
            turns = (Message(role="user", content=prompt), Message(role="assistant", content=completion))
            return _conversation(turns, 0, example.tools, tokenizer, options, notes)
        if not isinstance(prompt, str) and not isinstance(completion, str):
            return _conversation(prompt + completion, len(prompt), example.tools, tokenizer, options, notes)
    name = type(example).__name__
    raise DataError(f"{name} rows are not for supervised training; it takes language_modeling or prompt_completion")


def _conversation(
    turns: Conversation, completion: int, tools: Tools, tokenizer: Tokenizer, options: EncodeOptions, notes: Counter
) -> Pieced:
    """`completion` is the number of the completion's first turn (0: there is no prompt of its own)."""
    rendered = tokenizer.render_spans(turns, tools, system=options.system_prompt)
    if unnamed := sum(message.name is not None and message.name not in rendered.text for message in turns):
        notes["turns whose name the chat template does not show"] += unnamed
    if options.mask == "all":
        return Pieced([rendered.text], [1.0], False, None)
    written = [(n, message) for n, message in enumerate(turns) if message.role == "assistant"]
    if not written:
        raise DataError("the conversation has no assistant turn, so nothing of it is trained", kind="empty_mask")
    if len(written) != len(rendered.spans):
        raise DataError(
            f"the chat template marks {len(rendered.spans)} generated parts for {len(written)} assistant turns",
            kind="template",
        )
    pieces, weights, at = [], [], 0
    for (n, message), (start, end) in zip(written, rendered.spans, strict=True):
        pieces += [rendered.text[at:start], rendered.text[start:end]]
        weights += [0.0, _turn_weight(message, options.mask, n >= completion, notes)]
        at = end
    if at < len(rendered.text):
        pieces.append(rendered.text[at:])
        weights.append(0.0)
    for message in turns:
        if message.role != "assistant" and message.weight and options.mask == "weights":
            raise DataError(
                f"a {message.role} turn has loss_weight {message.weight}, but only assistant turns can be trained "
                "by turn; give it 0, or use mask: all",
                kind="weight",
            )
    return Pieced(pieces, weights, False, None)


def _turn_weight(message: Message, mask: str, in_completion: bool, notes: Counter[str]) -> float:
    weight = 1.0 if message.weight is None else message.weight
    if mask == "weights":
        return weight
    if mask == "completion" and not in_completion:
        return 0.0
    if weight not in (0.0, 1.0):
        notes[f"turns whose loss_weight counts as 1 under mask: {mask}"] += 1
    return float(weight > 0)


def encode_batch(
    batch: Sequence[Pieced], tokenizer: Tokenizer, options: EncodeOptions
) -> list[Encoded | DataError | None]:
    """Tokens and weights of each example; an error where nothing is trained; None for a dropped row."""
    return [_finish(ids, weights, options) for ids, weights, _ in weighted_tokens(batch, tokenizer)]


def weighted_tokens(
    batch: Sequence[Pieced], tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each example the tokens int32 [n], their weights float32 [n] and the piece that each begins in, int [n].

    The begin token belongs to piece -1, the end token to none either (the number of pieces).
    """
    for pieced, (ids, owner) in zip(batch, tokenizer.encode_pieces([p.pieces for p in batch]), strict=True):
        weights = np.asarray(pieced.weights, np.float32)[owner]
        if pieced.add_bos:
            ids, weights, owner = (
                np.insert(ids, 0, tokenizer.bos_id),
                np.insert(weights, 0, 0.0),
                np.insert(owner, 0, -1),
            )
        if pieced.end_weight is not None and tokenizer.eos_id is not None:
            ids, weights = np.append(ids, tokenizer.eos_id), np.append(weights, pieced.end_weight)
            owner = np.append(owner, len(pieced.pieces))
        yield ids.astype(np.int32), weights.astype(np.float32), owner


def _finish(tokens: np.ndarray, weights: np.ndarray, options: EncodeOptions) -> Encoded | DataError | None:
    if weights.size:
        weights[0] = 0.0
    if not weights.any():
        return DataError("nothing of the row is trained (every token's weight is 0)", kind="empty_mask")
    full, limit = len(tokens), options.seq_len
    if full > limit:
        if options.on_long_row == "error":
            return DataError(
                f"the row has {full} tokens and the window {limit}; raise data.seq_len or set data.on_long_row to "
                "truncate or drop",
                kind="too_long",
            )
        tokens, weights = tokens[:limit], weights[:limit]
        if options.on_long_row == "drop" or not weights.any():
            return None
    return Encoded(tokens, weights, full)
