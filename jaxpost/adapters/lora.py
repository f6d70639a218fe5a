"""LoRA (2106.09685): W = W0 + scale * A B with W0 frozen, A [in, r] random, B [r, out] zero at the start.

scale = alpha / r, or alpha / sqrt(r) for rsLoRA (2312.03732). A starts uniform in +-1/sqrt(in), as PEFT's does.
Kernels of a stack are adapted together: A is [L, in, r], B [L, r, out], scale [L].
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxpost.adapters.bind import LowRank, summary
from jaxpost.config import LoRASection
from jaxpost.models.table import flatten, nest
from jaxpost.types import Params, ParamSpec


def linear_kernels(table: Iterable[ParamSpec]) -> dict[tuple[str, ...], ParamSpec]:
    """The matrices that can be adapted: every kernel, the head's included, no embedding."""
    return {spec.path: spec for spec in table if spec.path[-1] == "kernel"}


def find_targets(table: Iterable[ParamSpec], targets: Iterable[str]) -> list[ParamSpec]:
    """The kernels that `targets` name, in the table's order.

    Args:
      table: the model's parameter table.
      targets: each "all-linear" (every kernel of every block, not the head), a module's name ("q_proj"), or a glob
        over paths with or without the final "/kernel" ("stacks/0/*", "*/q_proj").

    Raises:
      ValueError: a target matches no kernel, or an embedding (the message lists what exists).
    """
    table = tuple(table)
    kernels = linear_kernels(table)
    chosen: set[tuple[str, ...]] = set()
    for target in targets:
        hits = {path for path in kernels if _matches(path, target)}
        if not hits:
            what = "an embedding" if any(target in s.path for s in table if s.path[0] == "embed") else "no linear layer"
            raise ValueError(
                f"adapter.targets: {target!r} names {what} of this model; "
                f"there are: {', '.join(dict.fromkeys(path[-2] for path in kernels))} (paths {summary(kernels)})"
            )
        chosen |= hits
    return [spec for path, spec in kernels.items() if path in chosen]


def _matches(path: tuple[str, ...], target: str) -> bool:
    if target == "all-linear":
        return path[0] == "stacks"
    name = "/".join(path)
    return target == path[-2] or fnmatchcase(name, target) or fnmatchcase(name.removesuffix("/kernel"), target)


def init(
    key: PRNGKeyArray, table: Iterable[ParamSpec], section: LoRASection, *, dtype: Any = jnp.float32
) -> tuple[Params, Params]:
    """New adapters: (overlay, scales), to be bound with `bind(base, overlay, scales)`.

    Args:
      key: folded by each kernel's path, so a kernel's start does not depend on which others are adapted.
      table: the model's parameter table.
      section: rank, alpha, targets.

    Returns:
      The trained overlay, a nested dict of `LowRank`, and its frozen scales, a nested dict of float32 arrays [*L].

    Raises:
      ValueError: see `find_targets`; or a rank below 1.
    """
    if section.rank < 1:
        raise ValueError(f"adapter.rank must be at least 1, got {section.rank}")
    scale = section.alpha / (math.sqrt(section.rank) if section.rslora else section.rank)
    overlay, scales = {}, {}
    for spec in find_targets(table, section.targets):
        *lead, inputs, outputs = spec.shape
        bound = 1.0 / math.sqrt(inputs)
        own = jax.random.fold_in(key, zlib.crc32("/".join(spec.path).encode()))
        a = jax.random.uniform(own, (*lead, inputs, section.rank), jnp.float32, -bound, bound)
        overlay[spec.path] = LowRank(a.astype(dtype), jnp.zeros((*lead, section.rank, outputs), dtype))
        scales[spec.path] = jnp.full(tuple(lead), scale, jnp.float32)
    return nest(overlay), nest(scales)


def axes_tree(table: Iterable[ParamSpec], overlay: Params) -> Params:
    """Logical axes of an overlay's arrays: those of the kernels, the rank unsharded. Arrays keep their own.

    For `sharding.param_shardings(axes_tree(table, overlay), mesh, overlay)`.
    """
    specs = {spec.path: spec for spec in table}

    def one(path: tuple[str, ...], leaf: Any) -> Any:
        axes = specs[path].axes
        if not isinstance(leaf, LowRank):
            return axes
        return LowRank._make(((*axes[:-1], "rank"), (*axes[:-2], "rank", axes[-1])))

    return nest({path: one(path, leaf) for path, leaf in flatten(overlay).items()})
