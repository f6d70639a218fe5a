"""Monte-Carlo tree search over steps (sentences): UCT and PUCT; values from a verifier, rollouts or agreement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from jaxpost.search.contract import Search
from jaxpost.search.pieces import Grow, chosen_first, count, draw_steps, ended, room
from jaxpost.search.requests import Draw, Request, Score
from jaxpost.search.stepwise import Steps, check_separator
from jaxpost.search.tree import Node, Problem

Rule = Literal["puct", "uct"]
Choose = Literal["visits", "value", "score"]
Expand = Callable[[Problem, Sequence[Node]], Grow]
"""New children for each of some nodes; they may stand several pieces below (a question, then its answer)."""
Evaluate = Callable[[Problem, Sequence[Node]], Generator[Request, Any, list[float]]]
"""A value for each of some nodes; NaN where the budget ended."""


def mcts(
    problem: Problem,
    *,
    simulations: int = 32,
    moves: int = 1,
    branch: int = 4,
    max_depth: int = 8,
    rule: Rule = "puct",
    exploration: float = 1.25,
    value: Literal["score", "rollout", "agreement"] = "score",
    rollouts: int = 2,
    rollout_temperature: float | None = None,
    leaves: int = 1,
    choose: Choose = "visits",
    separator: str = "\n",
    step_tokens: int = 64,
    answer_tokens: int = 256,
) -> Search:
    """Monte-Carlo tree search, one step of the answer an edge (UCT: Kocsis & Szepesvari 2006; PUCT as in 1712.01815).

    A simulation goes from the root to a leaf by the rule, expands the leaf if it was valued before (`branch` drawn
    steps, equal ones once) and goes to one of its children, values what it reached, and adds that value to the mean Q
    and the visits N of every node above. With s the parent of a, and N(s) the visits of its children:

        uct:   argmax_a  Q(a) + c sqrt(ln N(s) / N(a));  a child without visits first, the likeliest of them
        puct:  argmax_a  Q(a) + c P(a) sqrt(N(s)) / (1 + N(a));  Q(a) = Q(s) without visits;
               P = softmax over siblings of the mean log-probability of the step's tokens

    Value of a leaf: `score`, the verifier's (a process or outcome reward model, or a rule); `rollout`, the mean score
    of completions from it; `agreement`, without a verifier, for each completion the share of all completions so far
    that give its canonical answer, averaged. A whole answer is valued as itself, and is never expanded.

    With `leaves` > 1 so many simulations run at once, in one batch: what is waiting for its value counts as a visit
    with the lowest value seen yet (a virtual loss). After `simulations` the search commits to the root's best child
    and goes on from there, `moves` times, with the visits and values of its subtree kept; its siblings are pruned.
    Last, the best nodes are followed down; an unfinished answer there becomes the best of its completions, or is
    continued to its end where it has none.

    Args:
        simulations, moves: of each move, and moves; 1 is one search.
        branch, max_depth: steps that an expansion draws; steps of an answer in the tree.
        rule, exploration, value, rollouts, leaves: as above; c is in units of the values, rollouts are of each leaf.
        rollout_temperature: 0 is greedy (then one completion is enough), None the search's own.
        choose: the most visited node, that of the highest mean value, or (`score`) the way to the best whole answer.
        separator, step_tokens, answer_tokens: what ends a step; most tokens of a step and of a completion.
    """
    expand = partial(
        expand_steps, branch=branch, separator=separator, step_tokens=step_tokens, reserve=answer_tokens,
        scored=value == "score",
    )  # fmt: skip
    rolled = Rollouts(rollouts, answer_tokens, rollout_temperature, agreement=value == "agreement")
    evaluate: Evaluate = evaluate_score if value == "score" else rolled
    tree = TreeSearch(
        problem, expand, evaluate, rule=rule, exploration=exploration, leaves=leaves, max_depth=max_depth,
        choose=choose, again=value != "score", reserve=answer_tokens,
    )  # fmt: skip
    top = yield from tree.run(simulations=simulations, moves=moves)
    check_separator(problem, Steps(separator=separator, max_tokens=step_tokens))
    chosen = yield from finish(problem, tree.best_leaf(top), answer_tokens=answer_tokens, scored=value != "agreement")
    return chosen_first(chosen, ended(problem))


def expand_steps(problem: Problem, nodes: Sequence[Node], **steps: Any) -> Grow:
    """Drawn steps of each node, with their priors. Arguments as `draw_steps`."""
    grown = yield from draw_steps(problem, nodes, note="step", **steps)
    for children in grown:
        set_priors(children)
    return grown


def set_priors(children: Sequence[Node]) -> None:
    """P = softmax over siblings of the mean log-probability of their tokens; pieces that were given count 0."""
    if not children:
        return
    means = [math.fsum(c.logprobs) / max(1, len(c.logprobs)) for c in children]
    weights = [math.exp(mean - max(means)) for mean in means]
    for child, weight in zip(children, weights, strict=True):
        child.prior = weight / math.fsum(weights)


def evaluate_score(problem: Problem, nodes: Sequence[Node]) -> Generator[Request, Any, list[float]]:
    """What the verifier says of each node."""
    del problem
    scores = yield Score(nodes)
    return list(scores)


@dataclass
class Rollouts:
    """Values by completions: each is scored, or compared with all completions so far."""

    n: int
    answer_tokens: int
    temperature: float | None = None
    agreement: bool = False
    answers: Counter[str] = field(default_factory=Counter)

    def __call__(self, problem: Problem, nodes: Sequence[Node]) -> Generator[Request, Any, list[float]]:
        open_ = [node for node in nodes if not node.complete]
        sampling = {} if self.temperature is None else {"temperature": self.temperature}
        rolled: dict[Node, list[Node]] = {node: [node] for node in nodes if node.complete}
        if open_:
            drawn = yield Draw(
                open_, n=self.n, max_tokens=self.answer_tokens, scored=not self.agreement, sampling=sampling,
                note="rollout",
            )  # fmt: skip
            rolled |= dict(zip(open_, drawn, strict=True))
        every = [end for ends in rolled.values() for end in ends]
        if self.agreement:
            self._compare(problem, every)
        elif new := [end for end in every if math.isnan(end.score)]:
            yield Score(new)
        problem.prune([end for end in every if end.note == "rollout"])
        return [_mean([end.score for end in rolled[node]]) for node in nodes]

    def _compare(self, problem: Problem, ends: Sequence[Node]) -> None:
        said = {end: problem.canonical(end.answer) if end.complete else None for end in ends}
        self.answers.update(answer for answer in said.values() if answer is not None)
        total = self.answers.total()
        for end, answer in said.items():
            end.score = 0.0 if answer is None else self.answers[answer] / total


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def finish(problem: Problem, leaf: Node, *, answer_tokens: int, scored: bool) -> Generator[Request, Any, Node | None]:
    """The whole answer from a leaf on, the best completion that it has or a new one; None where the budget ended."""
    whole = [node for node in leaf.walk() if node.complete and not math.isnan(node.score)]
    if leaf.complete or whole:
        return leaf if leaf.complete else max(whole, key=lambda node: node.score)
    [drawn] = yield Draw([leaf], max_tokens=answer_tokens, scored=scored, note="answer")
    if drawn and scored:
        yield Score(drawn)
    return drawn[0] if drawn else None


class TreeSearch:
    """A tree, the rule that descends it, and what is waiting; works with any expansion and evaluation."""

    def __init__(
        self, problem: Problem, expand: Expand, evaluate: Evaluate, *, rule: Rule, exploration: float,
        leaves: int = 1, max_depth: int = 8, choose: Choose = "visits", again: bool = False, reserve: int = 0,
    ):  # fmt: skip
        """`again`: an unfinished leaf is valued anew whenever it is reached (rollouts differ, scores do not).

        Raises: ValueError for less than one leaf.
        """
        if leaves < 1:
            raise ValueError(f"leaves is {leaves}; at least 1 is valued at a time")
        self.problem, self.expand, self.evaluate = problem, expand, evaluate
        self.rule, self.exploration, self.leaves, self.max_depth = rule, exploration, leaves, max_depth
        self.choose, self.again, self.reserve = choose, again, reserve
        self.children: dict[Node, list[Node]] = {}
        """Of expanded nodes; may be empty (nothing could be drawn)."""
        self.level: dict[Node, int] = {problem.root: 0}
        self.values: dict[Node, float] = {}
        self.waiting: Counter[Node] = Counter()
        self.lowest, self.spent = 0.0, False

    def run(self, *, simulations: int, moves: int = 1) -> Generator[Request, Any, Node]:
        """Searches and commits, `moves` times: -> the node that was committed to, the root of `moves` = 1."""
        top = self.problem.root
        for move in range(max(1, moves)):
            done = 0
            while done < simulations and not self.spent:
                done += yield from self.simulate(top, min(self.leaves, simulations - done))
            if move + 1 == moves or self.terminal(top):
                break
            best = self.best(top)
            if best is None:
                break
            self.problem.prune([child for child in self.children[top] if child is not best])
            top.facts["committed"] = best.number
            top = best
        return top

    def terminal(self, node: Node) -> bool:
        """Never expanded: a whole answer, one at the depth's limit, or one that nothing follows."""
        return node.complete or self.level[node] >= self.max_depth or self.children.get(node) == []

    def simulate(self, top: Node, wanted: int) -> Generator[Request, Any, int]:
        """Up to so many simulations in one batch of each kind: -> how many were counted."""
        picked: list[Node] = []
        for _ in range(wanted):
            leaf = self.descend(top)
            if leaf in picked:
                break
            picked.append(leaf)
            self._wait(leaf, 1)
        growing = [leaf for leaf in picked if not self.terminal(leaf) and (leaf.visits or leaf is self.problem.root)]
        if growing:
            yield from self._grow(growing)
        reached = []
        for leaf in picked:
            child = self.select(leaf) if self.children.get(leaf) else leaf
            if child is not leaf:
                self.waiting[child] += 1
            reached.append(child)
        # Of the root itself nothing is asked: where nothing follows it, there is nothing to search.
        valued = list(dict.fromkeys(node for node in reached if node is not self.problem.root))
        refused = self.problem.ledger.refused
        yield from self._evaluate(valued)
        self.spent |= self.problem.ledger.refused > refused
        counted = 0
        for leaf, node in zip(picked, reached, strict=True):
            self._wait(leaf, -1)
            if node is not leaf:
                self.waiting[node] -= 1
            value = self.values.get(node, math.nan)
            if math.isnan(value) and (self.spent or node is self.problem.root):
                self.spent = True
                continue
            # What the verifier cannot judge is worth the least.
            self.lowest = min(self.lowest, self.lowest if math.isnan(value) else value)
            value = self.values[node] = self.lowest if math.isnan(value) else value
            node.back_up(value)
            counted += 1
        return counted

    def _grow(self, nodes: Sequence[Node]) -> Generator[Request, Any, None]:
        if room(self.problem, 1, self.reserve) < 1:
            self.spent = True
            self.problem.ledger.refused += len(nodes)
            return
        grown = yield from self.expand(self.problem, nodes)
        for node, children in zip(nodes, grown, strict=True):
            self.children[node] = list(children)
            self.level.update((child, self.level[node] + 1) for child in children)
            count(self.problem, "expansions")

    def _evaluate(self, nodes: Sequence[Node]) -> Generator[Request, Any, None]:
        new = [node for node in nodes if node not in self.values or (self.again and not node.complete)]
        if new:
            found = yield from self.evaluate(self.problem, new)
            self.values.update(zip(new, found, strict=True))

    def _wait(self, leaf: Node, change: int) -> None:
        for node in leaf.lineage():
            self.waiting[node] += change

    def descend(self, top: Node) -> Node:
        """By the rule to a node that was not expanded."""
        node = top
        while self.children.get(node):
            node = self.select(node)
        return node

    def select(self, node: Node) -> Node:
        """The child that the rule says; the first of equals."""
        visits = {child: child.visits + self.waiting[child] for child in self.children[node]}
        total = sum(visits.values())

        def q(child: Node) -> float:
            if not visits[child]:
                return node.value
            return (child.visits * child.value + self.waiting[child] * self.lowest) / visits[child]

        def uct(child: Node) -> tuple[bool, float]:
            if not visits[child]:
                return True, 0.0 if math.isnan(child.prior) else child.prior
            return False, q(child) + self.exploration * math.sqrt(math.log(max(1, total)) / visits[child])

        def puct(child: Node) -> tuple[bool, float]:
            prior = 1 / len(visits) if math.isnan(child.prior) else child.prior
            return False, q(child) + self.exploration * prior * math.sqrt(max(1, total)) / (1 + visits[child])

        return max(self.children[node], key=uct if self.rule == "uct" else puct)

    def best(self, node: Node) -> Node | None:
        """The child to commit to; None where none was visited."""
        visited = [child for child in self.children.get(node, []) if child.visits and not child.pruned]
        if not visited:
            return None
        if self.choose == "visits":
            return max(visited, key=lambda child: (child.visits, child.value))
        if self.choose == "value":
            return max(visited, key=lambda child: (child.value, child.visits))
        return max(visited, key=lambda child: max((n.score for n in child.walk() if n.complete and not
                                                   math.isnan(n.score)), default=-math.inf))  # fmt: skip

    def best_leaf(self, top: Node) -> Node:
        """The end of the best way down from `top`."""
        if self.choose == "score":
            whole = [node for node in top.walk() if node.complete and not math.isnan(node.score)]
            if whole:
                return max(whole, key=lambda node: node.score)
        while (child := self.best(top)) is not None:
            top = child
        return top
