"""The model that is searched, on the sampler's engine: draws, ranks and scores nodes of many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxpost.generate.batching import Completion, Run, Sample
from jaxpost.generate.layout import bucket
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.rows import pack
from jaxpost.generate.sampler import Sampler
from jaxpost.search.contract import Drawn, Job
from jaxpost.search.tree import End, Node
from jaxpost.types import Params

Render = Callable[[Any], Sequence[int]]
"""Tokens of a prompt, a text or messages, by the chat template; a ValueError says why it has none."""


class EnginePolicy:
    """A sampler's model as the policy of a search.

    Args:
        sampler: with `encode` and `decode`.
        params: of its model.
        render: tokens of a prompt.
        seed, draw: of the noise.
        sampling: wishes of every draw, before what a `Draw` asks for.
    """

    def __init__(
        self, sampler: Sampler, params: Params, *, render: Render, seed: int = 0, draw: int = 0,
        sampling: SamplingParams | None = None,
    ):  # fmt: skip
        if sampler.encode is None or sampler.decode is None:
            raise ValueError("a policy of searches reads and writes text: its sampler needs `encode` and `decode`")
        self.sampler, self.params, self.render = sampler, params, render
        self.seed, self.draw_number = seed, draw
        self.sampling = sampling or SamplingParams()
        self._encode, self._decode = sampler.encode, sampler.decode
        self._wishes: dict[Any, SamplingParams] = {}

    def read(self, prompts: Sequence[Any]) -> list[tuple[int, ...] | str]:
        return [self._read(prompt) for prompt in prompts]

    def _read(self, prompt: Any) -> tuple[int, ...] | str:
        try:
            tokens = tuple(int(t) for t in self.render(prompt))
        except ValueError as error:
            return f"the prompt cannot be written in tokens: {error}"
        if not tokens:
            return "the prompt is empty"
        return self.sampler.problem(0, tokens, SamplingParams(max_tokens=1)) or tokens

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(int(t) for t in self._encode(text))

    def draw(self, jobs: Sequence[Job]) -> list[Drawn | str]:
        out: list[Drawn | str] = [""] * len(jobs)
        samples: list[Sample] = []
        for number, job in enumerate(jobs):
            tokens = job.node.all_tokens
            room = self.sampler.context - len(tokens)
            if room < 1:
                out[number] = f"a text of {len(tokens)} tokens fills the model's context of {self.sampler.context}"
                continue
            wish = self._wish(min(job.max_tokens, room), job.stop, job.sampling)
            problem = wish if isinstance(wish, str) else self.sampler.problem(job.example, tokens, wish)
            if problem or isinstance(wish, str):
                out[number] = problem or ""
                continue
            samples.append(Sample(number, job.example, job.sample, tokens, wish))
        if not samples:
            return out
        table = self.sampler._table(samples, self.seed, self.draw_number)
        engine, weights = self.sampler.ready(self.params, max(s.limit for s in samples))
        run = Run(engine, weights, samples, table, rows=self.sampler.rows, decode=self._decode, policy_version=0)
        for number, completion in run:
            out[number] = self._drawn(jobs[number], completion)
        return out

    def _wish(self, max_tokens: int, stop: tuple[str, ...], given: Mapping[str, Any]) -> SamplingParams | str:
        key = (max_tokens, stop, repr(sorted(given.items())))
        if key not in self._wishes:
            own = {"n": 1, "max_tokens": max_tokens, "min_tokens": min(self.sampling.min_tokens, max_tokens)}
            try:
                wish = self.sampling.updated({**own, **given})
                self._wishes[key] = wish.updated({"stop": (*wish.stop, *stop), "n": 1})
            except ValueError as error:
                return f"the search's sampling parameters cannot be used: {error}"
        return self._wishes[key]

    def _drawn(self, job: Job, completion: Completion) -> Drawn | str:
        if completion.finish == "error":
            return completion.error or "the model gave nothing"
        end: End = completion.finish if completion.stop not in job.stop else "step"  # ty: ignore[invalid-assignment]
        path = job.node.all_tokens[len(next(n for n in job.node.lineage() if n.parent is None).tokens) :]
        return Drawn(completion.tokens, self._text(path, completion.tokens), completion.logprobs, end)

    def _text(self, before: Sequence[int], tokens: Sequence[int]) -> str:
        """What tokens add to the text of those before; letters that are not whole yet come with the next."""
        near = list(before[-16:])
        return self._decode([*near, *tokens]).rstrip("�")[len(self._decode(near).rstrip("�")) :]

    def rank(self, nodes: Sequence[Node], best: int) -> list[tuple[Sequence[int], Sequence[float]] | str]:
        texts = [node.all_tokens for node in nodes]
        engine, weights = self.sampler.ready(self.params, max(map(len, texts)) + 1, rows=max(self.sampler.rows, 1))
        out: list[Any] = []
        for i in range(0, len(texts), self.sampler.rows):
            held = engine.admit(weights, texts[i : i + self.sampler.rows])
            wishes = pack([SamplingParams()], vocab_size=self.sampler.model.config.vocab_size, eos_ids=())
            wishes = jax.tree.map(lambda x, n=bucket(len(held)): np.repeat(x, n, axis=0), wishes)
            found = engine.rank(weights, held, wishes, [len(t.tokens) + 1 for t in held], best=best)
            engine.release(held)
            out += [(t.tolist(), p.tolist()) for t, p in zip(found.tokens, found.logprobs, strict=True)]
        return out

    def piece(self, node: Node, token: int) -> tuple[str, bool]:
        before = [t for n in node.path for t in n.tokens]
        return self._text(before, [token]), token in self.sampler.eos_ids

    def likelihood(self, nodes: Sequence[Node], texts: Sequence[Sequence[int]]) -> list[Sequence[float] | str]:
        whole = [[*node.all_tokens, *tokens] for node, tokens in zip(nodes, texts, strict=True)]
        engine, weights = self.sampler.ready(self.params, max(map(len, whole)))
        return [engine.score(weights, [text])[0].logprobs[len(text) - len(tokens) - 1 :].tolist() if tokens else []
                for text, tokens in zip(whole, texts, strict=True)]  # fmt: skip

    def forget(self, nodes: Sequence[Node]) -> None:
        """It keeps nothing."""
