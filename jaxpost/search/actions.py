"""Action sets for tree search: RAP's sub-questions (2305.14992) and rStar's five actions (2408.06195)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxpost.search.contract import Candidate, Found, Search
from jaxpost.search.mcts import Rollouts, TreeSearch, finish
from jaxpost.search.pieces import Grow, chosen_first, different, ended, fill, question, room
from jaxpost.search.requests import Ask, Draw, Likelihood, Request, Write
from jaxpost.search.stepwise import Steps, check_separator
from jaxpost.search.tree import Node, Problem
from jaxpost.search.vote import elect

USEFUL = "{problem}\n\n{steps}\n\nNew question: {question}\n\nIs the new question useful? Answer Yes or No."
FINAL = "Now we can answer the question."


def rap(
    problem: Problem,
    *,
    simulations: int = 16,
    branch: int = 3,
    answers: int = 3,
    max_depth: int = 5,
    alpha: float = 0.5,
    exploration: float = 1.0,
    leaves: int = 1,
    choose: Literal["visits", "value", "vote"] = "vote",
    question_piece: str = "Question {t}: ",
    answer_piece: str = "Answer {t}: ",
    final: str = FINAL,
    useful_prompt: str = USEFUL,
    useful_words: tuple[str, str] = ("Yes", "No"),
    separator: str = "\n",
    step_tokens: int = 64,
    answer_tokens: int = 256,
) -> Search:
    """Reasoning via planning (2305.14992): a Monte-Carlo tree over sub-questions and their answers, without a verifier.

    An action a_t is a sub-question; its state is the answer that most of `answers` draws give.

        useful(a)  = p(Yes) / (p(Yes) + p(No)) after `useful_prompt`;   confidence = share of draws that agree
        r_t        = useful(a_t)^alpha  confidence_t^(1 - alpha)
        value(s_t) = mean of r_1 .. r_t;   P(a) = useful(a) / sum over siblings;   selection by PUCT (see `mcts`)

    A sub-question that begins with `final`, forced at the last level, is answered to the end. The answer is the one
    under which the values of all whole answers of the tree have the largest sum (`vote`, the paper's aggregation), or
    the end of the most visited or most valued way.

    Args:
        problem: the prompt.
        simulations, exploration, leaves, max_depth: as of `mcts`; a level is one sub-question.
        branch: sub-questions of a state.
        answers: draws of each answer. alpha: weight of usefulness against confidence, 0 to 1.
        choose: as above.
        question_piece, answer_piece: written before each; {t} is its number.
        final: beginning of the sub-question that ends the tree.
        useful_prompt: {problem}, {steps}, {question}.
        useful_words: the replies that are compared.
        separator, step_tokens, answer_tokens: what ends a sub-question or its answer; most tokens of each, and of the
            last answer.
    """
    actions = _Rap(
        branch, answers, max_depth, alpha, question_piece, answer_piece, final, useful_prompt, useful_words, separator,
        step_tokens, answer_tokens,
    )  # fmt: skip
    tree = TreeSearch(
        problem, actions.expand, actions.value, rule="puct", exploration=exploration, leaves=leaves,
        max_depth=max_depth, choose="value" if choose == "value" else "visits", reserve=answer_tokens,
    )  # fmt: skip
    top = yield from tree.run(simulations=simulations)
    check_separator(problem, Steps(separator=separator, max_tokens=step_tokens))
    whole = [node for node in tree.level if node.complete and node.visits]
    if choose == "vote" and whole:
        return elect(problem, whole, lambda node: node.score)
    chosen = yield from finish(problem, tree.best_leaf(top), answer_tokens=answer_tokens, scored=False)
    return chosen_first(chosen, [node for node in ended(problem) if not math.isnan(node.score)])


@dataclass(frozen=True)
class _Rap:
    branch: int
    answers: int
    max_depth: int
    alpha: float
    question_piece: str
    answer_piece: str
    final: str
    useful_prompt: str
    useful_words: tuple[str, str]
    separator: str
    step_tokens: int
    answer_tokens: int

    def expand(self, problem: Problem, nodes: Sequence[Node]) -> Grow:
        asked = yield from self._questions(problem, nodes)
        every = [a for children in asked for a in children]
        yield from self._useful(problem, every)
        answered = yield from self._answers(problem, every)
        grown = [[answered[a] for a in children if a in answered] for children in asked]
        for children in grown:
            total = math.fsum(child.facts["useful"] for child in children)
            for child in children:
                child.prior = child.facts["useful"] / total if total > 0 else 1 / len(children)
        return grown

    def value(self, problem: Problem, nodes: Sequence[Node]) -> Generator[Request, Any, list[float]]:
        """Mean of the rewards on the way."""
        del problem
        for node in nodes:
            rewards = [piece.facts["reward"] for piece in node.path if "reward" in piece.facts]
            node.score = math.fsum(rewards) / len(rewards)
        yield from ()  # an evaluation is a generator; this one has nothing to ask
        return [node.score for node in nodes]

    def _level(self, node: Node) -> int:
        return sum("reward" in piece.facts for piece in node.path)

    def _questions(self, problem: Problem, nodes: Sequence[Node]) -> Grow:
        """Sub-questions of each node, or the final one at the last level."""
        last = [self._level(node) + 1 >= self.max_depth for node in nodes]
        heads = [fill(self.question_piece, t=str(self._level(node) + 1)) for node in nodes]
        texts = [head + (self.final + self.separator if end else "") for head, end in zip(heads, last, strict=True)]
        starts = yield Write(nodes, texts, note="sub-question")
        pays = room(problem, self.step_tokens, self.answer_tokens)
        n = [0 if end else max(0, min(self.branch, pays - self.branch * i)) for i, end in enumerate(last)]
        drawn = [[] for _ in nodes]
        if any(n):
            drawn = yield Draw(starts, n=n, max_tokens=self.step_tokens, stop=(self.separator,), note="sub-question")
        asked = [different(problem, children) for children in drawn]
        for start, end, head, children in zip(starts, last, heads, asked, strict=True):
            children += [start] if end else []
            for child in children:
                child.facts["question"] = child.text.removeprefix(head).removesuffix(self.separator).strip()
        return asked

    def _useful(self, problem: Problem, asked: Sequence[Node]) -> Generator[Request, Any, None]:
        """facts["useful"] of each sub-question; 1/2 where the budget ended."""
        prompts = {
            node: fill(
                self.useful_prompt, problem=question(problem.prompt), question=node.facts["question"],
                steps="".join(piece.text for piece in node.path if piece is not node).strip(),
            )
            for node in asked
        }  # fmt: skip
        roots = (yield Ask(list(dict.fromkeys(prompts.values())), verifier=True, note="useful")) if asked else []
        pairs = [(root, word) for root in roots for word in self.useful_words]
        found = (yield Likelihood([root for root, _ in pairs], [word for _, word in pairs])) if pairs else []
        problem.prune(roots)
        shares: dict[str, float] = {}
        for i, root in enumerate(roots):
            yes, no = found[2 * i], found[2 * i + 1]
            if yes and no:
                shares[root.facts["prompt"]] = 1 / (1 + math.exp(min(700.0, math.fsum(no) - math.fsum(yes))))
        for node, prompt in prompts.items():
            node.facts["useful"] = shares.get(prompt, 0.5)

    def _answers(self, problem: Problem, asked: Sequence[Node]) -> Generator[Request, Any, dict[Node, Node]]:
        """The answer of each sub-question that most draws gave, with its reward; none where the budget ended."""
        chosen: dict[Node, Node] = {}
        for last in (False, True):
            some = [node for node in asked if node.facts["question"].startswith(self.final) == last]
            some = [node for node in some if not node.complete]
            if not some:
                continue
            texts = [fill(self.answer_piece, t=str(self._level(node) + 1)) for node in some]
            starts = yield Write(some, texts, note="sub-answer")
            tokens, stop = (self.answer_tokens, ()) if last else (self.step_tokens, (self.separator,))
            drawn = yield Draw(starts, n=self.answers, max_tokens=tokens, stop=stop, note="sub-answer")
            for node, found in zip(some, drawn, strict=True):
                if found:
                    chosen[node] = self._majority(problem, node, found)
        return chosen

    def _majority(self, problem: Problem, node: Node, found: Sequence[Node]) -> Node:
        said = [problem.canonical(answer.text) or answer.text.strip() for answer in found]
        [(most, times)] = Counter(said).most_common(1)
        best = found[said.index(most)]
        problem.prune([answer for answer in found if answer is not best])
        confidence, useful = times / len(found), node.facts["useful"]
        reward = useful**self.alpha * confidence ** (1 - self.alpha)
        best.facts |= {"useful": useful, "confidence": confidence, "reward": reward}
        return best


PIECES: Mapping[str, str] = {
    "step": "",
    "rest": "",
    "subquestion": "Sub-question: ",
    "subanswer": "Answer: ",
    "reanswer": "Answering that again, step by step: ",
    "rephrase": "In other words: ",
}
ACTIONS = ("step", "rest", "subquestion", "reanswer", "rephrase")


def rstar(
    problem: Problem,
    *,
    simulations: int = 16,
    actions: Sequence[str] = ACTIONS,
    branch: int = 2,
    max_depth: int = 5,
    rollouts: int = 1,
    exploration: float = 2.0,
    leaves: int = 1,
    checks: int = 1,
    given: float = 0.5,
    pieces: Mapping[str, str] = PIECES,
    separator: str = "\n",
    step_tokens: int = 64,
    answer_tokens: int = 256,
) -> Search:
    """rStar (2408.06195): a Monte-Carlo tree over five kinds of action, and answers that a second pass agrees with.

        step         one next step                         rest      all remaining steps, to the answer's end
        subquestion  the next sub-question and its answer  reanswer  answer it again; only right after a sub-question
        rephrase     say the question anew; only at the root

    Selection is UCT (see `mcts`). The value of a leaf is the mean over `rollouts` completions (of a whole answer: its
    own) of the share of all completions so far that give the same canonical answer. Of every canonical answer that the
    tree holds one trajectory is checked (`mutual_consistency`), and the answer is that of the largest

        share of whole answers  x  share of second passes that agree

    or of the largest share, if none agree.

    Args:
        problem: the prompt.
        simulations, max_depth, exploration, leaves: as of `mcts`.
        actions: of these five.
        branch: draws of `step` and of `subquestion`; the others are drawn once.
        rollouts: completions of each leaf. checks: second passes over each trajectory; 0: none.
        given: share of a trajectory's lines that the second pass is given.
        pieces: what is written before each action; "" writes nothing.
        separator, step_tokens, answer_tokens: what ends a step; most tokens of a step and of a completion.

    Raises:
        ValueError: an action that there is not.
    """
    if unknown := set(actions) - set(ACTIONS):
        raise ValueError(f"no such action: {', '.join(sorted(unknown))}; there are {', '.join(ACTIONS)}")
    chosen = _RStar(tuple(actions), branch, {**PIECES, **pieces}, separator, step_tokens, answer_tokens)
    tree = TreeSearch(
        problem, chosen.expand, Rollouts(rollouts, answer_tokens, agreement=True), rule="uct",
        exploration=exploration, leaves=leaves, max_depth=max_depth, again=True, reserve=answer_tokens,
    )  # fmt: skip
    yield from tree.run(simulations=simulations)
    check_separator(problem, Steps(separator=separator, max_tokens=step_tokens))
    whole = ended(problem)
    if not whole:
        last = yield from finish(problem, problem.root, answer_tokens=answer_tokens, scored=False)
        if last is None or not last.complete:
            return chosen_first(last, [])
        whole = [last]
    return (yield from _confirmed(problem, whole, checks=checks, given=given, answer_tokens=answer_tokens))


def _confirmed(problem: Problem, whole: Sequence[Node], *, checks: int, given: float, answer_tokens: int) -> Search:
    """Whole answers by the share that give them and the share of second passes that agree."""
    said = {node: problem.canonical(node.answer) for node in whole}
    votes = Counter(answer for answer in said.values() if answer is not None)
    shares = {node: votes[answer] / votes.total() for node, answer in said.items() if answer is not None}
    best = {said[node]: node for node in reversed(list(shares))}
    trajectories = sorted(best.values(), key=lambda node: (-shares[node], node.number))
    agreed = yield from mutual_consistency(
        problem, trajectories, checks=checks, given=given, answer_tokens=answer_tokens
    )
    scores = {node: shares[node] * a for node, a in zip(trajectories, agreed, strict=True)}
    for node, a in zip(trajectories, agreed, strict=True):
        node.facts["agreed"] = a
    if not any(score > 0 for score in scores.values()):
        scores = {node: shares[node] for node in trajectories}
    ordered = sorted(trajectories, key=lambda node: -scores[node])
    candidates = [Candidate(node.answer, scores[node], node, said[node]) for node in ordered]
    return Found(tuple(candidates), {str(answer): float(number) for answer, number in votes.items()})


@dataclass(frozen=True)
class _RStar:
    actions: tuple[str, ...]
    branch: int
    pieces: Mapping[str, str]
    separator: str
    step_tokens: int
    answer_tokens: int

    def expand(self, problem: Problem, nodes: Sequence[Node]) -> Grow:
        """The children of every action that a node allows, in the order of the actions."""
        grown: dict[tuple[Node, str], list[Node]] = {}
        steps = [a for a in self.actions if a != "rest"]
        yield from self._draw(problem, nodes, steps, grown)
        asked = [child for (_, action), children in grown.items() if action == "subquestion" for child in children]
        if asked := [child for child in asked if not child.complete]:
            answers: dict[tuple[Node, str], list[Node]] = {}
            yield from self._draw(problem, asked, ["subanswer"], answers)
            for (node, action), children in grown.items():
                if action == "subquestion":
                    found = [answers.get((child, "subanswer"), [child] if child.complete else []) for child in children]
                    grown[node, action] = [answer for some in found for answer in some]
        if "rest" in self.actions:
            yield from self._draw(problem, nodes, ["rest"], grown)
        return [[c for action in self.actions for c in grown.get((node, action), [])] for node in nodes]

    def _allowed(self, node: Node, action: str) -> bool:
        if action == "reanswer":
            return node.note == "subanswer"
        return action != "rephrase" or node.parent is None

    def _draw(
        self, problem: Problem, nodes: Sequence[Node], actions: Sequence[str], grown: dict[tuple[Node, str], list[Node]]
    ) -> Generator[Request, Any, None]:
        """One draw of some actions of all nodes; each piece is written first."""
        whole = list(actions) == ["rest"]
        tokens = self.answer_tokens if whole else self.step_tokens
        pays = room(problem, tokens, 0 if whole else self.answer_tokens)
        wanted: list[tuple[Node, str, int]] = []
        for node in nodes:
            for action in actions:
                n = min(pays, self.branch if action in ("step", "subquestion") else 1)
                if n and self._allowed(node, action):
                    wanted.append((node, action, n))
                    pays -= n
        if not wanted:
            return
        texts = [self.pieces[action] for _, action, _ in wanted]
        to_write = [(node, text) for (node, _, _), text in zip(wanted, texts, strict=True) if text]
        written = iter((yield Write([n for n, _ in to_write], [t for _, t in to_write])) if to_write else [])
        starts = [next(written) if text else node for (node, _, _), text in zip(wanted, texts, strict=True)]
        drawn = yield Draw(
            starts, n=[n for *_, n in wanted], max_tokens=tokens, stop=() if whole else (self.separator,)
        )
        for (node, action, _), children in zip(wanted, drawn, strict=True):
            grown[node, action] = different(problem, children)
            for child in grown[node, action]:
                child.note = action


def mutual_consistency(
    problem: Problem, answers: Sequence[Node], *, checks: int = 1, given: float = 0.5, answer_tokens: int = 256
) -> Generator[Request, Any, list[float]]:
    """A second pass on partial answers (2408.06195): the share of `checks` continuations of the first lines of each
    answer that end in the same canonical answer; 0 where the budget ended or none is asked.

    The share `given` of its lines is given, but never the last; an answer of one line is found anew from the prompt.
    """
    if not answers or not checks:
        return [0.0] * len(answers)
    partial = []
    for node in answers:
        lines = node.answer.splitlines(keepends=True)
        partial.append("".join(lines[: max(0, min(round(given * len(lines)), len(lines) - 1))]))
    to_write = [text for text in partial if text]
    written = iter((yield Write([problem.root] * len(to_write), to_write, note="given")) if to_write else [])
    starts = [next(written) if text else problem.root for text in partial]
    drawn = yield Draw(starts, n=checks, max_tokens=answer_tokens, verifier=True, note="check")
    agreed = []
    for node, found in zip(answers, drawn, strict=True):
        said = [problem.canonical(check.answer) if check.complete else None for check in found]
        agreed.append(said.count(problem.canonical(node.answer)) / checks)
    return agreed
