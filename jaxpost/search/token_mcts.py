"""Monte-Carlo tree search over tokens: Gumbel MuZero's selection with sequential halving, or MuZero's PUCT, by `mctx`.

Its actions are the few most probable next tokens of each node. The arrays of a tree (visits, values, priors) are an
`mctx.Tree`; trees of all prompts that search at one time descend and are updated in one call. The language model is
asked through the search's requests alone.

Over the `best` most probable next tokens a, with logits l(a) = log p(a | text), V(s) the value of what a node stands
for, N visits and Q mean backed-up values:

    gumbel, root:     the `considered` tokens of largest g(a) + l(a), g ~ Gumbel(0, 1), are visited in turn, and
                      halved by sequential halving to those of largest g(a) + l(a) + sigma(Q(a))
    gumbel, below:    argmax_a  pi'(a) - N(a) / (1 + sum_b N(b)),  pi' = softmax(l + sigma(Q))
    sigma(q):         (maxvisit_init + max_b N(b)) value_scale q, with q scaled to [0, 1] over the node's children,
                      and unvisited ones at a mixture of V(s) and their siblings' Q
    puct:             argmax_a  Q(a) + p(a) sqrt(N(s)) (c_1 + log((N(s) + c_2 + 1) / c_2)) / (1 + N(a)),
                      Q scaled to [0, 1] over parent and siblings; the root's p is mixed with Dirichlet noise

Gumbel commits to the most visited token of largest g + l + sigma(Q), PUCT to the most visited one.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxpost.search.contract import Search
from jaxpost.search.mcts import Rollouts, finish
from jaxpost.search.pieces import chosen_first, ended, room
from jaxpost.search.requests import Push, Rank, Request, Score, Together
from jaxpost.search.token_trees import Settings, Turn, advance, conclude, new_tree
from jaxpost.search.tree import Node, Problem


def token_mcts(
    problem: Problem,
    *,
    simulations: int = 16,
    best: int = 8,
    search_tokens: int = 32,
    rule: Literal["gumbel", "puct"] = "gumbel",
    value: Literal["score", "logprob", "rollout"] = "score",
    rollouts: int = 1,
    rollout_temperature: float | None = 0.0,
    prompt_value: float = 0.0,
    max_depth: int | None = None,
    considered: int = 8,
    gumbel_scale: float = 1.0,
    value_scale: float = 0.1,
    maxvisit_init: float = 50.0,
    pb_c_init: float = 1.25,
    pb_c_base: float = 19652.0,
    dirichlet_fraction: float = 0.25,
    dirichlet_alpha: float = 0.3,
    answer_tokens: int = 256,
    seed: int = 0,
) -> Search:
    """Monte-Carlo tree search, one token an edge: Gumbel MuZero (Danihelka et al., ICLR 2022) or MuZero (1911.08265).

    The module states the rules. For each of the answer's first `search_tokens` tokens a tree of `simulations` nodes is
    grown and a token committed to; then, or where the budget but for the answer's end is spent, the answer is drawn to
    its end.

    Facts of each node that a token was chosen at: "tokens", their "visits", and "weights", what a policy would be
    trained to (gumbel: pi' of the root; puct: shares of visits).

    Args:
        simulations: for each token; each costs one token of the budget, and what the value costs.
        best: actions of a node.
        search_tokens: tokens that are searched.
        rule: as above.
        value: V(s): `score`, the verifier's of the unfinished text; `logprob`, the mean log-probability of the answer's
            tokens; `rollout`, the mean score of completions.
        rollouts, rollout_temperature: completions of a leaf; 0 is greedy, None the search's own temperature.
        prompt_value: V of the prompt alone, which holds no answer that could be scored (`score`).
        max_depth: tokens that a simulation looks ahead at most; None: no limit.
        considered, gumbel_scale, value_scale, maxvisit_init: of gumbel, as above; scale 0 is without noise.
        pb_c_init, pb_c_base, dirichlet_fraction, dirichlet_alpha: of puct: c_1, c_2, and the noise's share and shape.
        answer_tokens: most tokens of completions and of the answer's end.
        seed: of the noise, which is named by it, the prompt's number and the node's.

    Raises:
        ValueError: simulations, best or considered below 1.
    """
    if min(simulations, best, considered) < 1:
        raise ValueError(f"simulations {simulations}, best {best}, considered {considered}: each is at least 1")
    settings = Settings(
        rule, simulations, min(considered, best), max_depth or simulations, value_scale, maxvisit_init, pb_c_init,
        pb_c_base,
    )  # fmt: skip
    model = _Model(problem, best, value, Rollouts(rollouts, answer_tokens, rollout_temperature), prompt_value)
    noise = _Noise(seed, gumbel_scale, dirichlet_fraction, dirichlet_alpha)
    return (yield from _walk(model, settings, noise, search_tokens, answer_tokens))


def _walk(model: _Model, settings: Settings, noise: _Noise, search_tokens: int, answer_tokens: int) -> Search:
    """Commits token after token, and draws the end."""
    problem, value = model.problem, model.value
    top = problem.root
    for _ in range(search_tokens):
        if top.complete or room(problem, 1, answer_tokens) < 1 or not (yield from model.look(top)):
            break
        step = yield from _move(model, top, settings, noise, answer_tokens)
        if step is None:
            break
        problem.prune([child for child in top.children if child is not step])
        top = step
    chosen = yield from finish(problem, top, answer_tokens=answer_tokens, scored=value != "logprob")
    if chosen is not None and value == "logprob":
        chosen.score = _mean_logprob(chosen)
    return chosen_first(chosen, ended(problem))


IMPOSSIBLE = np.float32(-1e9)
"""The logit of an action that a node does not have."""


class _Noise(NamedTuple):
    """Named by (seed, the prompt's number, the node's)."""

    seed: int
    gumbel_scale: float
    dirichlet_fraction: float
    dirichlet_alpha: float

    def root(self, problem: Problem, node: Node, logits: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray | None]:
        """The root's logits, and Gumbel noise, of one rule or the other."""
        rng = np.random.default_rng([self.seed, problem.number, node.number])
        if rule == "gumbel":
            return logits, (self.gumbel_scale * rng.gumbel(size=logits.shape)).astype(np.float32)
        real = logits > IMPOSSIBLE
        p = np.exp(logits - logits.max()) * real
        noise = np.zeros_like(p)
        noise[real] = rng.dirichlet([self.dirichlet_alpha] * int(real.sum()))
        mixed = (1 - self.dirichlet_fraction) * p / p.sum() + self.dirichlet_fraction * noise
        return np.where(real, np.log(np.maximum(mixed, np.finfo(np.float32).tiny)), logits).astype(np.float32), None


@dataclass
class _Model:
    """What the language model and the verifier said, each asked once."""

    problem: Problem
    best: int
    value: Literal["score", "logprob", "rollout"]
    rollouts: Rollouts
    prompt_value: float
    tokens: dict[Node, list[int]] = field(default_factory=dict)
    logits: dict[Node, np.ndarray] = field(default_factory=dict)
    values: dict[Node, float] = field(default_factory=dict)
    pushed: dict[tuple[Node, int], Node] = field(default_factory=dict)

    def look(self, node: Node) -> Generator[Request, Any, bool]:
        """Actions and value of a node: -> False where the budget ended."""
        if node not in self.tokens and not node.complete:
            [(tokens, logprobs)] = yield Rank([node], self.best)
            if not len(tokens):
                return False
            self.tokens[node] = [int(token) for token in tokens]
            self.logits[node] = np.full(self.best, IMPOSSIBLE, np.float32)
            self.logits[node][: len(tokens)] = logprobs
        if node not in self.values:
            self.values[node] = yield from self._value(node)
        return not math.isnan(self.values[node])

    def _value(self, node: Node) -> Generator[Request, Any, float]:
        if self.value == "logprob":
            node.score = _mean_logprob(node)
            return node.score
        if self.value == "rollout":
            [value] = yield from self.rollouts(self.problem, [node])
            return value
        if node is self.problem.root:
            return self.prompt_value
        [score] = yield Score([node])
        return score

    def child(self, node: Node, action: int) -> Generator[Request, Any, Node]:
        if (node, action) not in self.pushed:
            token, logprob = self.tokens[node][action], float(self.logits[node][action])
            [self.pushed[node, action]] = yield Push([node], [token], [logprob])
        return self.pushed[node, action]


def _mean_logprob(node: Node) -> float:
    return node.logprob / max(1, node.answer_tokens)


def _move(
    model: _Model, top: Node, settings: Settings, noise: _Noise, reserve: int
) -> Generator[Request, Any, Node | None]:
    """Grows a tree from `top` -> the child to commit to, None where the budget paid for no simulation."""
    problem = model.problem
    logits, gumbel = noise.root(problem, top, model.logits[top], settings.rule)
    tree = new_tree(logits, model.values[top], gumbel, nodes=settings.simulations + 1)
    nodes: list[Node] = [top]
    # Ties alone are broken by it.
    seed = int(np.random.default_rng([noise.seed, problem.number, top.number, 1]).integers(2**31))
    nothing = Turn(np.int32(0), np.int32(0), np.int32(-1), np.zeros_like(logits), np.float32(0), np.bool_(False))
    found = nothing
    for _ in range(settings.simulations):
        if room(problem, 1, reserve) < 1:
            break
        tree, parent, action, known = yield Together(advance, (settings, tree, found, seed))
        node = yield from model.child(nodes[parent], action)
        if not (yield from model.look(node)):
            found = nothing
            break
        if known < 0:
            nodes.append(node)
        node.back_up(model.values[node])
        found = Turn(
            np.int32(parent), np.int32(action), np.int32(known if known >= 0 else len(nodes) - 1),
            model.logits.get(node, np.zeros_like(logits)), np.float32(model.values[node]), np.bool_(node.complete),
        )  # fmt: skip
    if len(nodes) == 1:
        return None
    action, weights, visits = yield Together(conclude, (settings, tree, found, seed))
    real = len(model.tokens[top])
    top.facts |= {
        "tokens": model.tokens[top], "weights": [float(x) for x in weights[:real]],
        "visits": [int(x) for x in visits[:real]],
    }  # fmt: skip
    return (yield from model.child(top, action))
