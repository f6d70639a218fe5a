"""Arrays of token-level search trees: `mctx.Tree`s of many prompts, descended and updated in one compiled call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import mctx
import numpy as np

Tree = mctx.Tree
Argument = tuple["Settings", Tree, "Turn", int]
"""Of one prompt: its settings, its tree without a batch axis, what the last descent found, and a seed for ties."""


class Settings(NamedTuple):
    """What compiled programs differ by."""

    rule: Literal["gumbel", "puct"]
    simulations: int
    considered: int
    max_depth: int
    value_scale: float
    maxvisit_init: float
    pb_c_init: float
    pb_c_base: float


class Turn(NamedTuple):
    """What a descent led to: the edge, the node's index, logits of its actions [A], its value, whether it is an end.

    An index below 0: nothing; there was no descent yet.
    """

    parent: Any
    action: Any
    index: Any
    logits: Any
    value: Any
    terminal: Any


def new_tree(logits: np.ndarray, value: float, gumbel: np.ndarray | None, *, nodes: int) -> Tree:
    """The arrays of a tree that holds its root: N nodes, A = len(logits) actions; no batch axis.

    `embeddings` [N] says of each node whether it is an end. Actions with a logit below -1e8 are invalid at the root.
    """
    actions = len(logits)

    def table(dtype: type, fill: int = 0) -> np.ndarray:
        return np.full((nodes, actions), fill, dtype)

    visits, values, priors = np.zeros(nodes, np.int32), np.zeros(nodes, np.float32), table(np.float32)
    visits[0], values[0], priors[0] = 1, value, logits
    return Tree(
        node_visits=visits, raw_values=values, node_values=values.copy(),
        parents=np.full(nodes, Tree.NO_PARENT, np.int32),
        action_from_parent=np.full(nodes, Tree.NO_PARENT, np.int32),
        children_index=table(np.int32, Tree.UNVISITED), children_prior_logits=priors,
        children_values=table(np.float32), children_visits=table(np.int32), children_rewards=table(np.float32),
        children_discounts=table(np.float32), embeddings=np.zeros(nodes, np.bool_),
        root_invalid_actions=(logits < -1e8).astype(np.float32),
        extra_data=None if gumbel is None else mctx.GumbelMuZeroExtraData(root_gumbel=gumbel),
    )  # fmt: skip


def advance(arguments: Sequence[Argument]) -> list[tuple[Tree, int, int, int]]:
    """Adds what the last descents found, and descends again: (tree, parent, action, child or -1) of each.

    A descent ends at an action without a node, at an end, or at the depth's limit; a child >= 0 is a node that was
    there. `Together` shares a call of it among prompts.
    """
    found = _batched(_advance, arguments)
    return [(tree, int(parent), int(action), int(child)) for tree, parent, action, child in found]


def conclude(arguments: Sequence[Argument]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(action, weights [A], visits [A]) of each tree: what to commit to, and the policy that the search improved."""
    return [(int(action), weights, visits) for action, weights, visits in _batched(_conclude, arguments)]


def _batched(function: Callable[..., Any], arguments: Sequence[Argument]) -> list[Any]:
    """One call for all of equal settings and shapes, padded to a power of two so that few programs are compiled."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for place, (settings, tree, *_) in enumerate(arguments):
        groups[settings, tree.children_index.shape].append(place)
    results: list[Any] = [None] * len(arguments)
    for (settings, _), places in groups.items():
        size = 1 << (len(places) - 1).bit_length()
        padded = places + [places[0]] * (size - len(places))
        stacked = [
            jax.tree.map(lambda *leaves: np.stack(leaves), *(arguments[place][part] for place in padded))
            for part in (1, 2)
        ]
        seeds = np.array([arguments[place][3] for place in padded], np.int32)
        out = jax.device_get(function(*stacked, seeds, settings=settings))
        for i, place in enumerate(places):
            results[place] = jax.tree.map(lambda leaf, i=i: leaf[i], out)
    return results


@partial(jax.jit, static_argnames="settings")
def _advance(trees: Tree, turns: Turn, seeds: Any, *, settings: Settings) -> Any:
    def one(tree: Tree, turn: Turn, seed: Any) -> Any:
        tree = _insert(tree, turn)
        return tree, *_descend(tree, jax.random.key(seed), settings)

    return jax.vmap(one)(trees, turns, seeds)


@partial(jax.jit, static_argnames="settings")
def _conclude(trees: Tree, turns: Turn, seeds: Any, *, settings: Settings) -> Any:
    del seeds
    return jax.vmap(lambda tree, turn: _choose(_insert(tree, turn), settings))(trees, turns)


def _insert(before: Any, turn: Turn) -> Any:
    """The node that a descent led to, and its value in the means of all above it."""
    tree, at, edge = before, turn.index, (turn.parent, turn.action)
    tree = tree.replace(
        node_visits=tree.node_visits.at[at].add(1), raw_values=tree.raw_values.at[at].set(turn.value),
        node_values=tree.node_values.at[at].set(turn.value), embeddings=tree.embeddings.at[at].set(turn.terminal),
        parents=tree.parents.at[at].set(turn.parent),
        action_from_parent=tree.action_from_parent.at[at].set(turn.action),
        children_prior_logits=tree.children_prior_logits.at[at].set(turn.logits),
        children_index=tree.children_index.at[edge].set(at),
        children_discounts=tree.children_discounts.at[edge].set(1.0),
    )  # fmt: skip

    def up(state: tuple[Any, Any]) -> tuple[Any, Any]:
        tree, node = state
        parent, action = tree.parents[node], tree.action_from_parent[node]
        visits = tree.node_visits[parent]
        mean = tree.node_values[parent] + (turn.value - tree.node_values[parent]) / (visits + 1).astype(jnp.float32)
        tree = tree.replace(
            children_values=tree.children_values.at[parent, action].set(tree.node_values[node]),
            children_visits=tree.children_visits.at[parent, action].add(1),
            node_values=tree.node_values.at[parent].set(mean), node_visits=tree.node_visits.at[parent].set(visits + 1),
        )  # fmt: skip
        return tree, parent

    after, _ = jax.lax.while_loop(lambda state: state[1] > Tree.ROOT_INDEX, up, (tree, at))
    return jax.tree.map(lambda new, old: jnp.where(at < 0, old, new), after, before)


def _descend(tree: Any, key: Any, settings: Settings) -> tuple[Any, Any, Any]:
    """(parent, action, child or -1) by the root's rule and the one below it."""

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        key, _, _, node, depth = state
        key, ties = jax.random.split(key)
        # mctx adds counts to probabilities.
        with jax.numpy_dtype_promotion("standard"):
            action = jax.lax.cond(depth == 0, *_rules(settings), ties, tree, node, depth)
        return key, node, action, tree.children_index[node, action], depth + 1

    def inside(state: tuple[Any, ...]) -> Any:
        _, _, _, child, depth = state
        return (child != Tree.UNVISITED) & ~tree.embeddings[child] & (depth < settings.max_depth)

    zero = jnp.zeros((), jnp.int32)
    _, parent, action, child, _ = jax.lax.while_loop(inside, step, step((key, zero, zero, zero, zero)))
    return parent, action, child


def _rules(settings: Settings) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Selection at the root and below: (key, tree, node, depth) -> action."""
    if settings.rule == "puct":
        puct = partial(mctx.muzero_action_selection, pb_c_init=settings.pb_c_init, pb_c_base=settings.pb_c_base)
        return lambda key, tree, node, _: puct(key, tree, node, 0), puct
    qtransform = _qtransform(settings)
    root = partial(
        mctx.gumbel_muzero_root_action_selection, num_simulations=settings.simulations,
        max_num_considered_actions=settings.considered, qtransform=qtransform,
    )  # fmt: skip
    below = partial(mctx.gumbel_muzero_interior_action_selection, qtransform=qtransform)
    return lambda key, tree, node, _: root(key, tree, node), below


def _qtransform(settings: Settings) -> Callable[..., Any]:
    return partial(
        mctx.qtransform_completed_by_mix_value, value_scale=settings.value_scale, maxvisit_init=settings.maxvisit_init
    )


def _choose(tree: Any, settings: Settings) -> tuple[Any, Any, Any]:
    root = jnp.int32(Tree.ROOT_INDEX)
    visits, invalid = tree.children_visits[root], tree.root_invalid_actions > 0
    logits = tree.children_prior_logits[root]
    most = visits == visits.max()
    if settings.rule == "puct":
        shares = visits.astype(jnp.float32) / jnp.maximum(1, visits.sum()).astype(jnp.float32)
        return jnp.argmax(jnp.where(most & ~invalid, logits, -jnp.inf)), shares, visits
    with jax.numpy_dtype_promotion("standard"):
        q = _qtransform(settings)(tree, root)
    score = tree.extra_data.root_gumbel + logits + q
    weights = jax.nn.softmax(jnp.where(invalid, -jnp.inf, logits + q))
    return jnp.argmax(jnp.where(most & ~invalid, score, -jnp.inf)), weights, visits
