"""Other layouts of the same parameters, for programs that only read them: layers apart, projections side by side."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpost.ops import platform
from jaxpost.ops.linear import Panels, linear
from jaxpost.types import Params

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
HEAD = "head_panels"
"""Where `for_decoding` puts a tied head."""


def project(weights: Params, names: tuple[str, ...], x: Float[Array, "*B D"]) -> list[Array]:
    """x times each named projection: in one product where `join` has put them side by side.

    Example:
        >>> weights = {name: {"kernel": jnp.full((2, 3), float(i))} for i, name in enumerate(GATE_UP)}
        >>> [y.tolist() for y in project(weights, GATE_UP, jnp.ones((1, 2)))]
        [[[0.0, 0.0, 0.0]], [[2.0, 2.0, 2.0]]]
    """
    joined = weights.get(_together(names))
    if joined is None or "parts" not in joined:
        return [linear(x, weights[name]["kernel"], weights[name].get("bias")) for name in names]
    y = linear(x, joined["kernel"], joined.get("bias"))
    widths = [part.shape[-1] for part in joined["parts"]]
    ends = [sum(widths[:i]) for i in range(1, len(widths))]
    return jnp.split(y, ends, axis=-1)


def join(weights: Params) -> Params:
    """One layer's parameters with the projections that read the same input side by side.

    A product with few rows takes as long as its weights take to read, and each product has a price of its own.
    """
    out = dict(weights)
    for names in (QKV, GATE_UP):
        parts = [out.pop(name) for name in names]
        # The parts' widths travel as shapes, which any transformation of the tree keeps.
        joined = {"parts": [jnp.zeros((0, part["kernel"].shape[-1])) for part in parts]}
        for leaf in parts[0]:
            joined[leaf] = jnp.concatenate([part[leaf] for part in parts], axis=-1)
        out[_together(names)] = joined
    return out


def unstack(params: Params) -> Params:
    """The same parameters with every stack as a list of its layers, which `forward` then runs one by one.

    A scan copies each layer's slice of a stack before it multiplies: for a few rows this costs more than the
    products. The price is a program that grows with depth, and a copy of the weights.

    Example:
        >>> params = {"stacks": {"0": {"0": {"o_proj": {"kernel": jnp.ones((2, 3, 4))}}}}}
        >>> [layer["0"]["o_proj"]["kernel"].shape for layer in unstack(params)["stacks"]["0"]]
        [(3, 4), (3, 4)]
    """

    def layers(stack: Params) -> list[Params]:
        count = jax.tree.leaves(stack)[0].shape[0]
        return [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(count)]

    return params | {"stacks": {name: layers(stack) for name, stack in params["stacks"].items()}}


def for_decoding(params: Params, *, panels: bool = False) -> Params:
    """Layers apart and projections side by side; plain arrays only (LoRA leaves merged).

    Args:
        panels: kernels in panels where the platform gains by it, for a few rows at a time (one gains nothing). A tied
            head gets panels of its own, beside the table that tokens are looked up in.
    """
    rule = _panel_rule() if panels else None
    stacks = {
        name: [_layer(stack, i, rule=rule) for i in range(jax.tree.leaves(stack)[0].shape[0])]
        for name, stack in params["stacks"].items()
    }
    laid = params | {"stacks": stacks}
    # A mixture of models has their tables elsewhere, and reads them as they are.
    tied = rule is not None and "lm_head" not in params and "embed" in params
    head = _head(params["embed"]["table"], rule=rule) if tied else None
    return laid | ({HEAD: head} if isinstance(head, Panels) else {})


@partial(jax.jit, static_argnames="rule")
def _layer(stack: Params, index: Int[Array, ""] | int, *, rule: platform.PanelRule | None) -> Params:
    """One layer of a stack as decoding reads it: one program for all layers, which reads and writes a weight once."""
    layer = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), stack)
    return {block: _cut(join(weights), rule) for block, weights in layer.items()}


@partial(jax.jit, static_argnames="rule")
def _head(table: Float[Array, "V D"], *, rule: platform.PanelRule | None) -> Array | Panels:
    return _in_panels(table.T, rule)


def _panel_rule() -> platform.PanelRule | None:
    """The platform's rule for panels, where it has as few threads as they are good for."""
    rule = platform.choices().panels
    return None if rule is None or platform.threads() > rule.threads else rule


def _in_panels(kernel: Array, rule: platform.PanelRule | None) -> Array | Panels:
    """A float32 kernel in panels; as it is, without a rule or where there would be too few of them."""
    if rule is None or kernel.ndim != 2 or kernel.dtype != jnp.float32:
        return kernel
    fits = [width for width in rule.widths if kernel.shape[1] % width == 0 and kernel.shape[1] // width >= rule.least]
    return Panels.of(kernel, width=fits[0], groups=rule.groups) if fits else kernel


def _cut(weights: Any, rule: platform.PanelRule | None) -> Any:
    if not isinstance(weights, dict):
        return weights
    return {name: _in_panels(leaf, rule) if name == "kernel" else _cut(leaf, rule) for name, leaf in weights.items()}


def _together(names: tuple[str, ...]) -> str:
    return "+".join(names)
