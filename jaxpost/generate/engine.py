"""The engine: sequences over one paged cache. Sampler, search, evaluation and chat stand on it.

The host decides (which pages, which rows, when) and the device computes; programs are compiled for bucketed shapes
only, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import UInt32

from jaxpost.adapters.bind import merge
from jaxpost.generate import programs
from jaxpost.generate.layout import Pass, Text, bucket, dealt, page_pairs, passes, power, rows_of
from jaxpost.generate.pages import Copies, PageBook, PagedRow
from jaxpost.generate.rows import RowParams
from jaxpost.generate.speculative import Lookup
from jaxpost.models import pages as page_ops
from jaxpost.models.layouts import for_decoding, unstack
from jaxpost.models.pages import Pools, init_pools
from jaxpost.models.table import axes_tree
from jaxpost.ops import platform
from jaxpost.sharding import param_shardings, replicated, reshard, row_shards, spread
from jaxpost.types import Model, Params


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
        mesh: what the parameters are spread over. Rows, and pages with them, are split over data and fsdp; keys and
            values by head over tensor. Each of the `shards` parts of the rows has pages of its own.
        strict: a program that was not compiled before is an error.
        compiled: programs of an earlier engine of the same model and mesh.

    Attributes:
        compiled: name and shapes of every compiled program.
        least_pages: width that the rows' tables have at least; a warm-up sets it, so that shorter texts need no
            programs of their own.
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
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self.shards = row_shards(self._mesh)
        count = 1 + power(-(-cache_tokens // (page_size * self.shards)))
        self.model, self.page_size, self.prefill_tokens, self.max_steps = model, page_size, prefill_tokens, max_steps
        self.strict, self.compiled, self.least_pages = strict, {} if compiled is None else compiled, 1
        sizes: dict[str, Any] = {"pages": count if full else 1, "window_pages": count if windows else 1}
        about: dict[str, Any] = {"full": full, "window": max(windows) if windows else None, "page_size": page_size}
        self.books = [PageBook(**sizes, **about, shard=i) for i in range(self.shards)]
        whole = {name: self.shards * size for name, size in sizes.items()}
        make = partial(init_pools, model.config, **whole, page_size=page_size, dtype=kv_dtype)
        self._places = None if self._mesh is None else page_ops.places(jax.eval_shape(make), self._mesh)
        # On a mesh no device ever holds more than its own pages.
        self.pools: Pools = make() if self._places is None else jax.jit(make, out_shardings=self._places)()

    @property
    def book(self) -> PageBook:
        """The first part's pages; all parts' books are `books`."""
        return self.books[0]

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds."""
        pool = self.book.full if self.book.has_full else self.book.windowed
        return self.shards * (pool.count - 1) * self.page_size

    def weights(self, params: Params, *, rows: int = 1) -> Weights:
        """Parameters ready for the programs, by reference but from another mesh: make it once for each version.

        Args:
            rows: most that will decode together, for the layout.
        """
        meshes = {getattr(x.sharding, "mesh", None) for x in jax.tree.leaves(params)}
        if self._mesh is not None and meshes != {self._mesh}:
            params = merge(params)
            places = param_shardings(axes_tree(self.model.table), self._mesh, params, report=lambda _: None)
            params = reshard(params, places)
        if not platform.choices().unrolled_decode:
            return Weights(params, params)
        if self._mesh is not None:
            return Weights(params, unstack(merge(params)))
        return Weights(params, for_decoding(merge(params), panels=rows > 1))

    def admit(
        self, weights: Weights, prompts: Sequence[Sequence[int]], shards: Sequence[int] | None = None
    ) -> list[Text]:
        """Stores all tokens but the last of each prompt, in chunks.

        Args:
            shards: the part of the rows that each belongs to, with all of its forks; None: where most pages are free.

        Raises:
            OutOfPages: they do not fit; nothing has changed.
        """
        sequences = self._texts(prompts, shards)
        self._reserve(sequences, [len(s.tokens) - 1 for s in sequences])
        try:
            for part in passes(sequences, self.shards, self.prefill_tokens, least_pages=self.least_pages):
                self._store(weights, part)
        except BaseException:
            self.release(sequences)
            raise
        return sequences

    def append(self, weights: Weights, sequences: Sequence[Text], tokens: Sequence[Sequence[int]]) -> None:
        """Adds given tokens: forced markers, an environment's answer, a search step; `OutOfPages` as `admit`."""
        self._reserve(sequences, [len(x) for x in tokens])
        for sequence, new in zip(sequences, tokens, strict=True):
            sequence.tokens.extend(new)
        for part in passes(sequences, self.shards, self.prefill_tokens, least_pages=self.least_pages):
            self._store(weights, part)

    def append_scored(
        self,
        weights: Weights,
        sequences: Sequence[Text],
        tokens: Sequence[Sequence[int]],
        *,
        heat: Sequence[float],
        best: int = 0,
    ) -> list[programs.Scores]:
        """Adds given tokens to several sequences, and scores them under softmax(logits / heat), as `score`.

        Raises:
            OutOfPages: they do not fit; nothing has changed.
        """
        self._reserve(sequences, [len(x) for x in tokens])
        for sequence, new in zip(sequences, tokens, strict=True):
            sequence.tokens.extend(new)
        return self._read(weights, sequences, heat, best)

    def retract(self, sequence: Text, count: int) -> None:
        """Forgets a sequence's last tokens, of which only the very last may be unstored: what follows overwrites them.

        Raises:
            ValueError: a sliding window has passed the tokens that would come last.
        """
        stored = min(sequence.pages.stored, len(sequence.tokens) - count - 1)
        book = self._book(sequence)
        if book.window is not None and not all(
            sequence.pages.window[max(0, stored - book.window + 1) // self.page_size :]
        ):
            raise ValueError(f"{count} tokens cannot be taken back: their window's pages have been given back")
        del sequence.tokens[len(sequence.tokens) - count :]
        sequence.pages.stored, sequence.ranked = stored, 0
        book.trim(sequence.pages)

    def fork(self, sequence: Text, *, prompt_length: int | None = None) -> Text:
        """A second sequence that shares every page with the first."""
        length = sequence.prompt_length if prompt_length is None else prompt_length
        return Text(list(sequence.tokens), length, self._book(sequence).fork(sequence.pages), sequence.ranked)

    def release(self, sequences: Sequence[Text]) -> None:
        """Gives the pages of sequences back."""
        for sequence in sequences:
            self._book(sequence).release(sequence.pages)

    def score(self, weights: Weights, prompts: Sequence[Sequence[int]], *, best: int = 0) -> list[programs.Scores]:
        """log softmax(logits) of every token of each text but its first, through the cache and in chunks.

        Returns:
            for each text logprobs [T - 1], and the `best` most probable tokens at each place [T - 1, N].
        """
        sequences = self._texts(prompts)
        self._reserve(sequences, [len(s.tokens) - 1 for s in sequences])
        try:
            return self._read(weights, sequences, [1.0] * len(sequences), best)
        finally:
            self.release(sequences)

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
        pause: UInt32[np.ndarray, "B Vw"] | None = None,
        best: int = 0,
        lookup: Lookup | None = None,
    ) -> programs.Decoded:
        """Decodes up to `steps` tokens of each sequence, which grow in place; arrays of the result are NumPy's.

        Args:
            wishes, keys: one row a sequence, padded to `bucket(len(sequences))` rows.
            limits: most tokens of each sequence, prompt included.
            keep: stop early when so few rows are live.
            pause: bits of tokens after which a row waits for the chunk's end.
            lookup: guesses tokens that one pass verifies; not where there is a mask.
        """
        counts = [min(steps, limit - len(s.tokens)) for s, limit in zip(sequences, limits, strict=True)]
        self._reserve(sequences, counts)
        slots, size, (wishes, keys, mask, pause) = dealt(sequences, self.shards, (wishes, keys, mask, pause))
        rows, tables = self._arrays(
            rows_of(sequences, limits, keys, slots, size, page_size=self.page_size, least_pages=self.least_pages)
        )
        wishes, mask, pause = self._arrays((wishes, mask, pause))
        run = self._program(
            "decode",
            partial(programs.decode, self.model),
            max_steps=self.max_steps,
            best=best,
            lookup=lookup if mask is None else None,
        )
        self.pools, decoded = run(
            weights.decoding, self.pools, tables, rows, wishes, np.int32(steps), np.int32(keep), mask, pause
        )
        decoded = jax.device_get(decoded)
        if self.shards > 1:
            decoded = jax.tree.map(lambda x: x[slots] if np.ndim(x) else x, decoded)
        for i, sequence in enumerate(sequences):
            sequence.tokens.extend(decoded.tokens[i, len(sequence.tokens) : decoded.lengths[i]].tolist())
            self._book(sequence).advance(sequence.pages, len(sequence.tokens) - 1 - sequence.pages.stored)
            self._book(sequence).trim(sequence.pages)
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
        self._reserve(sequences, [1] * len(sequences))
        slots, size, wishes = dealt(sequences, self.shards, wishes)
        keys = np.zeros((size, 2), np.uint32)
        sizes = {"page_size": self.page_size, "least_pages": self.least_pages}
        rows, tables = self._arrays(rows_of(sequences, limits, keys, slots, size, **sizes))
        run = self._program("rank", partial(programs.rank, self.model), best=best)
        self.pools, ranked = run(weights.decoding, self.pools, tables, rows, self._arrays(wishes))
        for sequence in sequences:
            sequence.ranked = len(sequence.tokens)
        return jax.tree.map(lambda x: x[slots], jax.device_get(ranked))

    def push(self, sequence: Text, token: int) -> None:
        """Adds a token to a sequence that was ranked, which takes no pass.

        Raises:
            ValueError: it was not ranked at its present length, so its last token is not stored.
        """
        if sequence.ranked != len(sequence.tokens):
            raise ValueError("push adds to a sequence that rank has just read; append adds to any")
        self._book(sequence).advance(sequence.pages, 1)
        sequence.tokens.append(token)

    def _texts(self, prompts: Sequence[Sequence[int]], shards: Sequence[int] | None = None) -> list[Text]:
        """New texts that hold no pages yet."""
        if shards is None:
            free, shards = [book.free for book in self.books], []
            for prompt in prompts:
                shards.append(free.index(max(free)))
                free[shards[-1]] -= self.book.pages_for(len(prompt))
        return [Text(list(p), len(p), PagedRow(shard=shard)) for p, shard in zip(prompts, shards, strict=True)]

    def _book(self, sequence: Text) -> PageBook:
        return self.books[sequence.pages.shard]

    def _reserve(self, sequences: Sequence[Text], counts: Sequence[int]) -> None:
        """Makes room for `counts[i]` more tokens of sequence i; shared pages that they will write are copied.

        Raises:
            OutOfPages: not all of it fits; nothing has changed.
        """
        parts: list[tuple[list[PagedRow], list[int]]] = [([], []) for _ in self.books]
        for sequence, count in zip(sequences, counts, strict=True):
            rows, room = parts[sequence.pages.shard]
            rows.append(sequence.pages)
            room.append(count)
        if self.shards > 1:
            for book, part in zip(self.books, parts, strict=True):
                book.check(*part)
        self._copy([book.reserve(*part) for book, part in zip(self.books, parts, strict=True)])

    def _arrays(self, tree: Any) -> Any:
        """Arrays that lead with rows, where the programs want them."""
        return jax.tree.map(jnp.asarray, tree) if self._mesh is None else spread(tree, self._mesh)

    def _store(self, weights: Weights, part: Pass) -> None:
        run = self._program("store", partial(programs.store, self.model), fresh=part.fresh)
        self.pools = run(weights.stacked, self.pools, *self._arrays((part.tables, part.part)))
        self._advance(part)

    def _read(
        self, weights: Weights, sequences: Sequence[Text], heat: Sequence[float], best: int
    ) -> list[programs.Scores]:
        """Stores what the sequences have not stored yet; the scores of what follows each token, NumPy's."""
        best = min(best, self.model.config.vocab_size)
        nothing: Any = (np.zeros(0, np.float32), np.zeros((0, best), np.float32), np.zeros((0, best), np.int32))
        found = [[programs.Scores(nothing[0], programs.Best(*nothing[1:]))] for _ in sequences]
        number = {id(s): i for i, s in enumerate(sequences)}
        for part in passes(sequences, self.shards, self.prefill_tokens, least_pages=self.least_pages):
            at = [number[id(s)] for s in part.sequences]
            heats = np.ones(len(part.targets), np.float32)
            heats[part.slots] = [heat[i] for i in at]
            scores = self._score(weights, part, heats, best)
            for row, i in zip(part.slots, at, strict=True):
                found[i].append(jax.tree.map(lambda x, row=row, end=part.counts[row]: x[row, :end], scores))
        return [jax.tree.map(lambda *x: np.concatenate(x), *parts) for parts in found]

    def _score(self, weights: Weights, part: Pass, heat: np.ndarray, best: int) -> programs.Scores:
        chunk = platform.choices().chunk_tokens
        run = self._program(
            "score", partial(programs.score, self.model), fresh=part.fresh, best=best, chunk_tokens=chunk
        )
        arguments = self._arrays((part.tables, part.part, part.targets, heat))
        self.pools, scores = run(weights.stacked, self.pools, *arguments)
        self._advance(part)
        return jax.device_get(scores)

    def _advance(self, part: Pass) -> None:
        for i, sequence in zip(part.slots, part.sequences, strict=True):
            self._book(sequence).advance(sequence.pages, int(part.counts[i]))

    def _copy(self, copies: Sequence[Copies]) -> None:
        """Copies pages within each part."""
        if not any(part.full or part.window for part in copies):
            return
        full, window = [part.full for part in copies], [part.window for part in copies]
        width = bucket(max(map(len, full + window)))
        both = self._arrays((page_pairs(full, width), page_pairs(window, width)))
        self.pools = self._program("copy", partial(page_ops.copy, config=self.model.config))(self.pools, *both)

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
                mesh, places = self._mesh, self._places
                if mesh is not None:
                    options["out_shardings"] = places if name in ("copy", "store") else (places, replicated(mesh))
                jitted = jax.jit(partial(function, mesh=mesh, **static), **options)
                with nullcontext() if mesh is None else jax.set_mesh(mesh):  # training may have set its own
                    self.compiled[key] = jitted.lower(*arguments).compile()
            return self.compiled[key](*arguments)

        return run


def _say(arguments: Any) -> str:
    sizes = [tuple(np.shape(x)) for x in jax.tree.leaves(arguments) if np.ndim(x) == 2]
    return f"arrays of {sizes[-1]}" if sizes else "new shapes"
