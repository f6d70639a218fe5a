"""The engine: sequences over one paged cache. Sampler, search, evaluation and chat stand on it.

The host decides (which pages, which rows, when) and the device computes; programs are compiled for bucketed shapes
only, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from jaxpost.adapters.bind import merge
from jaxpost.generate import programs
from jaxpost.generate.pages import Copies, PageBook, PagedRow
from jaxpost.generate.rows import RowParams
from jaxpost.generate.speculative import Lookup
from jaxpost.models import pages as page_ops
from jaxpost.models.pages import Pools, Tables, init_pools
from jaxpost.models.transformer import unstack
from jaxpost.ops import platform
from jaxpost.sharding import replicated, spec
from jaxpost.types import Model, Params


@dataclass
class Text:
    """One text on the host and the pages that hold it. All tokens but the last are stored once it was admitted."""

    tokens: list[int]
    prompt_length: int
    pages: PagedRow = field(default_factory=PagedRow)
    ranked: int = 0
    """Its length when `Engine.rank` wrote its last token too."""


class Weights(NamedTuple):
    """Parameters as the programs read them: by reference, or laid out anew where a platform gains by it."""

    stacked: Params
    decoding: Params


class Engine:
    """Admits, extends, forks, scores and releases sequences.

    Args:
        model: pure functions of the model; `model.config` has its shapes.
        cache_tokens: tokens that the cache holds, of all sequences together (shared ones count once).
        page_size: tokens of a page.
        kv_dtype: of stored keys and values; int8 keeps a scale per token and head.
        prefill_tokens: most tokens of all rows in one pass over prompts.
        max_steps: most decode steps of one chunk.
        mesh: what the parameters are spread over; keys and values are split by head over its tensor axis.
        strict: a program that was not compiled before is an error.
        compiled: programs of an earlier engine of the same model and mesh.

    Attributes:
        compiled: name and shapes of every compiled program.
    """

    def __init__(
        self,
        model: Model,
        *,
        cache_tokens: int,
        page_size: int = 64,
        kv_dtype: DTypeLike = jnp.float32,
        prefill_tokens: int = 512,
        max_steps: int = 64,
        mesh: Mesh | None = None,
        strict: bool = False,
        compiled: dict[Any, Any] | None = None,
    ):
        kinds = [kind for stack in model.config.stacks for kind in stack.period]
        windows = [kind.window for kind in kinds if kind.window is not None]
        full = any(kind.window is None for kind in kinds)
        count = 1 + _power(-(-cache_tokens // page_size))
        self.model, self.page_size, self.prefill_tokens, self.max_steps = model, page_size, prefill_tokens, max_steps
        self.strict, self.compiled = strict, {} if compiled is None else compiled
        sizes = {"pages": count if full else 1, "window_pages": count if windows else 1, "page_size": page_size}
        self.book = PageBook(**sizes, full=full, window=max(windows) if windows else None)
        self.pools: Pools = init_pools(model.config, **sizes, dtype=kv_dtype)
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        if self._mesh is not None:
            self.pools = jax.device_put(self.pools, self._places())

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds."""
        pool = self.book.full if self.book.has_full else self.book.windowed
        return (pool.count - 1) * self.page_size

    def weights(self, params: Params) -> Weights:
        """Parameters ready for the programs: make it once for each version of the policy."""
        if not platform.choices().unrolled_decode:
            return Weights(params, params)
        return Weights(params, unstack(merge(params)))

    def admit(self, weights: Weights, prompts: Sequence[Sequence[int]]) -> list[Text]:
        """Stores all tokens but the last of each prompt, in chunks.

        Raises:
            OutOfPages: they do not fit; nothing has changed.
        """
        sequences = [Text(list(prompt), len(prompt)) for prompt in prompts]
        self._copy(self.book.reserve([s.pages for s in sequences], [len(s.tokens) - 1 for s in sequences]))
        try:
            for part in self._parts(sequences):
                self._store(weights, part)
        except BaseException:
            self.release(sequences)
            raise
        return sequences

    def append(self, weights: Weights, sequence: Text, tokens: Sequence[int]) -> None:
        """Adds given tokens: forced markers, an environment's answer, a search step."""
        self._copy(self.book.reserve([sequence.pages], [len(tokens)]))
        sequence.tokens.extend(tokens)
        for part in self._parts([sequence]):
            self._store(weights, part)

    def retract(self, sequence: Text, count: int) -> None:
        """Forgets a sequence's last tokens, of which only the very last may be unstored: what follows overwrites them.

        Raises:
            ValueError: a sliding window has passed the tokens that would come last.
        """
        stored = min(sequence.pages.stored, len(sequence.tokens) - count - 1)
        if self.book.window is not None and not all(
            sequence.pages.window[max(0, stored - self.book.window + 1) // self.page_size :]
        ):
            raise ValueError(f"{count} tokens cannot be taken back: their window's pages have been given back")
        del sequence.tokens[len(sequence.tokens) - count :]
        sequence.pages.stored, sequence.ranked = stored, 0
        self.book.trim(sequence.pages)

    def fork(self, sequence: Text, *, prompt_length: int | None = None) -> Text:
        """A second sequence that shares every page with the first."""
        length = sequence.prompt_length if prompt_length is None else prompt_length
        return Text(list(sequence.tokens), length, self.book.fork(sequence.pages), sequence.ranked)

    def release(self, sequences: Sequence[Text]) -> None:
        """Gives the pages of sequences back."""
        for sequence in sequences:
            self.book.release(sequence.pages)

    def score(self, weights: Weights, prompts: Sequence[Sequence[int]]) -> list[Float[np.ndarray, " T"]]:
        """log softmax(logits) of every token of each text but its first, through the cache and in chunks."""
        sequences = [Text(list(prompt), len(prompt)) for prompt in prompts]
        self._copy(self.book.reserve([s.pages for s in sequences], [len(s.tokens) - 1 for s in sequences]))
        found: list[list[np.ndarray]] = [[] for _ in sequences]
        number = {id(s): i for i, s in enumerate(sequences)}
        try:
            for part in self._parts(sequences):
                for sequence, values in zip(part.sequences, self._score(weights, part), strict=True):
                    found[number[id(sequence)]].append(values)
        finally:
            self.release(sequences)
        return [np.concatenate(x) if x else np.zeros(0, np.float32) for x in found]

    def extend(
        self,
        weights: Weights,
        sequences: Sequence[Text],
        wishes: RowParams,
        keys: UInt32[np.ndarray, "B 2"],
        limits: Sequence[int],
        *,
        steps: int,
        keep: int = 0,
        mask: UInt32[np.ndarray, "B Vw"] | None = None,
        best: int = 0,
        lookup: Lookup | None = None,
    ) -> programs.Decoded:
        """Decodes up to `steps` tokens of each sequence, which grow in place; arrays of the result are NumPy's.

        Args:
            wishes, keys: one row a sequence, padded to `bucket(len(sequences))` rows.
            limits: most tokens of each sequence, prompt included.
            keep: stop early when so few rows are live.
            lookup: guesses tokens that one pass verifies; not where there is a mask.
        """
        counts = [min(steps, limit - len(s.tokens)) for s, limit in zip(sequences, limits, strict=True)]
        self._copy(self.book.reserve([s.pages for s in sequences], counts))
        rows, tables = self._rows(sequences, limits, keys)
        run = self._program(
            "decode",
            partial(programs.decode, self.model),
            max_steps=self.max_steps,
            best=best,
            lookup=lookup if mask is None else None,
        )
        self.pools, decoded = run(
            weights.decoding, self.pools, tables, rows, wishes, np.int32(steps), np.int32(keep), mask
        )
        decoded = jax.device_get(decoded)
        for i, sequence in enumerate(sequences):
            sequence.tokens.extend(decoded.tokens[i, len(sequence.tokens) : decoded.lengths[i]].tolist())
            self.book.advance(sequence.pages, len(sequence.tokens) - 1 - sequence.pages.stored)
            self.book.trim(sequence.pages)
        return decoded

    def rank(
        self,
        weights: Weights,
        sequences: Sequence[Text],
        wishes: RowParams,
        limits: Sequence[int],
        *,
        best: int,
    ) -> programs.Ranked:
        """The `best` most probable next tokens of each sequence, best first; `push` adds one to it or to a fork.

        Args:
            wishes: penalties and bans, one row a sequence, padded to `bucket(len(sequences))` rows.
            limits: most tokens that each will have.
        """
        self._copy(self.book.reserve([s.pages for s in sequences], [1] * len(sequences)))
        size = bucket(len(sequences))
        rows, tables = self._rows(sequences, limits, np.zeros((size, 2), np.uint32))
        run = self._program("rank", partial(programs.rank, self.model), best=best)
        self.pools, ranked = run(weights.decoding, self.pools, tables, rows, wishes)
        for sequence in sequences:
            sequence.ranked = len(sequence.tokens)
        return jax.tree.map(lambda x: x[: len(sequences)], jax.device_get(ranked))

    def push(self, sequence: Text, token: int) -> None:
        """Adds a token to a sequence that was ranked, which takes no pass.

        Raises:
            ValueError: it was not ranked at its present length, so its last token is not stored.
        """
        if sequence.ranked != len(sequence.tokens):
            raise ValueError("push adds to a sequence that rank has just read; append adds to any")
        self.book.advance(sequence.pages, 1)
        sequence.tokens.append(token)

    def _rows(
        self, sequences: Sequence[Text], limits: Sequence[int], keys: UInt32[np.ndarray, "B 2"]
    ) -> tuple[programs.Rows, Tables]:
        size = bucket(len(sequences))
        room = self.page_size * _power(max(self.book.pages_for(limit) for limit in limits))
        tokens = np.zeros((size, room), np.int32)
        numbers = np.ones((3, size), np.int32)
        for i, (sequence, limit) in enumerate(zip(sequences, limits, strict=True)):
            tokens[i, : len(sequence.tokens)] = sequence.tokens
            numbers[:, i] = sequence.prompt_length, len(sequence.tokens), limit
        live = np.arange(size) < len(sequences)
        rows = programs.Rows(*_arrays(tokens, *numbers, live, keys))
        return rows, self._tables(sequences, size, room // self.page_size)

    def _tables(self, sequences: Sequence[Text], size: int, width: int) -> Tables:
        tables = np.zeros((2, size, width), np.int32)
        for i, sequence in enumerate(sequences):
            tables[0, i, : len(sequence.pages.full)] = sequence.pages.full
            tables[1, i, : len(sequence.pages.window)] = sequence.pages.window
        return Tables(*_arrays(*tables))

    def _parts(self, sequences: Sequence[Text]) -> Any:
        """Passes over what the sequences have not stored: long ones in pieces, short ones together."""
        todo = sorted(sequences, key=lambda s: s.pages.stored - len(s.tokens))
        while todo := [s for s in todo if s.pages.stored < len(s.tokens) - 1]:
            width = min(_power(len(todo[0].tokens) - 1 - todo[0].pages.stored, 16), self.prefill_tokens)
            chosen = todo[: max(1, self.prefill_tokens // width)]
            size = bucket(len(chosen))
            tokens, targets = np.zeros((2, size, width), np.int32)
            places = np.zeros((2, size), np.int32)
            for i, s in enumerate(chosen):
                start, end = s.pages.stored, min(s.pages.stored + width, len(s.tokens) - 1)
                tokens[i, : end - start], targets[i, : end - start] = s.tokens[start:end], s.tokens[start + 1 : end + 1]
                places[:, i] = start, end - start
            pages = _power(max(max(len(s.pages.full), len(s.pages.window)) for s in chosen))
            yield _Pass(chosen, programs.Part(*_arrays(tokens, *places)), targets, self._tables(chosen, size, pages))

    def _store(self, weights: Weights, part: _Pass) -> None:
        run = self._program("store", partial(programs.store, self.model), fresh=part.fresh)
        self.pools = run(weights.stacked, self.pools, part.tables, part.part)
        self._advance(part)

    def _score(self, weights: Weights, part: _Pass) -> list[np.ndarray]:
        chunk = platform.choices().chunk_tokens
        run = self._program("score", partial(programs.score, self.model), fresh=part.fresh, chunk_tokens=chunk)
        self.pools, values = run(weights.stacked, self.pools, part.tables, part.part, part.targets)
        host, counts = np.asarray(values), np.asarray(part.part.counts)
        self._advance(part)
        return [host[i, : counts[i]] for i in range(len(part.sequences))]

    def _advance(self, part: _Pass) -> None:
        for sequence, count in zip(part.sequences, np.asarray(part.part.counts), strict=False):
            self.book.advance(sequence.pages, int(count))

    def _copy(self, copies: Copies) -> None:
        if not copies.full and not copies.window:
            return
        # Padding copies page 0 onto itself.
        full, window = (
            np.asarray([*pairs, *[(0, 0)] * (_power(max(len(pairs), 1)) - len(pairs))], np.int32).T
            for pairs in (copies.full, copies.window)
        )
        self.pools = self._program("copy", partial(page_ops.copy, config=self.model.config))(self.pools, full, window)

    def _places(self) -> Any:
        """Where the pools lie on the mesh: their heads are split as the projections that write them."""
        assert self._mesh is not None
        mesh, heads = self._mesh, self.model.config.kv_heads
        split = heads % mesh.shape["tensor"] == 0

        def one(x: Array) -> NamedSharding:
            axes = (None, None, "act_kv_heads" if split else None, *[None] * (x.ndim - 3))
            return NamedSharding(mesh, spec(axes))

        return jax.tree.map(one, self.pools)

    def _program(self, name: str, function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
        """`function` compiled for the shapes that it is called with, the pools donated."""

        def run(*arguments: Any) -> Any:
            leaves, structure = jax.tree.flatten(arguments)
            shapes = tuple((np.shape(x), str(getattr(x, "dtype", type(x)))) for x in leaves)
            key = (name, tuple(sorted(static.items())), structure, shapes)
            if key not in self.compiled:
                if self.strict:
                    raise RuntimeError(
                        f"the engine would compile {name} for {_say(arguments)} after its warm-up: warm up with these "
                        "sizes, or set strict to false"
                    )
                options: dict[str, Any] = {"donate_argnums": 0 if name == "copy" else 1}
                if self._mesh is not None:
                    places = self._places()
                    options["out_shardings"] = places if name in ("copy", "store") else (places, replicated(self._mesh))
                jitted = jax.jit(partial(function, **static), **options)
                self.compiled[key] = jitted.lower(*arguments).compile()
            return self.compiled[key](*arguments)

        return run


@dataclass(frozen=True)
class _Pass:
    sequences: list[Text]
    part: programs.Part
    targets: Int[np.ndarray, "B T"]
    tables: Tables

    @property
    def fresh(self) -> bool:
        return not np.any(np.asarray(self.part.starts))


def _arrays(*values: np.ndarray) -> list[Array]:
    return [jnp.asarray(value) for value in values]


def _power(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least both."""
    return 1 << (max(count, least, 1) - 1).bit_length()


def bucket(rows: int) -> int:
    """Rows that a batch is padded to: a power of two."""
    return _power(rows)


def _say(arguments: Any) -> str:
    sizes = [tuple(np.shape(x)) for x in jax.tree.leaves(arguments) if np.ndim(x) == 2]
    return f"arrays of {sizes[-1]}" if sizes else "new shapes"
