"""Runs searches of many prompts side by side: each round answers what all of them ask, in one batch a kind.

A prompt's result is a function of (seed, its number, its budget): not of the prompts beside it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxpost.search.contract import (
    Candidate,
    Case,
    Drawn,
    Found,
    Job,
    Method,
    Policy,
    Search,
    SearchError,
    SearchOutput,
    Verdict,
    Verifier,
)
from jaxpost.search.requests import Ask, Draw, Likelihood, Push, Rank, Request, Score, Together, Write
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
            run.round()
            for place, output in run.take_ended():
                done += 1
                yield place, output
            if progress is not None:
                progress(Progress(done, count, len(run.live), run.generated, run.verified))
    finally:
        run.close()


@dataclass(eq=False)
class _Live:
    """One prompt's search and what it waits for."""

    place: int
    problem: Problem
    search: Search
    request: Request | None = None
    queue: list[_Wish] = field(default_factory=list)
    """Children of a `Draw` that are still to be drawn."""
    drawn: list[list[Node]] = field(default_factory=list)


class _Wish(NamedTuple):
    """One child of a `Draw`: of which of its nodes, and the child's number."""

    at: int
    number: int


@dataclass
class _Run:
    policy: Policy
    verifiers: Mapping[str, Verifier]
    live: list[_Live] = field(default_factory=list)
    ended: list[tuple[int, SearchOutput]] = field(default_factory=list)
    generated: int = 0
    verified: int = 0

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
            live = _Live(place, problem, method(problem))
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

    def round(self) -> None:
        """Answers what every live search asks."""
        by_kind: dict[Any, list[_Live]] = defaultdict(list)
        for live in self.live:
            by_kind[_kind(live.request)].append(live)
        for kind, some in by_kind.items():
            answer: Callable[[list[_Live]], None] = {
                Draw: self._draw, Rank: self._rank, Likelihood: self._likelihood, Score: self._score,
                Together: self._together,
            }[kind[0]]  # fmt: skip
            answer(some)

    # Every prompt by itself.

    def _send(self, live: _Live, value: Any) -> None:
        """Goes on with a search until it asks for something that is worth a batch."""
        self._advance(live, lambda: live.search.send(value))

    def _fail(self, live: _Live, sentence: str) -> None:
        self._advance(live, lambda: live.search.throw(SearchError(sentence)))

    def _advance(self, live: _Live, step: Callable[[], Request]) -> None:
        try:
            while True:
                request = live.request = step()
                if isinstance(request, Draw):
                    self._plan(live, request)
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
                    problem.ledger.verified += len(tokens)
                    self.verified += len(tokens)
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

    def _end(self, live: _Live, found: Found, error: str | None) -> None:
        problem = live.problem
        self.live.remove(live)
        answers = tuple(
            c if c.canonical is not None else c._replace(canonical=problem.canonical(c.text)) for c in found.candidates
        )
        ledger = problem.ledger
        if error is None and not any(c.node is None or c.node.complete for c in answers) and ledger.refused:
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
        self.policy.forget(nodes)
        for verifier in self.verifiers.values():
            verifier.forget(nodes)

    def _free_pruned(self, some: Sequence[_Live]) -> None:
        dropped = [node for live in some for node in live.problem.dropped]
        if dropped:
            self.policy.forget(dropped)
            for verifier in self.verifiers.values():
                verifier.forget(dropped)
            for live in some:
                live.problem.dropped.clear()

    # Many prompts in one call.

    def _plan(self, live: _Live, request: Draw) -> None:
        counts = [request.n] * len(request.nodes) if isinstance(request.n, int) else list(request.n)
        live.drawn = [[] for _ in request.nodes]
        wishes = [at for at, count in zip(range(len(counts)), counts, strict=True) for _ in range(count)]
        first = live.problem.nodes
        live.queue = [_Wish(at, first + i) for i, at in enumerate(wishes)]
        live.problem.nodes += len(wishes)

    def _draw(self, some: list[_Live]) -> None:
        self._free_pruned(some)
        jobs: list[tuple[_Live, _Wish, Job]] = []
        for live in some:
            jobs += [(live, *pair) for pair in self._affordable(live)]
        results = self.policy.draw([job for *_, job in jobs]) if jobs else []
        faults: dict[int, str] = {}
        for (live, wish, job), result in zip(jobs, results, strict=True):
            if isinstance(result, str):
                faults.setdefault(live.place, result)
            else:
                self._take(live, wish, job, result)
        for live in some:
            if live.place in faults:
                self._fail(live, faults[live.place])
            elif not live.queue:
                self._send(live, live.drawn)

    def _take(self, live: _Live, wish: _Wish, job: Job, drawn: Drawn) -> None:
        request = live.request
        assert isinstance(request, Draw)
        node = Node(wish.number, job.node, drawn.tokens, drawn.text, drawn.logprobs, drawn.end, note=request.note)
        job.node.children.append(node)
        live.drawn[wish.at].append(node)
        self._charge(live.problem, len(drawn.tokens), verifier=request.verifier)

    def _charge(self, problem: Problem, tokens: int, *, verifier: bool) -> None:
        if verifier:
            problem.ledger.verified += tokens
            self.verified += tokens
        else:
            problem.ledger.generated += tokens
            self.generated += tokens

    def _affordable(self, live: _Live) -> Iterator[tuple[_Wish, Job]]:
        """As many of the wanted children as the budget pays at their longest; the last one shorter, if need be.

        What shorter ones leave over pays for others in the next round.
        """
        request, problem = live.request, live.problem
        assert isinstance(request, Draw)
        left = problem.ledger.left
        if request.scored:
            left -= sum(self._price(problem, child, 0) for children in live.drawn for child in children)
        launched = 0
        while live.queue:
            wish, size = live.queue[0], request.max_tokens
            node = request.nodes[wish.at]
            cost = size + (self._price(problem, node, size) if request.scored else 0)
            if cost > left and launched:
                return
            if cost > left:
                size = self._fitting(problem, node, left, size, request.scored)
                if size < 1:
                    problem.ledger.refused += len(live.queue)
                    live.queue.clear()
                    return
                problem.ledger.refused += 1
                cost = left
            launched += 1
            left -= cost
            live.queue.pop(0)
            yield wish, Job(node, size, request.stop, request.sampling, problem.number, wish.number)

    def _fitting(self, problem: Problem, node: Node, left: float, most: int, scored: bool) -> int:
        """The most tokens that `left` pays, with their verdict."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            cost = middle + (self._price(problem, node, middle) if scored else 0)
            low, high = (middle, high) if cost <= left else (low, middle - 1)
        return low

    def _price(self, problem: Problem, node: Node, new_tokens: int) -> int:
        verifier = self.verifiers.get("verifier")
        return 0 if verifier is None else verifier.price(Case(problem, node), new_tokens)

    def _rank(self, some: list[_Live]) -> None:
        self._free_pruned(some)
        asked: list[tuple[_Live, list[Node]]] = []
        for live in some:
            request = live.request
            assert isinstance(request, Rank)
            fits = list(request.nodes)[: int(min(live.problem.ledger.left, len(request.nodes)))]
            live.problem.ledger.refused += len(request.nodes) - len(fits)
            self._charge(live.problem, len(fits), verifier=False)
            asked.append((live, fits))
        best = max(live.request.best for live in some if isinstance(live.request, Rank))
        nodes = [node for _, fits in asked for node in fits]
        found = iter(self.policy.rank(nodes, best) if nodes else [])
        for live, fits in asked:
            request = live.request
            assert isinstance(request, Rank)
            got = [next(found) for _ in fits]
            if fault := next((x for x in got if isinstance(x, str)), None):
                self._fail(live, fault)
                continue
            cut = [(list(x[0])[: request.best], list(x[1])[: request.best]) for x in got if not isinstance(x, str)]
            self._send(live, cut + [((), ())] * (len(request.nodes) - len(fits)))

    def _likelihood(self, some: list[_Live]) -> None:
        self._free_pruned(some)
        asked: list[tuple[_Live, list[Node], list[tuple[int, ...]]]] = []
        for live in some:
            request, ledger = live.request, live.problem.ledger
            assert isinstance(request, Likelihood)
            nodes: list[Node] = []
            texts: list[tuple[int, ...]] = []
            for node, text in zip(request.nodes, request.texts, strict=True):
                tokens = self.policy.encode(text)
                if len(tokens) > ledger.left:
                    ledger.refused += len(request.nodes) - len(nodes)
                    break
                nodes.append(node)
                texts.append(tokens)
                self._charge(live.problem, len(tokens), verifier=True)
            asked.append((live, nodes, texts))
        flat = [n for _, nodes, _ in asked for n in nodes], [t for *_, texts in asked for t in texts]
        found = iter(self.policy.likelihood(*flat) if flat[0] else [])
        for live, nodes, _ in asked:
            got = [next(found) for _ in nodes]
            assert isinstance(live.request, Likelihood)
            if fault := next((x for x in got if isinstance(x, str)), None):
                self._fail(live, fault)
            else:
                self._send(live, got + [()] * (len(live.request.nodes) - len(nodes)))

    def _score(self, some: list[_Live]) -> None:
        self._free_pruned(some)
        by_name: dict[str, list[_Live]] = defaultdict(list)
        for live in some:
            assert isinstance(live.request, Score)
            by_name[live.request.verifier].append(live)
        for name, group in by_name.items():
            if name not in self.verifiers:
                for live in group:
                    self._fail(live, f"this method needs a verifier named {name!r}, and none was given")
                continue
            self._judge(self.verifiers[name], name, group)

    def _judge(self, verifier: Verifier, name: str, group: list[_Live]) -> None:
        asked: list[tuple[_Live, list[Node]]] = []
        for live in group:
            request, left = live.request, live.problem.ledger.left
            assert isinstance(request, Score)
            fits: list[Node] = []
            for node in request.nodes:
                left -= verifier.price(Case(live.problem, node), 0)
                if left < 0:
                    live.problem.ledger.refused += len(request.nodes) - len(fits)
                    break
                fits.append(node)
            asked.append((live, fits))
        cases = [Case(live.problem, node) for live, fits in asked for node in fits]
        verdicts = list(verifier(cases)) if cases else []
        short = len(verdicts) != len(cases)
        found = iter(verdicts)
        for live, fits in asked:
            if short:
                self._fail(live, f"the verifier {name!r} gave {len(verdicts)} verdicts on {len(cases)} texts")
                continue
            got = [next(found) for _ in fits]
            self._send_scores(live, name, fits, got)

    def _send_scores(self, live: _Live, name: str, nodes: list[Node], got: Sequence[Verdict | str]) -> None:
        assert isinstance(live.request, Score)
        for node, verdict in zip(nodes, got, strict=True):
            if isinstance(verdict, str) or math.isnan(verdict.score):
                why = verdict if isinstance(verdict, str) else "it said NaN"
                self._fail(live, f"the verifier {name!r} failed on node {node.number}: {why}")
                return
            self._charge(live.problem, verdict.tokens, verifier=True)
            node.score, node.steps = float(verdict.score), tuple(verdict.steps)
            if verdict.parts:
                node.facts[name] = dict(verdict.parts)
        self._send(live, [node.score for node in nodes] + [math.nan] * (len(live.request.nodes) - len(nodes)))

    def _together(self, some: list[_Live]) -> None:
        requests = [live.request for live in some]
        function = next(r.function for r in requests if isinstance(r, Together))
        results = function([r.argument for r in requests if isinstance(r, Together)])
        for live, result in zip(some, results, strict=True):
            self._send(live, result)


def _kind(request: Request | None) -> tuple[Any, ...]:
    return (type(request), request.function) if isinstance(request, Together) else (type(request),)


def _salvage(problem: Problem) -> Found:
    """What had ended when a search failed."""
    ended = [node for node in problem.root.walk() if node.complete]
    return Found(tuple(Candidate(node.answer, node.score, node) for node in ended))
