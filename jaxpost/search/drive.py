"""Runs searches of many prompts side by side: each round answers what all of them ask, in one batch a kind.

A prompt's result is a function of (seed, its number, its budget): not of the prompts beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxpost.search.answering import Answers, Live
from jaxpost.search.contract import (
    Candidate,
    Found,
    Method,
    Policy,
    SearchError,
    SearchOutput,
    Verifier,
)
from jaxpost.search.requests import Ask, Draw, Push, Request, Write
from jaxpost.search.tree import Ledger, Node, Problem


class Progress(NamedTuple):
    """Said after every round."""

    done: int
    prompts: int
    live: int
    generated: int
    verified: int


def search(
    prompts: Sequence[Any],
    method: Method | Sequence[Method],
    policy: Policy,
    *,
    budget: int | Sequence[int | None] | None = None,
    verifiers: Mapping[str, Verifier] | None = None,
    canonical: Callable[[str], str | None] = str.strip,
    numbers: Sequence[int] | None = None,
    together: int = 16,
    progress: Callable[[Progress], None] | None = None,
) -> list[SearchOutput]:
    """Searches every prompt; results in order. Arguments as `stream`."""
    known: dict[str, Any] = {"budget": budget, "verifiers": verifiers, "canonical": canonical, "numbers": numbers}
    found = stream(prompts, method, policy, together=together, progress=progress, **known)
    return [output for _, output in sorted(found, key=lambda pair: pair[0])]


def stream(
    prompts: Sequence[Any],
    method: Method | Sequence[Method],
    policy: Policy,
    *,
    budget: int | Sequence[int | None] | None = None,
    verifiers: Mapping[str, Verifier] | None = None,
    canonical: Callable[[str], str | None] = str.strip,
    numbers: Sequence[int] | None = None,
    together: int = 16,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[tuple[int, SearchOutput]]:
    """Searches prompts: (place, result) as they end.

    Args:
        prompts: texts or messages.
        method: one for all, or one a prompt.
        policy: the model that is searched; it holds the seed of its noise.
        budget: most generated + verifier tokens of each prompt; None: no limit.
        verifiers: by name; `Score` asks "verifier" unless it names another.
        canonical: the answer that a text gives, as votes compare it.
        numbers: identity of each prompt in the noise; its place if not given.
        together: most prompts at one time.

    Raises:
        ValueError: numbers of methods, budgets or identities that differ from the number of prompts.
    """
    count = len(prompts)
    methods: list[Method] = list(method) if isinstance(method, Sequence) else [method] * count
    limits = list(budget) if isinstance(budget, Sequence) else [budget] * count
    names = list(range(count)) if numbers is None else list(numbers)
    if not len(methods) == len(limits) == len(names) == count:
        raise ValueError(
            f"{count} prompts with {len(methods)} methods, {len(limits)} budgets and {len(names)} numbers: give one "
            "for all, or one a prompt"
        )
    run = _Run(policy, verifiers or {})
    waiting, done = iter(range(count)), 0
    try:
        while True:
            new = [i for _, i in zip(range(max(0, together - len(run.live))), waiting, strict=False)]
            run.start(new, [prompts[i] for i in new], [methods[i] for i in new], [limits[i] for i in new],
                      [names[i] for i in new], canonical)  # fmt: skip
            if not run.live and not run.ended:
                return
            run.answers(run.live)
            for place, output in run.take_ended():
                done += 1
                yield place, output
            if progress is not None:
                progress(Progress(done, count, len(run.live), run.answers.generated, run.answers.verified))
    finally:
        run.close()


@dataclass
class _Run:
    policy: Policy
    verifiers: Mapping[str, Verifier]
    live: list[Live] = field(default_factory=list)
    ended: list[tuple[int, SearchOutput]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = Answers(self.policy, self.verifiers, self._send, self._fail)

    def start(
        self, places: Sequence[int], prompts: Sequence[Any], methods: Sequence[Method],
        limits: Sequence[int | None], numbers: Sequence[int], canonical: Callable[[str], str | None],
    ) -> None:  # fmt: skip
        if not places:
            return
        read = self.policy.read(prompts)
        for place, prompt, method, limit, number, tokens in zip(
            places, prompts, methods, limits, numbers, read, strict=True
        ):
            root = Node(0, None, () if isinstance(tokens, str) else tokens, "")
            problem = Problem(number, prompt, root, Ledger(limit), canonical)
            problem.ledger.read += len(root.tokens)
            live = Live(place, problem, method(problem))
            self.live.append(live)
            if isinstance(tokens, str):
                self._end(live, Found(()), tokens)
            else:
                self._send(live, None)

    def take_ended(self) -> list[tuple[int, SearchOutput]]:
        out, self.ended = self.ended, []
        return out

    def close(self) -> None:
        for live in list(self.live):
            live.search.close()
            self._forget(live.problem)

    # Every prompt by itself.

    def _send(self, live: Live, value: Any) -> None:
        """Goes on with a search until it asks for something that is worth a batch."""
        self._advance(live, lambda: live.search.send(value))

    def _fail(self, live: Live, sentence: str) -> None:
        self._advance(live, lambda: live.search.throw(SearchError(sentence)))

    def _advance(self, live: Live, step: Callable[[], Request]) -> None:
        try:
            while True:
                request = live.request = step()
                if isinstance(request, Draw):
                    live.plan(request)
                    return
                if not isinstance(request, Ask | Write | Push):
                    return
                value = self._at_once(live.problem, request)
                step = lambda value=value: live.search.send(value)  # noqa: E731
        except StopIteration as stop:
            self._end(live, stop.value, None)
        except SearchError as error:
            self._end(live, _salvage(live.problem), str(error))

    def _at_once(self, problem: Problem, request: Ask | Write | Push) -> list[Node]:
        if isinstance(request, Ask):
            out = []
            for prompt, tokens in zip(request.prompts, self.policy.read(request.prompts), strict=True):
                if isinstance(tokens, str):
                    raise SearchError(f"a prompt that the search wrote cannot be read: {tokens}")
                if not request.verifier:
                    problem.ledger.read += len(tokens)
                elif len(tokens) > problem.ledger.left:
                    problem.ledger.refused += 1
                    continue
                else:
                    self.answers.charge(problem, len(tokens), verifier=True)
                out.append(problem.child(None, tokens, "", note=request.note, facts={"prompt": prompt}))
            return out
        if isinstance(request, Write):
            out = []
            for node, text in zip(request.nodes, request.texts, strict=True):
                tokens = self.policy.encode(text)
                problem.ledger.read += len(tokens)
                out.append(problem.child(node, tokens, text, note=request.note))
            return out
        out = []
        for node, token, logprob in zip(request.nodes, request.tokens, request.logprobs, strict=True):
            text, ends = self.policy.piece(node, token)
            out.append(
                problem.child(node, [token], text, logprobs=(logprob,), prior=math.exp(logprob),
                              end="stop" if ends else "step")
            )  # fmt: skip
        return out

    def _end(self, live: Live, found: Found, error: str | None) -> None:
        problem = live.problem
        self.live.remove(live)
        answers = tuple(
            c if c.canonical is not None else c._replace(canonical=problem.canonical(c.text)) for c in found.candidates
        )
        ledger = problem.ledger
        whole = any(c.node is None or c.node.complete or c.node in live.whole for c in answers)
        if error is None and not whole and ledger.refused:
            error = (
                f"a budget of {ledger.limit} tokens is too small for one whole answer: {ledger.generated} generated "
                f"and {ledger.verified} verifier tokens were spent"
            )
        elif error is None and not answers:
            error = "the search found no answer: its tree holds nothing that ended"
        self.ended.append((live.place, SearchOutput(problem, answers, found.votes, error)))
        self._forget(problem)

    def _forget(self, problem: Problem) -> None:
        nodes = [node for root in (problem.root, *problem.asides) for node in root.walk()]
        self.answers.forget(nodes)


def _salvage(problem: Problem) -> Found:
    """What had ended when a search failed."""
    ended = [node for node in problem.root.walk() if node.complete]
    return Found(tuple(Candidate(node.answer, node.score, node) for node in ended))
