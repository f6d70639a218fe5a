"""The model that is searched, on the sampler's engine: draws, ranks and scores nodes of many prompts at once.

Every node that may be continued holds its text's pages, so a fork, a reorder or a backtrack moves page indices, and
only what is new is read. Draws of all prompts share one run with rows replaced as they end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxpost.generate.batching import Room, Run
from jaxpost.generate.engine import Engine, Weights
from jaxpost.generate.layout import Text, bucket, power
from jaxpost.generate.pages import OutOfPages
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.rows import pack
from jaxpost.generate.sampler import Sampler
from jaxpost.generate.samples import Completion, Sample
from jaxpost.search.contract import Drawn, Job
from jaxpost.search.shelf import Key, Shelf, key_of
from jaxpost.search.tree import End, Node
from jaxpost.types import Params

Render = Callable[[Any], Sequence[int]]
"""Tokens of a prompt, a text or messages, by the chat template; a ValueError says why it has none."""
_NEAR = 16


class EnginePolicy:
    """A sampler's model as the policy of a search (`contract.Policy`).

    A child's tokens are a function of (seed, draw, its problem's number, its own number): not of what is drawn beside
    it, of what the cache holds, or of the number of devices.

    Args:
        sampler: with `encode` and `decode`; its `rows` decode together, its cache holds the trees.
        params: of its model.
        render: tokens of a prompt.
        seed, draw: of the noise.
        sampling: wishes of every draw, before what a `Draw` asks for. Its own stop strings end an answer.

    Attributes:
        shelf: texts held for nodes, and what was read.
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
        own = () if self.sampling.ignore_eos else sampler.eos_ids
        self._ends = frozenset((*own, *self.sampling.stop_token_ids))
        self.shelf = Shelf(sampler.rows)
        self._encode, self._decode = sampler.encode, sampler.decode
        self._wishes: dict[Any, SamplingParams | str] = {}
        self._room = Room(self.shelf.spare, {})
        self._seen: set[Key] = set()

    # Text

    def read(self, prompts: Sequence[Any]) -> list[tuple[int, ...] | str]:
        return [self._read(prompt) for prompt in prompts]

    def _read(self, prompt: Any) -> tuple[int, ...] | str:
        try:
            tokens = tuple(int(t) for t in self.render(prompt))
        except ValueError as error:
            return f"the prompt cannot be written in tokens: {error}"
        if not tokens:
            return "the prompt is empty"
        if len(tokens) >= (most := self.sampler.context):
            return (
                f"the prompt has {len(tokens)} tokens, and the model's context of {most} leaves no room for an answer"
            )
        return self.sampler.problem(0, tokens, SamplingParams(max_tokens=1)) or tokens

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(int(t) for t in self._encode(text))

    def piece(self, node: Node, token: int) -> tuple[str, bool]:
        return self._text(node, [token]), token in self._ends

    def _text(self, node: Node, tokens: Sequence[int]) -> str:
        """What tokens add to a node's text; a letter that is not whole yet comes with the piece that completes it."""
        near: list[int] = []
        for above in node.lineage():
            if above.parent is None or len(near) >= _NEAR:
                break
            near = [*above.tokens[-_NEAR:], *near]
        before = self._decode(near).rstrip("\ufffd")
        return self._decode([*near, *tokens]).rstrip("\ufffd")[len(before) :]

    # Drawing

    def draw(self, jobs: Sequence[Job]) -> list[Drawn | str]:
        out: list[Drawn | str] = [""] * len(jobs)
        samples: list[Sample] = []
        for number, job in enumerate(jobs):
            sample = self._sample(number, job)
            if isinstance(sample, Sample):
                samples.append(sample)
            else:
                out[number] = sample
        if not samples:
            return out
        engine, weights = self._ready(max(s.limit for s in samples))
        born = {s.number: (jobs[s.number].node, jobs[s.number].sample) for s in samples}
        try:
            self._hold(engine, weights, [jobs[s.number].node for s in samples])
            table = self.sampler.table(samples, self.seed, self.draw_number)
            run = Run(
                engine, weights, samples, table, rows=self.sampler.rows, decode=self._decode, policy_version=0,
                lookup=self.sampler.speculate, room=self._room,
            )  # fmt: skip
            for number, completion in run:
                out[number] = self._drawn(jobs[number], completion)
        except BaseException:
            self.shelf.drop(born.values())
            raise
        self.shelf.drop(born[number] for number in born if isinstance(out[number], str))
        return out

    def _sample(self, number: int, job: Job) -> Sample | str:
        tokens = job.node.all_tokens
        room = self.sampler.context - len(tokens)
        if room < 1:
            return f"a text of {len(tokens)} tokens fills the model's context of {self.sampler.context}"
        wish = self._wish(min(job.max_tokens, room), job.stop, job.sampling, job.top_logprobs)
        if isinstance(wish, str):
            return wish
        if problem := self.sampler.problem(job.example, tokens, wish):
            return problem
        return Sample(
            number, job.example, job.sample, tokens, wish,
            begin=_prompt_length(job.node) if job.begin is None else job.begin,
            start=partial(self.shelf.get, key_of(job.node)), keep=partial(self._keep, (job.node, job.sample)),
        )  # fmt: skip

    def _keep(self, key: Key, text: Text) -> None:
        """Holds a child that may be continued; answers that have ended seldom are."""
        if text.tokens[-1] in self._ends:
            self.shelf.engine.release([text])
        else:
            self.shelf.put(key, text)
            self._seen.add(key)

    def _wish(
        self, max_tokens: int, stop: tuple[str, ...], given: Mapping[str, Any], best: int
    ) -> SamplingParams | str:
        key = (max_tokens, stop, repr(sorted(given.items())), best)
        if key not in self._wishes:
            if len(self._wishes) > 1000:
                self._wishes.clear()
            own = {"max_tokens": max_tokens, "min_tokens": min(self.sampling.min_tokens, max_tokens)}
            try:
                wish = self.sampling.updated({**own, **given})
                last: dict[str, Any] = {"stop": (*wish.stop, *stop), "n": 1, "prompt_logprobs": None}
                last |= {"logprobs": best, "logprobs_mode": "raw"} if best else {"logprobs": None}
                self._wishes[key] = replace(wish, **last)
            except ValueError as error:
                self._wishes[key] = f"the search's sampling parameters cannot be used: {error}"
        return self._wishes[key]

    def _drawn(self, job: Job, completion: Completion) -> Drawn | str:
        if completion.finish == "error":
            return completion.error or "the model gave nothing"
        end: End = completion.finish
        text = self._text(job.node, completion.tokens)
        if isinstance(completion.stop, str):
            if completion.stop in job.stop:
                end = "step"
            elif not self.sampling.include_stop_str_in_output:
                text = text[: text.find(completion.stop)]
        best = tuple(tuple(logprob for _, logprob in row if logprob > -math.inf) for row in completion.best)
        return Drawn(completion.tokens, text, completion.logprobs, end, best)

    # Scoring

    def rank(self, nodes: Sequence[Node], best: int) -> list[tuple[Sequence[int], Sequence[float]] | str]:
        engine, weights = self._ready(max(_length(node) for node in nodes) + 1)
        size = self.sampler.model.config.vocab_size
        wishes = pack([SamplingParams()], vocab_size=size, eos_ids=())

        def work(part: Sequence[Node]) -> list[Any]:
            texts = self._held(engine, weights, part)
            distinct = list({id(text): text for text in texts}.values())
            rows = jax.tree.map(lambda x: np.repeat(x, bucket(len(distinct)), axis=0), wishes)
            limits = [len(text.tokens) + 1 for text in distinct]
            found = engine.rank(weights, distinct, rows, limits, best=min(bucket(best), size))
            at = {id(text): i for i, text in enumerate(distinct)}
            return [(found.tokens[at[id(t)], :best].tolist(), found.logprobs[at[id(t)], :best].tolist()) for t in texts]

        return self.shelf.in_parts(nodes, work, key_of)

    def likelihood(self, nodes: Sequence[Node], texts: Sequence[Sequence[int]]) -> list[Sequence[float] | str]:
        pairs = [(node, list(tokens)) for node, tokens in zip(nodes, texts, strict=True)]
        longest = max(_length(node) + len(tokens) for node, tokens in pairs)
        if longest > self.sampler.context:
            return [
                f"a text of {longest} tokens is longer than the model's context of {self.sampler.context}"
            ] * len(pairs)  # fmt: skip
        engine, weights = self._ready(longest)

        def work(part: Sequence[tuple[Node, list[int]]]) -> list[list[float]]:
            held = [engine.fork(text) for text in self._held(engine, weights, [node for node, _ in part])]
            try:
                found = engine.append_scored(weights, held, [tokens for _, tokens in part], heat=[1.0] * len(held))
                return [scores.logprobs.tolist() for scores in found]
            finally:
                engine.release(held)

        return self.shelf.in_parts(pairs, work, lambda pair: key_of(pair[0]))

    # Pages

    def forget(self, nodes: Sequence[Node]) -> None:
        keys = [key_of(node) for node in nodes]
        self.shelf.drop(keys)
        self._seen.difference_update(keys)

    def _ready(self, longest: int) -> tuple[Engine, Weights]:
        """The engine; where it has to grow, it does so for long, as the texts held are lost."""
        longest = min(power(longest, 256), self.sampler.context)
        engine, weights = self.sampler.ready(self.params, longest, rows=self.sampler.rows)
        self.shelf.use(engine)
        return engine, weights

    def _held(self, engine: Engine, weights: Weights, nodes: Sequence[Node]) -> list[Text]:
        """Their texts.

        Raises:
            OutOfPages: the cache does not hold them all.
        """
        self._hold(engine, weights, nodes)
        texts = [self.shelf.get(key_of(node)) for node in nodes]
        if missing := [node for node, text in zip(nodes, texts, strict=True) if text is None]:
            raise OutOfPages(f"there is no room for {len(missing)} of {len(nodes)} texts")
        return [text for text in texts if text is not None]

    def _hold(self, engine: Engine, weights: Weights, nodes: Iterable[Node]) -> None:
        """Reads what nodes' texts lack, each from the nearest node above that has one; as far as there is room."""
        missing = [node for node in dict.fromkeys(nodes) if self.shelf.get(key_of(node)) is None]
        roots = [self._above(node)[1][-1] for node in missing if self._above(node)[0] is None]
        fresh = list(dict.fromkeys(roots))
        self.shelf.in_parts(fresh, partial(self._admit, engine, weights), key_of)
        rest = [node for node in missing if node not in set(fresh)]
        self.shelf.in_parts(rest, partial(self._continue, engine, weights), key_of)

    def _above(self, node: Node) -> tuple[Text | None, list[Node]]:
        """The nearest text at or above a node, and the nodes below that, lowest first."""
        below: list[Node] = []
        for above in node.lineage():
            if (text := self.shelf.get(key_of(above))) is not None:
                return text, below
            below.append(above)
        return None, below

    def _admit(self, engine: Engine, weights: Weights, roots: Sequence[Node]) -> Sequence[Node]:
        for root, text in zip(roots, engine.admit(weights, [root.tokens for root in roots]), strict=True):
            self.shelf.put(key_of(root), text)
            self._count([root])
        return roots

    def _continue(self, engine: Engine, weights: Weights, nodes: Sequence[Node]) -> Sequence[Node]:
        texts, pieces, below = [], [], []
        for node in nodes:
            above, lacking = self._above(node)
            text = engine.fork(above) if above is not None else Text([], _prompt_length(node))
            tokens = [token for piece in reversed(lacking) for token in piece.tokens]
            if above is not None and above.ranked == len(above.tokens) and tokens:
                engine.push(text, tokens.pop(0))  # `rank` has stored what stands before it.
                lacking = lacking[:-1] if len(lacking[-1].tokens) == 1 else lacking
            texts.append(text)
            pieces.append(tokens)
            below.append(lacking)
        try:
            engine.append(weights, texts, pieces)
        except BaseException:
            engine.release(texts)
            raise
        for node, text, lacking in zip(nodes, texts, below, strict=True):
            self.shelf.put(key_of(node), text)
            self._count(lacking)
        return nodes

    def _count(self, pieces: Iterable[Node]) -> None:
        for node in pieces:
            if node.logprobs or key_of(node) in self._seen:
                self.shelf.traffic.again += len(node.tokens)
            else:
                self.shelf.traffic.read += len(node.tokens)
            self._seen.add(key_of(node))


def _length(node: Node) -> int:
    return sum(len(above.tokens) for above in node.lineage())


def _prompt_length(node: Node) -> int:
    *_, root = node.lineage()
    return len(root.tokens)
