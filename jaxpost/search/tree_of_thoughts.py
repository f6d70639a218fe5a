"""Tree of thoughts (2305.10601): the model proposes next thoughts, judges the states they lead to, and the search goes
on with the best ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxpost.search.contract import Found, Search
from jaxpost.search.pieces import Grow, count, different, draw_steps, ended, fill, last_line, question, room
from jaxpost.search.requests import Ask, Draw, Request, Score, Write
from jaxpost.search.stepwise import Steps, check_separator
from jaxpost.search.tree import Node, Problem

PROPOSE = (
    "{problem}\n\nSteps so far:\n{steps}\n\nWrite {branch} different possible next steps, each on one line that begins "
    "with `- `, and nothing else."
)
VALUE = (
    "{problem}\n\nSteps so far:\n{steps}\n\nCheck every step, and whether they lead to the right answer. End with one "
    "line: sure, likely or impossible."
)
VOTE = (
    "{problem}\n\nWhich of these beginnings of a solution is the most promising?\n{choices}\n\nCompare them. End with "
    "one line of the form `Best: N`."
)
WORDS: Mapping[str, float] = {"sure": 1.0, "likely": 0.05, "impossible": 0.00005}
"""The paper's 20, 1 and 0.001 as shares of 20."""


def listed(text: str) -> list[str]:
    """The thoughts that a reply lists: its lines that begin with `- `, each once; other lines are none.

    >>> listed("Here they are:\\n- 2 + 3 = 5\\n- 4 - 1 = 3\\n- 2 + 3 = 5")
    ['2 + 3 = 5', '4 - 1 = 3']
    """
    lines = [line.strip()[2:].strip() for line in text.splitlines() if line.strip().startswith("- ")]
    return list(dict.fromkeys(line for line in lines if line))


def tree_of_thoughts(
    problem: Problem,
    *,
    order: Literal["breadth", "depth"] = "breadth",
    generator: Literal["sample", "propose"] = "sample",
    evaluator: Literal["value", "vote", "verifier"] = "value",
    branch: int = 5,
    keep: int = 5,
    depth: int = 3,
    evaluations: int = 3,
    threshold: float = 0.01,
    max_states: int = 100,
    separator: str = "\n",
    step_tokens: int = 64,
    answer_tokens: int = 256,
    verdict_tokens: int = 128,
    propose_prompt: str = PROPOSE,
    value_prompt: str = VALUE,
    vote_prompt: str = VOTE,
    words: Mapping[str, float] = WORDS,
    read_proposals: Callable[[str], list[str]] = listed,
) -> Search:
    """Tree of thoughts (2305.10601).

    A state s is the problem with the thoughts so far. From each, `branch` thoughts z are generated, states are valued,
    and values are backed up: V(s) is the mean over the judged states at and below s.

        sample:    z_i ~ p(z | s), independently              propose:   z_1 .. z_k from the lines of one reply
        value:     V(s) = mean over draws of words[verdict]   vote:      V(s) = share of draws that name s the best
        verifier:  V(s) = the search's verifier's score

        breadth:   S_t = the `keep` states of highest V among the children of S_{t-1}, t = 1 .. depth
        depth:     from the best child on; where V(s) <= threshold, or all below s was tried, back to s's parent,
                   whose state is restored by drawing from its node again; at most `max_states` states are expanded

    Then what stands at the deepest states is continued to its end. Equal states are judged once. Replies and verdicts
    that cannot be read are counted in the root's facts: "unread_proposals", "unread_verdicts".

    Args:
        order, generator, evaluator, branch, keep, threshold, max_states: as above.
        depth: thoughts of a solution before it is continued to its end.
        evaluations: draws of a verdict (value) or of votes.
        separator: what ends a thought.
        step_tokens, answer_tokens, verdict_tokens: most tokens of a thought (of a proposal: `branch` times as many),
            of the end of an answer, and of a verdict.
        propose_prompt: {problem}, {steps}, {branch}. value_prompt: {problem}, {steps}.
        vote_prompt: {problem}, {choices}; its reply ends with `Best: N`.
        words, read_proposals: last lines of a verdict and their values; the thoughts in a reply.
    """
    tree = _Thoughts(
        problem, generator, evaluator, branch, depth, evaluations, separator, step_tokens, answer_tokens,
        verdict_tokens, propose_prompt, value_prompt, vote_prompt, words, read_proposals,
    )  # fmt: skip
    if order == "breadth":
        yield from _breadth(tree, keep)
    else:
        yield from _Depth(tree, threshold, max_states).run()
    if generator == "sample":
        check_separator(problem, Steps(separator=separator, max_tokens=step_tokens))
    return Found.best(ended(problem) or [node for node in problem.root.walk() if not node.children])


@dataclass
class _Thoughts:
    problem: Problem
    generator: Literal["sample", "propose"]
    evaluator: Literal["value", "vote", "verifier"]
    branch: int
    depth: int
    evaluations: int
    separator: str
    step_tokens: int
    answer_tokens: int
    verdict_tokens: int
    propose_prompt: str
    value_prompt: str
    vote_prompt: str
    words: Mapping[str, float]
    read_proposals: Callable[[str], list[str]]
    known: dict[str, float] = field(default_factory=dict)
    """Values of states by their text."""

    @property
    def scored(self) -> bool:
        return self.evaluator == "verifier"

    def grow(self, nodes: Sequence[Node]) -> Grow:
        """The next thoughts of each node."""
        if self.generator == "sample":
            return (
                yield from draw_steps(
                    self.problem, nodes, branch=self.branch, separator=self.separator, step_tokens=self.step_tokens,
                    reserve=self.answer_tokens, scored=self.scored, note="thought",
                )
            )  # fmt: skip
        tokens = self.branch * self.step_tokens
        pays = min(len(nodes), room(self.problem, tokens, self.answer_tokens))
        self.problem.ledger.refused += len(nodes) - pays
        roots = yield Ask([self._prompt(self.propose_prompt, node) for node in nodes[:pays]], note="propose")
        replies = (yield Draw(roots, n=1, max_tokens=tokens, note="propose")) if roots else []
        grown: list[list[Node]] = []
        for node, drawn in zip(nodes, [*replies, *([[]] * (len(nodes) - len(replies)))], strict=True):
            thoughts = [z for reply in drawn for z in self.read_proposals(reply.text)][: self.branch]
            if drawn and not thoughts:
                count(self.problem, "unread_proposals")
            texts = [thought + self.separator for thought in thoughts]
            written = (yield Write([node] * len(texts), texts, note="thought")) if texts else []
            grown.append(different(self.problem, written))
        self.problem.prune(roots)
        return grown

    def judge(self, nodes: Sequence[Node]) -> Generator[Request, Any, None]:
        """Sets the score of nodes and backs it up."""
        if self.evaluator == "verifier":
            yield Score(nodes)
        elif self.evaluator == "value":
            yield from self._value(nodes)
        else:
            yield from self._vote(nodes)
        for node in nodes:
            if not math.isnan(node.score):
                node.back_up(node.score)

    def finish(self, nodes: Sequence[Node]) -> Generator[Request, Any, list[Node]]:
        """Continues nodes to the end of the answer; those that ended already are themselves."""
        open_ = [node for node in nodes if not node.complete]
        drawn = (yield Draw(open_, max_tokens=self.answer_tokens, scored=self.scored, note="answer")) if open_ else []
        answers = [child for children in drawn for child in children]
        if self.scored and answers:
            yield Score(answers)
        for answer in answers:
            if not self.scored and answer.parent is not None:
                answer.score = answer.parent.score
        return [node for node in nodes if node.complete] + answers

    def _prompt(self, template: str, node: Node) -> str:
        return fill(
            template, problem=question(self.problem.prompt), steps=node.answer.strip("\n"), branch=str(self.branch)
        )

    def _verdicts(self, prompts: Sequence[str], note: str) -> Generator[Request, Any, dict[str, list[str]]]:
        """Replies to each prompt that the budget paid for; they are the verifier's tokens."""
        roots = yield Ask(prompts, verifier=True, note=note)
        if not roots:
            return {}
        drawn = yield Draw(roots, n=self.evaluations, max_tokens=self.verdict_tokens, verifier=True, note=note)
        self.problem.prune(roots)
        return {
            root.facts["prompt"]: [reply.text for reply in replies]
            for root, replies in zip(roots, drawn, strict=True)
            if replies
        }

    def _value(self, nodes: Sequence[Node]) -> Generator[Request, Any, None]:
        prompts = {node: self._prompt(self.value_prompt, node) for node in nodes}
        new = [prompt for prompt in dict.fromkeys(prompts.values()) if prompt not in self.known]
        found = (yield from self._verdicts(new, "value")) if new else {}
        for prompt, replies in found.items():
            values = [self.words.get(last_line(reply).lower()) for reply in replies]
            read = [value for value in values if value is not None]
            count(self.problem, "unread_verdicts", len(values) - len(read))
            self.known[prompt] = math.fsum(read) / len(read) if read else math.nan
        for node, prompt in prompts.items():
            node.score = self.known.get(prompt, math.nan)

    def _vote(self, nodes: Sequence[Node]) -> Generator[Request, Any, None]:
        choices = "\n\n".join(f"Choice {i}:\n{node.answer.strip()}" for i, node in enumerate(nodes, 1))
        prompt = fill(self.vote_prompt, problem=question(self.problem.prompt), choices=choices)
        found = yield from self._verdicts([prompt], "vote")
        votes = [re.fullmatch(r"Best: (\d{1,4})", last_line(reply)) for reply in found.get(prompt, [])]
        named = [int(vote[1]) for vote in votes if vote and 1 <= int(vote[1]) <= len(nodes)]
        count(self.problem, "unread_verdicts", len(votes) - len(named))
        for i, node in enumerate(nodes, 1):
            node.score = named.count(i) / len(named) if named else math.nan


def _rank(node: Node) -> float:
    """Highest first, unjudged ones last."""
    return math.inf if math.isnan(node.score) else -node.score


def _breadth(tree: _Thoughts, keep: int) -> Generator[Request, Any, None]:
    frontier = [tree.problem.root]
    for _ in range(tree.depth):
        open_ = [node for node in frontier if not node.complete]
        grown = (yield from tree.grow(open_)) if open_ else []
        new = [child for children in grown for child in children]
        if not new:
            break
        whole = [node for node in frontier if node.complete]
        # Votes compare: an answer that ended above stands for election again.
        yield from tree.judge([*whole, *new] if tree.evaluator == "vote" else new)
        states: dict[tuple[str, bool], Node] = {}
        for node in sorted([*whole, *new], key=_rank):
            states.setdefault((node.answer, node.complete), node)
        frontier = list(states.values())[:keep]
        tree.problem.prune([node for node in new if node not in frontier])
    yield from tree.finish(frontier)


@dataclass
class _Depth:
    """Depth-first: a stack of states, the best child on top."""

    tree: _Thoughts
    threshold: float
    max_states: int

    def run(self) -> Generator[Request, Any, None]:
        tree, problem = self.tree, self.tree.problem
        stack: list[tuple[Node, int]] = [(problem.root, 0)]
        tried, before = 0, problem.root
        while stack and tried < self.max_states:
            node, level = stack.pop()
            if node.parent is not before and node is not problem.root:
                count(problem, "backtracks")
                problem.prune(_left_behind(before, node))
            before = node
            if node.complete or level == tree.depth:
                answers = yield from tree.finish([node])
                if not answers or any(self._good(answer) for answer in answers):
                    return
                continue
            [children] = yield from tree.grow([node])
            tried += 1
            if children:
                yield from tree.judge(children)
            elif room(problem, tree.step_tokens, tree.answer_tokens) < 1:
                break
            bad = [child for child in children if not self._good(child)]
            good = sorted((child for child in children if self._good(child)), key=_rank)
            stack += [(child, level + 1) for child in reversed(good)]
            count(problem, "cut_off", len(bad))
            problem.prune(bad)
        if not ended(problem):
            yield from tree.finish([self._best()])

    def _good(self, node: Node) -> bool:
        return node.score > self.threshold

    def _best(self) -> Node:
        """Where to go on when nothing passed: the deepest state that was not given up, of the highest score."""
        nodes = [node for node in self.tree.problem.root.walk() if not node.pruned and not node.children]
        return min(nodes, key=lambda node: (-node.depth, _rank(node)), default=self.tree.problem.root)


def _left_behind(before: Node, node: Node) -> list[Node]:
    """The subtree that is done with when the search goes from `before` back up to a sibling of one of its ancestors."""
    above = set(node.lineage())
    return [step for step in before.lineage() if step not in above and step.parent in above]
