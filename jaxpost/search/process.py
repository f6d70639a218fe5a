"""A process reward model as a verifier that keeps the keys and values of every text it judged.

A node is judged from its parent's text: what they share is not read again, a fork moves page indices, and the head
reads the new steps alone. Where a layout ends texts with something that the next step does not continue, that part is
read again; where nothing is shared, everything is. Scores are those of the whole text either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost.generate.engine import Engine, Weights
from jaxpost.generate.layout import Text
from jaxpost.generate.reading import Read, measure, open_text
from jaxpost.search.contract import Case, Verdict
from jaxpost.search.shelf import Key, Shelf, key_of
from jaxpost.search.tree import Aggregate, Node, Problem, aggregate
from jaxpost.types import Params


class Written(NamedTuple):
    """An answer as the model was trained to read it."""

    tokens: Sequence[int] | np.ndarray
    """Of prompt and answer."""
    places: list[int]
    """Indices of the tokens after which steps are scored."""
    start: int
    """Where the answer begins."""


class _Judged(NamedTuple):
    """A text that was read, and the head's outputs by place."""

    tokens: list[int]
    outputs: dict[int, np.ndarray]


class _Item(NamedTuple):
    """A text to read: `known` tokens of it were paid for."""

    node: Node
    tokens: list[int]
    places: list[int]
    known: int


class ProcessVerifier:
    """judge(cases) -> the aggregate of each answer's step scores, and the scores (`contract.Verifier`).

    Args:
        engine: of the model below the head; its cache holds the trees.
        weights: as `Engine.weights` gives them, or by reference twice.
        head, read: read(head, hidden [.. D]) -> outputs [.. K].
        write: prompt and answer in tokens; a ValueError says why they cannot be judged.
        scores: outputs [n, K] -> a score for each of n steps.
        how: one number of an answer's step scores.
        rows: most texts that are read together.
        ratio: tokens of this model for one of the policy's, at most; only budgets ask.
    """

    def __init__(
        self,
        engine: Engine,
        weights: Weights,
        *,
        head: Params,
        read: Read,
        write: Callable[[Any, str], Written],
        scores: Callable[[np.ndarray], Sequence[float] | np.ndarray],
        how: Aggregate = "last",
        rows: int = 32,
        ratio: float | int = 1.0,
    ):
        self.engine, self.weights, self.head, self.read = engine, weights, head, read
        self.write, self.scores, self.how, self.ratio = write, scores, how, ratio
        self.shelf = Shelf(rows)
        self.shelf.use(engine)
        self._judged: dict[Key, _Judged] = {}
        self._written: dict[Key, Written | str] = {}
        self._probes: dict[Node, Written | str] = {}

    def __call__(self, cases: Sequence[Case]) -> list[Verdict | str]:
        written = [self._write(case.problem, case.node) for case in cases]
        costs = self._open(cases, written)
        asked = {key_of(case.node) for case in cases}
        levels: dict[int, dict[Key, _Item]] = {}
        for case, text in zip(cases, written, strict=True):
            if isinstance(text, str):
                continue
            level = sum(key_of(node) in asked for node in case.node.lineage())
            levels.setdefault(level, {})[key_of(case.node)] = _Item(case.node, _ids(text.tokens), text.places, 0)
        faults: dict[Key, str] = {}
        for level in sorted(levels):
            items = [item._replace(known=self._shared(item.node, item)[1]) for item in levels[level].values()]
            found = self.shelf.in_parts(items, self._read, lambda item: key_of(item.node))
            for item, cost in zip(items, found, strict=True):
                if isinstance(cost, str):
                    faults[key_of(item.node)] = cost
                else:
                    costs[key_of(item.node)] = costs.get(key_of(item.node), 0) + cost
        return [
            text if isinstance(text, str) else faults.get(key_of(case.node)) or self._verdict(case.node, text, costs)
            for case, text in zip(cases, written, strict=True)
        ]

    def price(self, case: Case, new_tokens: int) -> int:
        node, probe = case.node, self._probe(case.problem)
        cost = 0
        if node.parent is not None and not isinstance(text := self._write(case.problem, node), str):
            item = _Item(node, _ids(text.tokens), text.places, 0)
            cost = len(item.tokens) - max(self._shared(node, item)[1], text.start)
        if new_tokens and not isinstance(probe, str):
            cost += int(np.ceil(self.ratio * new_tokens)) + len(probe.tokens) - probe.start
        return cost

    def opening(self, problem: Problem) -> int:
        """Tokens that its first judgement costs besides: the prompt's."""
        probe = self._probe(problem)
        return 0 if key_of(problem.root) in self._judged or isinstance(probe, str) else probe.start

    def forget(self, nodes: Sequence[Node]) -> None:
        keys = [key_of(node) for node in nodes]
        self.shelf.drop(keys)
        for node, key in zip(nodes, keys, strict=True):
            self._judged.pop(key, None)
            self._written.pop(key, None)
            self._probes.pop(node, None)

    def _write(self, problem: Problem, node: Node) -> Written | str:
        key = key_of(node)
        if key not in self._written:
            self._written[key] = self._try(problem.prompt, node.answer)
        return self._written[key]

    def _probe(self, problem: Problem) -> Written | str:
        """The shortest answer: where answers begin, and what stands around a step."""
        if problem.root not in self._probes:
            self._probes[problem.root] = self._try(problem.prompt, "x")
        return self._probes[problem.root]

    def _try(self, prompt: Any, answer: str) -> Written | str:
        try:
            found = self.write(prompt, answer)
            return found if found.places else "the answer has no step to score"
        except ValueError as error:
            return f"the process model cannot read it: {error}"

    def _open(self, cases: Sequence[Case], written: Sequence[Written | str]) -> dict[Key, int]:
        """Reads the prompts of problems that are new; what that cost, by the node that pays."""
        items: dict[Key, _Item] = {}
        payers: dict[Key, Key] = {}
        for case, text in zip(cases, written, strict=True):
            root = case.problem.root
            if not isinstance(text, str) and root not in self._judged and root not in items and text.start:
                items[root] = _Item(root, _ids(text.tokens[: text.start]), [], 0)
                payers[root] = key_of(case.node)
        found = self.shelf.in_parts(list(items.values()), self._read, lambda item: item.node)
        return {payers[root]: cost for root, cost in zip(items, found, strict=True) if not isinstance(cost, str)}

    def _shared(self, node: Node, item: _Item, *, held: bool = False) -> tuple[Node | None, int]:
        """The nearest judged text (that is held still), and how many tokens need not be read after it."""
        for above in node.lineage():
            judged = self._judged.get(key_of(above))
            if judged is None or (held and self.shelf.get(key_of(above)) is None):
                continue
            same = _common(judged.tokens, item.tokens)
            if not held:
                same = min([same, *(place for place in item.places if place not in judged.outputs)])
            return above, same
        return None, 0

    def _read(self, items: Sequence[_Item]) -> list[int]:
        """Reads what is new of each; the tokens that it costs, whether or not others had to be read again."""
        texts: list[Text] = []
        pieces: list[list[int]] = []
        try:
            for item in items:
                above, same = self._shared(item.node, item, held=True)
                same = min(same, item.known)
                text = None if above is None or same == 0 else self.shelf.get(key_of(above))
                try:
                    texts.append(open_text(self.engine, text, same))
                except ValueError:
                    texts.append(open_text(self.engine, None, 0))
                pieces.append(item.tokens[texts[-1].pages.stored :])
            places = [[place for place in item.places if place >= item.known] for item in items]
            found = measure(self.engine, self.weights, texts, pieces, places, head=self.head, read=self.read)
        except BaseException:
            self.engine.release(texts)
            raise
        for item, text, outputs, new, at in zip(items, texts, found, pieces, places, strict=True):
            self._keep(item, text, dict(zip(at, outputs, strict=True)))
            self.shelf.traffic.read += len(item.tokens) - item.known
            self.shelf.traffic.again += len(new) - (len(item.tokens) - item.known)
        return [len(item.tokens) - item.known for item in items]

    def _keep(self, item: _Item, text: Text, outputs: dict[int, np.ndarray]) -> None:
        above, _ = self._shared(item.node, item)
        before = {} if above is None else self._judged[key_of(above)].outputs
        known = {place: before[place] for place in item.places if place < item.known}
        self._judged[key_of(item.node)] = _Judged(item.tokens, known | outputs)
        self.shelf.put(key_of(item.node), text)

    def _verdict(self, node: Node, text: Written, costs: dict[Key, int]) -> Verdict:
        outputs = self._judged[key_of(node)].outputs
        steps = [float(x) for x in self.scores(np.stack([outputs[place] for place in text.places]))]
        return Verdict(aggregate(steps, self.how), costs.pop(key_of(node), 0), tuple(steps))


def _ids(tokens: Sequence[int] | np.ndarray) -> list[int]:
    return [int(token) for token in tokens]


def _common(a: Sequence[int], b: Iterable[int]) -> int:
    """Length of the longest common beginning."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
