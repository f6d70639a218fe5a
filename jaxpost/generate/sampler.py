"""Sampling many prompts: a queue in front of the engine, with rows replaced as they end.

The sampler runs the learner's own forward pass, so its log-probabilities are the learner's. A sample is a function
of (seed, draw, example, sample): not of its batch, its slot, or when it was admitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxpost.generate.batching import Run, told_width
from jaxpost.generate.engine import Engine, Weights
from jaxpost.generate.matcher import Matcher
from jaxpost.generate.noise import row_keys
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.rows import Encode, RowParams, Widths, candidates, pack
from jaxpost.generate.samples import Completion, Sample, Table
from jaxpost.generate.speculative import Lookup
from jaxpost.generate.thinking import ThinkingMatcher
from jaxpost.generate.warm_up import Sizes, WarmUp, warm_up
from jaxpost.sharding import row_shards
from jaxpost.types import Model, Params


class Sampler:
    """sample(params, prompts, SamplingParams, seed, draw) -> completions; made by `make_sampler`."""

    def __init__(
        self,
        model: Model,
        *,
        eos_ids: Sequence[int],
        context: int,
        rows: int,
        cache_tokens: int | None,
        encode: Encode | None,
        decode: Callable[[Sequence[int]], str] | None,
        speculate: Lookup | None,
        **engine: Any,
    ):
        self.model, self.eos_ids, self.context, self.rows = model, tuple(eos_ids), context, rows
        self.cache_tokens, self.encode, self.decode = cache_tokens, encode, decode
        self.speculate = speculate
        self._settings = engine
        self._shards = row_shards(engine["mesh"])
        self.engine: Engine | None = None
        self._compiled: dict[Any, Any] = {}
        self._weights: tuple[Params, Weights] | None = None
        self._longest, self._least_pages, self._widths, self._beams = 0, 1, Widths(), 1

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """n completions of every prompt, in order of prompt and sample; arguments and errors as `stream`."""
        found = self.stream(params, prompts, sampling, **options)
        return [c for _, c in sorted(found, key=lambda pair: pair[0])]

    def stream(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        seed: int = 0,
        draw: int = 0,
        example_ids: Sequence[int] | None = None,
        matchers: Sequence[Callable[[], Matcher] | None] | None = None,
        errors: Literal["raise", "return"] = "raise",
        policy_version: int = 0,
    ) -> Iterator[tuple[int, Completion]]:
        """Samples n completions of every prompt: (number, completion) as they end.

        Numbers count samples in order of prompt and sample.

        Args:
            prompts: token ids.
            sampling: one for all, or one a prompt.
            seed, draw: of the noise; `draw` is the rollout step or epoch.
            example_ids: identity of each prompt in the noise; its place if not given.
            matchers: makes each prompt's automaton (a grammar, a thinking budget), or None.
            errors: a prompt that cannot be sampled raises, or comes back with finish "error" while the others go on.

        Raises:
            ValueError: a prompt that is empty or too long, or parameters that do not fit the model; named by number.
        """
        wishes = [sampling or SamplingParams()] * len(prompts) if not isinstance(sampling, Sequence) else list(sampling)
        if len(wishes) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts with {len(wishes)} sampling parameters: give one, or one a prompt"
            )
        ids = list(range(len(prompts))) if example_ids is None else list(example_ids)
        samples: list[Sample] = []
        number = 0
        for at, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True)):
            problem = self.problem(ids[at], prompt, wish)
            if problem and errors == "raise":
                raise ValueError(problem)
            for k in range(wish.n):
                if problem:
                    yield number, Completion((), (), "error", example=ids[at], sample=k, error=problem)
                else:
                    make = matchers[at] if matchers is not None else None
                    own, matcher = _ending(wish, make() if make else None)
                    samples.append(Sample(number, ids[at], k, list(prompt), own, matcher))
                number += 1
        if not samples:
            return
        table = self.table(samples, seed, draw)
        engine, weights = self.ready(params, max(s.limit for s in samples))
        yield from Run(
            engine, weights, samples, table, rows=self.rows, decode=self.decode, policy_version=policy_version,
            lookup=self.speculate,
        )  # fmt: skip

    def warm_up(
        self,
        params: Params,
        *,
        prompt_tokens: int,
        sampling: SamplingParams | Sequence[SamplingParams],
        constrained: bool = False,
        beams: Sequence[int] = (),
    ) -> WarmUp:
        """Compiles all that calls up to a size can need; `strict` then holds for them.

        Args:
            prompt_tokens: of the longest prompt.
            sampling: wishes as the calls will have them, with their largest max_tokens and their longest lists of
                biases, bad words and end tokens; each number of `logprobs` is a program of its own.
            constrained: rows may have a matcher.
            beams: of the beam searches that will be made, with these wishes' end tokens.
        """
        wishes = list(sampling) if isinstance(sampling, Sequence) else [sampling]
        size = self.model.config.vocab_size
        # A grammar ends its row even with `ignore_eos`.
        packed = self.pack([*wishes, *(replace(wish, ignore_eos=False) for wish in wishes if constrained)])
        self._widths, self._beams = Widths.of(packed), max(self._beams, *beams, 1)
        self._longest = max(self._longest, prompt_tokens + max(wish.max_tokens for wish in wishes))
        engine, weights = self.ready(params, self._longest)
        told = [wish.prompt_logprobs for wish in wishes if wish.prompt_logprobs is not None]
        sizes = Sizes(
            rows=max(self.rows, self._beams),
            # Where the cache may overflow, texts are read again with what they have so far.
            read=prompt_tokens if self.cache_tokens is None else self._longest,
            longest=self._longest,
            best=sorted({told_width(wish.logprobs or 0, size) for wish in wishes}),
            prompt_best=told_width(max(told), size) if told else None,
            constrained=constrained,
            ranked=sorted({told_width(candidates(n, ends), size) for n in beams for ends in packed.end_ids}),
        )
        one = jax.tree.map(lambda x: x[:1], packed)
        done = warm_up(engine, weights, one, sizes, lookup=self.speculate)
        self._least_pages = engine.least_pages
        return done

    def forget(self) -> None:
        """Drops the cache and the weights' copies; compiled programs stay."""
        self.engine = self._weights = None

    def forget_weights(self) -> None:
        """Drops the weights' copies; the cache and compiled programs stay."""
        self._weights = None

    def ready(
        self, params: Params, longest: int, *, rows: int | None = None, together: int = 1
    ) -> tuple[Engine, Weights]:
        """An engine with room for `rows` texts of `longest` tokens, and the weights as it reads them.

        `together` is how many texts at least share one part of the rows, as the beams of a prompt do.
        """
        page = self._settings["page_size"]
        each = max(-(-max(rows or self.rows, self._beams) // self._shards), together, self._beams)
        wanted = self._shards * each * (max(longest, self._longest) + 2 * page)
        if self.cache_tokens is not None:
            wanted = self.cache_tokens
        if self.engine is None or self.engine.capacity < wanted:
            # The old pools go before the new ones come.
            self.engine = None
            self.engine = Engine(self.model, cache_tokens=wanted, compiled=self._compiled, **self._settings)
            self.engine.least_pages = self._least_pages
        if self._weights is None or self._weights[0] is not params:
            self._weights = None
            self._weights = (params, self.engine.weights(params, rows=max(self.rows, self._beams)))
        return self.engine, self._weights[1]

    def pack(self, wishes: Sequence[SamplingParams], *, seed: int = 0) -> RowParams:
        """Wishes as arrays, of the widths that a warm-up was made for."""
        size = self.model.config.vocab_size
        return pack(wishes, vocab_size=size, eos_ids=self.eos_ids, encode=self.encode, seed=seed, at_least=self._widths)

    def table(self, samples: Sequence[Sample], seed: int, draw: int) -> Table:
        """Their parameters and noise."""
        rows = self.pack([s.params for s in samples], seed=seed)
        numbers = (np.full(len(samples), draw), [s.example for s in samples], [s.sample for s in samples])
        keys = row_keys(jnp.asarray(rows.seed), *(jnp.asarray(x, jnp.int32) for x in numbers))
        return Table([s.number for s in samples], rows, np.asarray(jax.random.key_data(keys)))

    def problem(self, number: int, prompt: Sequence[int], wish: SamplingParams) -> str | None:
        """Why a prompt cannot be sampled, as a sentence."""
        if not len(prompt):
            return f"prompt {number} is empty: give at least one token (a chat template adds some)"
        if len(prompt) + wish.max_tokens > self.context:
            return (
                f"prompt {number} has {len(prompt)} tokens; with max_tokens={wish.max_tokens} it does not fit the "
                f"model's context of {self.context}: shorten it or lower max_tokens"
            )
        page = self._settings["page_size"]
        # Beside its own pages a sample needs a copy of the page that it shares with its prompt.
        room = None if self.cache_tokens is None else self.cache_tokens // self._shards
        if room is not None and len(prompt) + wish.max_tokens + 2 * page > room:
            each = f" in each of the {self._shards} parts of the rows" if self._shards > 1 else ""
            return (
                f"prompt {number} needs room for {len(prompt)} + {wish.max_tokens} tokens and two pages of {page}; the "
                f"cache holds {room}{each}: raise cache_tokens or lower max_tokens"
            )
        size = self.model.config.vocab_size
        if (wrong := next((token for token in prompt if not 0 <= token < size), None)) is not None:
            return f"prompt {number} holds the token id {wrong}, outside the vocabulary of {size}"
        try:
            pack([wish], vocab_size=size, eos_ids=self.eos_ids, encode=self.encode)
        except ValueError as error:
            return f"prompt {number}: {error}"
        if wish.stop and self.decode is None:
            return f"prompt {number} has stop strings, which need the sampler's `decode`"
        return None


def _ending(wish: SamplingParams, matcher: Matcher | None) -> tuple[SamplingParams, Matcher | None]:
    """`ignore_eos` beside an automaton: a budget of thinking ignores end tokens too; a whole grammar ends the row."""
    if matcher is None or not wish.ignore_eos:
        return wish, matcher
    endless = matcher.endless() if isinstance(matcher, ThinkingMatcher) else None
    return (replace(wish, ignore_eos=False), matcher) if endless is None else (wish, endless)


def make_sampler(
    model: Model,
    *,
    eos_ids: Sequence[int],
    context: int,
    rows: int = 32,
    cache_tokens: int | None = None,
    page_size: int = 64,
    kv_dtype: DTypeLike = jnp.float32,
    prefill_tokens: int = 512,
    max_steps: int = 64,
    encode: Encode | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    speculate: int | Lookup = 0,
    mesh: Mesh | None = None,
    strict: bool = False,
) -> Sampler:
    """Makes a sampler that keeps its cache and its compiled programs from call to call.

    Args:
        eos_ids: the model's end tokens.
        context: most tokens of a row, prompt included.
        rows: most rows that decode together.
        cache_tokens: room of the cache; None: enough for `rows` of the longest rows asked for.
        encode: text -> token ids, for bad words. decode: token ids -> text, for texts and stop strings.
        speculate: tokens that each row guesses from its own text and verifies in one pass (0: none), or a `Lookup`.
            Texts stay as they are; worth it where few rows decode texts that repeat themselves or their prompts.
        kv_dtype: as `Engine`. int8 rounds keys and values as they are stored; a row that waited for room is read again
            with those of its own pass unrounded, so its log-probabilities differ a little from an unbroken row's.
        page_size, prefill_tokens, max_steps, mesh, strict: as `Engine`.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; at least one answer must be written at a time")
    lookup = Lookup(speculate) if isinstance(speculate, int) else speculate
    return Sampler(
        model,
        eos_ids=eos_ids,
        context=context,
        rows=rows,
        cache_tokens=cache_tokens,
        encode=encode,
        decode=decode,
        speculate=lookup.check() if lookup.tokens else None,
        page_size=page_size,
        kv_dtype=kv_dtype,
        prefill_tokens=prefill_tokens,
        max_steps=max_steps,
        mesh=mesh,
        strict=strict,
    )
