"""What is trained, laid over what is frozen.

A method trains a nested dict that mirrors part of a model's parameters: arrays that replace the base's (a subset
of the weights), or entries such as `LowRank` that are added to them. `bind` lays this overlay over the frozen base
inside the train step, so that the model sees one tree of weight leaves; only the overlay gets gradients and
optimiser state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpost.models.table import flatten, nest
from jaxpost.ops.linear import LoRA, is_leaf, materialize
from jaxpost.types import Hyper, LossFn, Params, Terms


class LowRank(NamedTuple):
    """What is trained of one kernel [*L, I, O]: the update is scale * a @ b, the scale being frozen."""

    a: Float[Array, "*L I R"]
    b: Float[Array, "*L R O"]


def bind(base: Params, overlay: Params, scales: Params | None = None) -> Params:
    """The tree that the model reads: `base` with the overlay's arrays put in and its `LowRank`s wrapped around.

    Args:
      base: nested dict of arrays; may lack what the overlay brings as arrays.
      overlay: nested dict of arrays and `LowRank` entries.
      scales: nested dict with an array [*L] for every `LowRank`.

    Raises:
      ValueError: a `LowRank` without base kernel or without scale.

    Example:
      >>> import jax.numpy as jnp
      >>> base = {"q": {"kernel": jnp.ones((2, 3))}, "norm": {"scale": jnp.ones(2)}}
      >>> out = bind(base, {"norm": {"scale": jnp.zeros(2)}})
      >>> float(out["norm"]["scale"].sum()), out["q"]["kernel"].shape
      (0.0, (2, 3))
    """
    merged, factors = flatten(base), {} if scales is None else flatten(scales)
    for path, leaf in flatten(overlay).items():
        if isinstance(leaf, LowRank):
            if path not in merged:
                raise ValueError(f"the adapter's {'/'.join(path)} is no parameter of the base model")
            if path not in factors:
                raise ValueError(f"the adapter's {'/'.join(path)} has no scale; pass the scales made with it")
            merged[path] = LoRA(merged[path], leaf.a, leaf.b, factors[path])
        else:
            merged[path] = leaf
    return nest(merged)


def bind_policy(loss_fn: LossFn) -> LossFn:
    """The loss that sees the bound model: params["policy"] becomes frozen["base"] under the trained overlay.

    frozen["scales"] holds the scales of low-rank entries, where there are any.
    """

    def bound(params: Params, frozen: Params, batch: Any, key: PRNGKeyArray, hyper: Hyper) -> tuple[Terms, Terms]:
        policy = bind(frozen["base"], params["policy"], frozen.get("scales"))
        return loss_fn({**params, "policy": policy}, frozen, batch, key, hyper)

    return bound


def merge(bound: Params) -> Params:
    """Plain arrays: every weight leaf of a bound tree becomes the matrix it stands for, in the base's dtype."""
    return jax.tree.map(materialize, bound, is_leaf=is_leaf)


def select(params: Params, patterns: Iterable[str]) -> tuple[Params, Params]:
    """Split parameters into (trained, frozen) by glob patterns over paths such as "stacks/0/0/q_proj/kernel".

    `*` also matches "/". bind(frozen, trained) is the whole again.

    Raises:
      ValueError: a pattern matches nothing (the message lists what exists).

    Example:
      >>> trained, frozen = select({"a": {"scale": 1}, "b": {"kernel": 2}}, ["*scale"])
      >>> trained, frozen
      ({'a': {'scale': 1}}, {'b': {'kernel': 2}})
    """
    flat = flatten(params)
    names = {path: "/".join(path) for path in flat}
    chosen = set()
    for pattern in patterns:
        hits = {path for path, name in names.items() if fnmatchcase(name, pattern)}
        if not hits:
            raise ValueError(f"the pattern {pattern!r} matches no parameter; there are: {summary(flat)}")
        chosen |= hits
    part = lambda keep: nest({p: x for p, x in flat.items() if (p in chosen) == keep})  # noqa: E731
    return part(True), part(False)


def summary(paths: Iterable[tuple[str, ...]]) -> str:
    """Paths for a message, the numbers of stacks and blocks left out.

    Example:
      >>> summary([("stacks", "0", "0", "q_proj", "kernel"), ("stacks", "0", "1", "q_proj", "kernel")])
      'stacks/*/*/q_proj/kernel'
    """
    short = ["/".join("*" if part.isdigit() else part for part in path) for path in paths]
    return ", ".join(dict.fromkeys(short))


def count(tree: Mapping[str, Any]) -> int:
    """Number of scalars in a tree of arrays or shapes, for instance of trained parameters."""
    return sum(x.size for x in jax.tree.leaves(tree))
