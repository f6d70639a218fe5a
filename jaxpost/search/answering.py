"""Answers to what searches ask, of many prompts in one call a kind; budgets are kept here."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxpost.search.contract import Case, Drawn, Job, Policy, Search, Verdict, Verifier, opening
from jaxpost.search.requests import Draw, Likelihood, Rank, Request, Score, Together
from jaxpost.search.tree import Node, Problem


class _Wish(NamedTuple):
    """One child of a `Draw`: of which of its nodes, and the child's number."""

    at: int
    number: int


@dataclass(eq=False)
class Live:
    """One prompt's search and what it waits for."""

    place: int
    problem: Problem
    search: Search
    request: Request | None = None
    queue: deque[_Wish] = field(default_factory=deque)
    """Children of a `Draw` that are still to be drawn."""
    drawn: list[list[Node]] = field(default_factory=list)
    whole: set[Node] = field(default_factory=set)
    """Answers that were cut by the method's own limit of tokens, not by the budget."""

    def plan(self, request: Draw) -> None:
        """Queues a `Draw`'s children, numbered in order."""
        counts = [request.n] * len(request.nodes) if isinstance(request.n, int) else list(request.n)
        self.drawn = [[] for _ in request.nodes]
        wishes = [at for at, count in zip(range(len(counts)), counts, strict=True) for _ in range(count)]
        first = self.problem.nodes
        self.queue = deque(_Wish(at, first + i) for i, at in enumerate(wishes))
        self.problem.nodes += len(wishes)


@dataclass
class Answers:
    """Answers requests.

    Attributes:
        send, fail: go on with a search: what it asked for, or why it cannot be had.
        generated, verified: tokens of all prompts so far.
    """

    policy: Policy
    verifiers: Mapping[str, Verifier]
    send: Callable[[Live, Any], None]
    fail: Callable[[Live, str], None]
    generated: int = 0
    verified: int = 0

    def __call__(self, live: Sequence[Live]) -> None:
        """Answers what every live search asks."""
        by_kind: dict[Any, list[Live]] = defaultdict(list)
        for one in live:
            by_kind[_kind(one.request)].append(one)
        for kind, some in by_kind.items():
            self._free_pruned(some)
            answer: Callable[[list[Live]], None] = {
                Draw: self._draw, Rank: self._rank, Likelihood: self._likelihood, Score: self._score,
                Together: self._together,
            }[kind[0]]  # fmt: skip
            answer(some)

    def charge(self, problem: Problem, tokens: int, *, verifier: bool) -> None:
        """Writes tokens into a prompt's ledger."""
        if verifier:
            problem.ledger.verified += tokens
            self.verified += tokens
        else:
            problem.ledger.generated += tokens
            self.generated += tokens

    def forget(self, nodes: Sequence[Node]) -> None:
        """Gives back what is held for nodes."""
        self.policy.forget(nodes)
        for verifier in self.verifiers.values():
            verifier.forget(nodes)

    def _free_pruned(self, some: Sequence[Live]) -> None:
        if dropped := [node for live in some for node in live.problem.dropped]:
            self.forget(dropped)
            for live in some:
                live.problem.dropped.clear()

    def _draw(self, some: list[Live]) -> None:
        jobs: list[tuple[Live, _Wish, Job]] = []
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
                live.queue.clear()
                self.fail(live, faults[live.place])
            elif not live.queue:
                self.send(live, live.drawn)

    def _take(self, live: Live, wish: _Wish, job: Job, drawn: Drawn) -> None:
        request = live.request
        assert isinstance(request, Draw)
        node = Node(
            wish.number, job.node, drawn.tokens, drawn.text, drawn.logprobs, drawn.end, note=request.note,
            best=drawn.best,
        )  # fmt: skip
        job.node.children.append(node)
        live.drawn[wish.at].append(node)
        if node.end == "length" and not request.stop and job.max_tokens == request.max_tokens:
            live.whole.add(node)
        self.charge(live.problem, len(drawn.tokens), verifier=request.verifier)

    def _affordable(self, live: Live) -> Iterator[tuple[_Wish, Job]]:
        """As many of the wanted children as the budget pays at their longest; the last one shorter, if need be.

        What shorter ones leave over pays for others in the next round.
        """
        request, problem = live.request, live.problem
        assert isinstance(request, Draw)
        left = problem.ledger.left
        if request.scored and problem.ledger.limit is not None:
            left -= self._opening(problem)
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
            live.queue.popleft()
            names = problem.number, wish.number
            yield wish, Job(node, size, request.stop, request.sampling, *names, request.top_logprobs)

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
        if verifier is None or problem.ledger.limit is None:
            return 0
        return verifier.price(Case(problem, node), new_tokens)

    def _opening(self, problem: Problem) -> int:
        verifier = self.verifiers.get("verifier")
        return 0 if verifier is None else opening(verifier, problem)

    def _rank(self, some: list[Live]) -> None:
        asked: list[tuple[Live, list[Node]]] = []
        for live in some:
            request = live.request
            assert isinstance(request, Rank)
            fits = list(request.nodes)[: int(min(live.problem.ledger.left, len(request.nodes)))]
            live.problem.ledger.refused += len(request.nodes) - len(fits)
            self.charge(live.problem, len(fits), verifier=False)
            asked.append((live, fits))
        best = max(live.request.best for live in some if isinstance(live.request, Rank))
        nodes = [node for _, fits in asked for node in fits]
        found = iter(self.policy.rank(nodes, best) if nodes else [])
        for live, fits in asked:
            request = live.request
            assert isinstance(request, Rank)
            got = [next(found) for _ in fits]
            if fault := next((x for x in got if isinstance(x, str)), None):
                self.fail(live, fault)
                continue
            cut = [(list(x[0])[: request.best], list(x[1])[: request.best]) for x in got if not isinstance(x, str)]
            self.send(live, cut + [((), ())] * (len(request.nodes) - len(fits)))

    def _likelihood(self, some: list[Live]) -> None:
        asked: list[tuple[Live, list[Node], list[tuple[int, ...]]]] = []
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
                self.charge(live.problem, len(tokens), verifier=True)
            asked.append((live, nodes, texts))
        flat = [n for _, nodes, _ in asked for n in nodes], [t for *_, texts in asked for t in texts]
        found = iter(self.policy.likelihood(*flat) if flat[0] else [])
        for live, nodes, _ in asked:
            got = [next(found) for _ in nodes]
            assert isinstance(live.request, Likelihood)
            if fault := next((x for x in got if isinstance(x, str)), None):
                self.fail(live, fault)
            else:
                self.send(live, got + [()] * (len(live.request.nodes) - len(nodes)))

    def _score(self, some: list[Live]) -> None:
        by_name: dict[str, list[Live]] = defaultdict(list)
        for live in some:
            assert isinstance(live.request, Score)
            by_name[live.request.verifier].append(live)
        for name, group in by_name.items():
            if name not in self.verifiers:
                for live in group:
                    self.fail(live, f"this method needs a verifier named {name!r}, and none was given")
                continue
            self._judge(self.verifiers[name], name, group)

    def _judge(self, verifier: Verifier, name: str, group: list[Live]) -> None:
        asked: list[tuple[Live, list[Node]]] = []
        for live in group:
            request, left = live.request, live.problem.ledger.left
            assert isinstance(request, Score)
            fits: list[Node] = []
            limited = live.problem.ledger.limit is not None
            left -= opening(verifier, live.problem) if limited and request.nodes else 0
            for node in request.nodes:
                left -= verifier.price(Case(live.problem, node), 0) if limited else 0
                if left < 0:
                    live.problem.ledger.refused += len(request.nodes) - len(fits)
                    break
                fits.append(node)
            asked.append((live, fits))
        cases = [[Case(live.problem, node) for node in fits] for live, fits in asked]
        together = verdicts_of(verifier, [case for some in cases for case in some])
        found = iter([] if isinstance(together, str) else together)
        for (live, fits), some in zip(asked, cases, strict=True):
            # Where it failed on all of them together, each prompt is judged by itself, so that the others go on.
            alone = isinstance(together, str) and len(asked) > 1
            got = verdicts_of(verifier, some) if alone else together
            if isinstance(got, str):
                self.fail(live, f"the verifier {name!r} {got}")
            else:
                self._send_scores(live, name, fits, got if alone else [next(found) for _ in fits])

    def _send_scores(self, live: Live, name: str, nodes: list[Node], got: Sequence[Verdict | str]) -> None:
        assert isinstance(live.request, Score)
        faults = [
            f"the verifier {name!r} failed on node {node.number}: {why}"
            for node, verdict in zip(nodes, got, strict=True)
            if (why := _fault(verdict))
        ]
        if faults and (len(faults) == len(nodes) or any(not isinstance(v, str) and _fault(v) for v in got)):
            self.fail(live, faults[0])
            return
        for node, verdict in zip(nodes, got, strict=True):
            if isinstance(verdict, str):
                continue  # Its score stays NaN, and methods take such texts last.
            self.charge(live.problem, verdict.tokens, verifier=True)
            if live.problem.ledger.left < 0:
                live.problem.warn(f"the verifier {name!r} costs more than its price, so that the budget was exceeded")
            node.score, node.steps = float(verdict.score), tuple(verdict.steps)
            if verdict.parts:
                node.facts[name] = dict(verdict.parts)
        for fault in faults:
            live.problem.warn(fault)
        self.send(live, [node.score for node in nodes] + [math.nan] * (len(live.request.nodes) - len(nodes)))

    def _together(self, some: list[Live]) -> None:
        requests = [live.request for live in some]
        function = next(r.function for r in requests if isinstance(r, Together))
        results = function([r.argument for r in requests if isinstance(r, Together)])
        for live, result in zip(some, results, strict=True):
            self.send(live, result)


def verdicts_of(verifier: Verifier, cases: Sequence[Case]) -> list[Verdict | str] | str:
    """What a verifier says of cases, plain numbers as verdicts; a sentence where it raises or miscounts."""
    if not cases:
        return []
    try:
        found = list(verifier(cases))
    except Exception as error:  # a verifier is anybody's code, and the other prompts go on
        return f"raised {type(error).__name__}: {error}"
    if len(found) != len(cases):
        return f"gave {len(found)} verdicts on {len(cases)} texts"
    return [_verdict(verdict) for verdict in found]


def _verdict(said: Any) -> Verdict | str:
    if isinstance(said, Verdict | str):
        return said
    try:
        return Verdict(float(said))
    except (TypeError, ValueError):
        return f"it gave a {type(said).__name__}, which is no verdict"


def _fault(verdict: Verdict | str) -> str:
    """Why a verdict cannot be used; "" where it can."""
    if isinstance(verdict, str):
        return verdict
    bad = next((x for x in (verdict.score, *verdict.steps) if not math.isfinite(x)), 0.0)
    return "" if math.isfinite(bad) else f"it said {'NaN' if math.isnan(bad) else bad}"


def _kind(request: Request | None) -> tuple[Any, ...]:
    return (type(request), request.function) if isinstance(request, Together) else (type(request),)
