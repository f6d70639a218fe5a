"""Products of activations with weight leaves: plain arrays, or a frozen base with a low-rank update.

Letters: I input width, O output width, R rank. Kernels are [I, O]; a stack's kernels lead with its repeats.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from jaxpost.ops import platform


class LoRA(NamedTuple):
    """The weight `base + scale * a @ b` that is never formed (2106.09685).

    `scale` has the leading axes of the kernels (one number per layer), so that the leaf scans like an array.
    """

    base: Shaped[Array, "*L I O"]
    a: Float[Array, "*L I R"]
    b: Float[Array, "*L R O"]
    scale: Float[Array, "*L"]


class Panels(NamedTuple):
    """A kernel [I, O] as panels of neighbouring columns, P of them in each group: panel p of a group is [I, W].

    A product with few rows takes as long as its kernel takes to read, and a panel is read in one run of memory, where
    the same columns of the whole kernel are many short runs. Groups may be worked on side by side.
    """

    groups: tuple[Shaped[Array, "P I W"], ...]

    @staticmethod
    def of(kernel: Shaped[Array, "I O"], *, width: int, groups: int) -> Panels:
        """Cuts a kernel whose columns are a multiple of `width`.

        Example:
            >>> [group.shape for group in Panels.of(jnp.ones((3, 10)), width=2, groups=2).groups]
            [(2, 3, 2), (3, 3, 2)]
        """
        inputs, outputs = kernel.shape
        count = outputs // width
        groups = min(groups, count)
        cut = jnp.moveaxis(kernel.reshape(inputs, count, width), 1, 0)
        bounds = [count * i // groups for i in range(groups + 1)]
        return Panels(tuple(cut[a:b] for a, b in pairwise(bounds)))


Weight = Array | LoRA
_LEAST_IN_PARTS = 2**18
"""Weights of a kernel that one row reads in parts: below, starting the parts takes as long as reading them."""


def materialize(weight: Weight) -> Array:
    """The plain array that a weight leaf stands for, in the base's dtype.

    Example:
        >>> leaf = LoRA(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.asarray(0.5))
        >>> float(materialize(leaf)[0, 0])
        1.5
    """
    if isinstance(weight, LoRA):
        product = jnp.matmul(weight.a, weight.b, preferred_element_type=jnp.float32)
        update = weight.scale.astype(jnp.float32)[..., None, None] * product
        return (weight.base.astype(jnp.float32) + update).astype(weight.base.dtype)
    return weight


def linear(
    x: Float[Array, "*B I"],
    weight: Weight | Panels,
    bias: Array | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*B O"]:
    """x W + bias; for a LoRA leaf x W0 + scale (x A) B + bias.

    Leading axes are flattened before the product: one large matrix product is much faster than many small
    ones on a CPU, and no slower elsewhere.

    Args:
        x: activations; their dtype is the dtype of computation.
        weight: kernel [I, O] or a leaf without leading axes, of any float dtype.
        bias: [O] or None.
        dtype: of the result; None for x's own.

    Example:
        >>> linear(jnp.ones((2, 5, 3)), jnp.ones((3, 4)), jnp.ones(4)).shape
        (2, 5, 4)
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Panels):
        y = _by_panels(rows, weight, dtype)
    elif not isinstance(weight, LoRA):
        parts = platform.choices().row_parts
        y = _in_parts(rows, weight, parts, dtype) if _worth_parts(rows, weight, parts) else _dot(rows, weight, 0, dtype)
    elif _worth_updating(rows, weight, dtype):
        y = _updated(rows, weight.base, weight.scale * weight.a, weight.b)
    else:
        low = checkpoint_name(_scaled(weight, _dot(rows, weight.a, 0)), platform.LINEAR_OUTPUT)
        y = _dot(rows, weight.base, 0, dtype) + _dot(low, weight.b, 0, dtype)
    y = checkpoint_name(y, platform.LINEAR_OUTPUT)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def linear_transposed(
    x: Float[Array, "*B O"], weight: Weight, *, dtype: DTypeLike | None = None
) -> Float[Array, "*B I"]:
    """x W^T, without forming the transpose: the unembedding with a tied table. `dtype`: of the result."""
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, LoRA):
        low = _scaled(weight, _dot(rows, weight.b, 1))
        y = _dot(rows, weight.base, 1, dtype) + _dot(low, weight.a, 1, dtype)
    else:
        y = _dot(rows, weight, 1, dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def take_rows(weight: Weight, ids: Int[Array, "*B"]) -> Float[Array, "*B O"]:
    """Rows of a table, W[ids]. An id outside the table gives NaN, not another row."""
    if isinstance(weight, LoRA):
        low = _scaled(weight, take_rows(weight.a, ids))
        rows = take_rows(weight.base, ids)
        update = _dot(low.reshape(-1, low.shape[-1]), weight.b, 0, rows.dtype)
        return rows + update.reshape(rows.shape)
    return jnp.take(weight, ids, axis=0, mode="fill", fill_value=jnp.nan)


def _by_panels(rows: Array, weight: Panels, dtype: DTypeLike | None) -> Array:
    """rows W, each group as one product with a panel at a time."""

    def group(panels: Array) -> Array:
        copies = jnp.broadcast_to(rows, (panels.shape[0], *rows.shape))
        return lax.dot_general(copies, panels.astype(rows.dtype), (((2,), (1,)), ((0,), (0,))))

    y = jnp.concatenate([group(panels) for panels in weight.groups])
    return jnp.moveaxis(y, 0, 1).reshape(rows.shape[0], -1).astype(dtype or rows.dtype)


def _worth_parts(rows: Array, kernel: Array, parts: int) -> bool:
    """Whether one row meets a float32 kernel that takes long enough to read, and divides."""
    large = kernel.dtype == rows.dtype == jnp.float32 and kernel.size >= _LEAST_IN_PARTS
    return parts > 1 and rows.shape[0] == 1 and large and kernel.shape[0] % parts == 0


def _in_parts(row: Float[Array, "1 I"], kernel: Float[Array, "I O"], parts: int, dtype: DTypeLike | None) -> Array:
    """row W as the sum of products with neighbouring rows of the kernel, each read in one run by one thread."""
    inputs, outputs = kernel.shape
    each = (parts, inputs // parts)
    sums = lax.dot_general(row.reshape(1, *each), kernel.reshape(*each, outputs), (((2,), (1,)), ((1,), (0,))))
    return jnp.sum(sums, axis=0).astype(dtype or row.dtype)


def _scaled(weight: LoRA, low: Array) -> Array:
    """The scale goes to the [.., R] factor, the smallest array that it can multiply."""
    return weight.scale.astype(low.dtype) * low


def _worth_updating(rows: Array, weight: LoRA, dtype: DTypeLike | None) -> bool:
    """Whether one layer's W0 + s A B costs less than a second pass over the result, and rounds no differently."""
    arrays = (rows, weight.base, weight.a, weight.b, weight.scale)
    return (
        platform.choices().update_kernels
        and rows.shape[0] >= weight.base.shape[0]
        and all(x.dtype == jnp.float32 for x in arrays)
        and dtype in (None, jnp.float32)
    )


@jax.custom_vjp
def _updated(rows: Array, base: Array, a: Array, b: Array) -> Array:
    """rows (base + a b) in one product, the sum of one layer formed and forgotten; gradients stay low-rank."""
    return _dot(rows, base + _dot(a, b, 0), 0)


def _updated_forward(rows: Any, base: Any, a: Any, b: Any) -> tuple[Array, tuple[Any, ...]]:
    arrays = tuple(x.value for x in (rows, base, a, b))
    # Where the base is frozen nobody asks for its gradient, the largest product of all.
    return _updated(*arrays), (*arrays, () if base.perturbed else None)


def _updated_backward(residuals: tuple[Any, ...], d_y: Any) -> tuple[Array | None, ...]:
    rows, base, a, b, trained = residuals
    if isinstance(d_y, SymbolicZero):
        return None, None, None, None
    d_rows = _dot(d_y, base + _dot(a, b, 0), 1)
    d_a = _dot(rows.T, _dot(d_y, b, 1), 0)
    d_b = _dot(_dot(rows, a, 0).T, d_y, 0)
    return d_rows, None if trained is None else _dot(rows.T, d_y, 0), d_a, d_b


_updated.defvjp(_updated_forward, _updated_backward, symbolic_zeros=True)


def _dot(rows: Array, kernel: Array, contract: int, dtype: DTypeLike | None = None) -> Array:
    """rows [M, I] times kernel over its axis `contract`, in `dtype` or the rows' own."""
    out = dtype or rows.dtype
    wide = jnp.dtype(out) != rows.dtype or (platform.choices().float32_products and rows.dtype != jnp.float32)
    y = lax.dot_general(
        rows,
        kernel.astype(rows.dtype),
        (((1,), (contract,)), ((), ())),
        preferred_element_type=jnp.float32 if wide else None,
    )
    return y.astype(out)


def is_leaf(x: object) -> bool:
    """Whether a tree traversal should stop: at weight leaves that hold several arrays.

    Example:
        >>> is_leaf(LoRA(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.asarray(0.5)))
        True
    """
    return isinstance(x, LoRA)
