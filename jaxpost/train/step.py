"""One optimiser step: exact means over microbatches, devices and hosts; guarded; never jitted inside.

Let term i of the loss have values v and weights w over all elements of the whole batch, and coefficient c_i:

  loss = sum_i c_i (sum v w) / W_i,  W_i = sum w   (a term with W_i = 0 counts 0)

How that is differentiated over microbatches: `train.gradients`, and `train.coupled` where rows depend on one another.

An update is skipped, inside the compiled step, when every W_i is 0 (nothing to learn from), when the loss or the
gradient's norm is not finite, or when the norm exceeds `hyper["spike_factor"]` times its running mean. A skipped
step leaves parameters, optimiser and everything in `state.extra` but the counters as they were; it counts as
a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from jaxpost.metrics.terms import means, reduce_terms
from jaxpost.train.coupled import coupled_gradients, uncoupled
from jaxpost.train.gradients import plain_gradients
from jaxpost.train.optim import hold
from jaxpost.types import Coupled, Hyper, LossFn, Params, TrainState, TrainStep

GUARD_HISTORY = 10
"""Accepted steps before the spike guard judges: a mean of fewer says little."""
GUARD_MEMORY = 50
"""Accepted steps over which the running mean of gradient norms forgets."""


class Guard(NamedTuple):
    """What the guard remembers, in `state.extra["guard"]`."""

    skipped: Int[Array, ""]
    """Updates skipped so far."""
    consecutive: Int[Array, ""]
    """Updates skipped since the last accepted one."""
    accepted: Int[Array, ""]
    norm_mean: Float[Array, ""]
    """Running mean of accepted gradient norms."""


@runtime_checkable
class UpdateRule(Protocol):
    """How gradients become new parameters: methods that are no plain gradient step replace it."""

    def __call__(
        self,
        optimizer: optax.GradientTransformation,
        grads: Params,
        state: TrainState,
        *,
        frozen: Params,
        batch: Any,
        key: PRNGKeyArray,
        hyper: Hyper,
        skip: Bool[Array, ""],
    ) -> tuple[Params, Any]:
        """The new (params, opt_state); where `skip`, opt_state is as it was (params are put back by the step)."""
        ...


PostUpdate = Callable[[TrainState], TrainState]


def gradient_update(
    optimizer: optax.GradientTransformation,
    grads: Params,
    state: TrainState,
    *,
    frozen: Params,
    batch: Any,
    key: PRNGKeyArray,
    hyper: Hyper,
    skip: Bool[Array, ""],
) -> tuple[Params, Any]:
    """The default rule: params + optimizer.update(grads), summed in float32 and stored in the parameters' dtype."""
    tx = optax.with_extra_args_support(optimizer)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        updates, opt_state = tx.update(grads, state.opt_state, state.params, step=state.step, skip=skip)
    opt_state = hold(skip, state.opt_state, opt_state)
    add32 = lambda p, u: (p.astype(jnp.float32) + u.astype(jnp.float32)).astype(p.dtype)  # noqa: E731
    return jax.tree.map(add32, state.params, updates), opt_state


def ema_update(decay: float) -> PostUpdate:
    """A `post_update`: extra["ema"] <- decay * ema + (1 - decay) * params, in float32.

    Example:
      >>> state = init_state({"policy": jnp.zeros(())}, optax.sgd(0.1), ema=True)
      >>> state = state._replace(params={"policy": jnp.ones(())})
      >>> float(ema_update(0.75)(state).extra["ema"]["policy"])
      0.25
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"ema_decay must lie in [0, 1), got {decay}")

    def update(state: TrainState) -> TrainState:
        mix = lambda e, p: decay * e + (1.0 - decay) * p.astype(jnp.float32)  # noqa: E731
        ema = jax.tree.map(mix, state.extra["ema"], state.params)
        return state._replace(extra=state.extra | {"ema": ema})

    return update


def row_keys(key: PRNGKeyArray, row_ids: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key per row, by the row's identity: its noise does not depend on its slot or microbatch.

    Example:
      >>> keys = row_keys(jax.random.key(0), jnp.array([7, 9]))
      >>> bool(keys[1] == row_keys(jax.random.key(0), jnp.array([9]))[0])
      True
    """
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    ema: bool = False,
    memory: Any = (),
) -> TrainState:
    """The state before the first step. Pure: `jax.eval_shape` and `jax.jit` with shardings take it as it is.

    Args:
      params: all that is trained, a dict of networks.
      ema: also keep an exponential moving average (`ema_update`) in `extra["ema"]`, from a copy of `params`.
      memory: of a `Coupled` loss, kept in `extra["memory"]`.

    Example:
      >>> state = init_state({"policy": jnp.zeros(3)}, optax.sgd(0.1))
      >>> int(state.step), int(state.extra["guard"].skipped)
      (0, 0)
    """
    # Separate arrays: a donated state must not hold one buffer twice.
    zero = lambda dtype: jnp.zeros((), dtype)  # noqa: E731
    guard = Guard(zero(jnp.int32), zero(jnp.int32), zero(jnp.int32), zero(jnp.float32))
    extra = {"guard": guard}
    if ema:
        extra["ema"] = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
    if jax.tree.leaves(memory):
        extra["memory"] = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), memory)
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer.init(params)
    return TrainState(zero(jnp.int32), params, opt_state, extra)


def make_train_step(
    loss_fn: LossFn | Coupled,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    skip_empty: bool = False,
    update_rule: UpdateRule = gradient_update,
    post_update: PostUpdate | None = None,
) -> TrainStep:
    """step(state, frozen, batch, key, hyper) -> (state, metrics); the caller jits it and donates the state.

    Args:
      loss_fn: unreduced terms and metrics (`types.LossFn`); its key is `key` folded by the step's number. Of a
        `types.Coupled` loss, which sees all rows at once, what it remembers is in `state.extra["memory"]`.
      num_microbatches: pieces whose gradients are summed one after another; must divide the batch's rows.
      skip_empty: do not compute microbatches in which every term's weight is 0 (rows kept for a batch's shape alone).
      update_rule: gradients -> (params, opt_state).
      post_update: a pure state -> state after an accepted update (moving averages, reference sync).

    Returns:
      The step. Its metrics, float32 or int32 scalars: "loss", every term and metric by name, "weight/<term>" (the
      term's total weight), "grad_norm", "skipped" with its reasons "empty", "nonfinite", "spike" (0 or 1), and the
      counts "skips" and "consecutive_skips".

    Example:
      >>> from jaxpost.types import Term
      >>> def mse(params, frozen, batch, key, hyper):
      ...     return {"mse": Term((batch - params["w"]) ** 2, jnp.ones_like(batch))}, {}
      >>> tx = optax.sgd(0.5)
      >>> step = jax.jit(make_train_step(mse, tx, num_microbatches=2))
      >>> state, metrics = step(init_state({"w": jnp.zeros(())}, tx), None, jnp.arange(4.0), jax.random.key(0), {})
      >>> float(state.params["w"]), float(metrics["loss"])  # the mean of 0..3; (0 + 1 + 4 + 9) / 4
      (1.5, 3.5)
    """
    how = {"num_microbatches": num_microbatches, "skip_empty": skip_empty}
    gradients = coupled_gradients(loss_fn, **how) if isinstance(loss_fn, Coupled) else plain_gradients(loss_fn, **how)

    def step(
        state: TrainState, frozen: Params, batch: Any, key: PRNGKeyArray, hyper: Hyper
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        grads, sums, weights, extra = gradients(state, frozen, batch, key, hyper)
        metrics = means(sums)
        grad_norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        guard, reasons = _judge(state.extra["guard"], metrics["loss"], grad_norm, weights, hyper)

        skip = reasons["skipped"] > 0
        how = {"frozen": frozen, "batch": batch, "key": key, "hyper": hyper, "skip": skip}
        params, opt_state = update_rule(optimizer, grads, state, **how)
        new = TrainState(state.step + 1, params, opt_state, state.extra | extra)
        new = new if post_update is None else post_update(new)
        kept = partial(jax.tree.map, partial(jnp.where, skip))
        extra = kept(state.extra, new.extra) | {"guard": guard}
        new = TrainState(state.step + 1, kept(state.params, new.params), new.opt_state, extra)
        metrics |= {f"weight/{name}": w for name, w in weights.items()}
        metrics |= {"grad_norm": grad_norm, "skips": guard.skipped, "consecutive_skips": guard.consecutive}
        return new, metrics | reasons

    return step


def _judge(
    guard: Guard, loss: Array, grad_norm: Array, weights: dict[str, Array], hyper: Hyper
) -> tuple[Guard, dict[str, Array]]:
    """Whether to skip this update and why, and what the guard remembers after it."""
    empty = jnp.all(jnp.stack([w == 0 for w in weights.values()]))
    nonfinite = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    spike = jnp.zeros((), bool)
    if "spike_factor" in hyper:
        spike = (guard.accepted >= GUARD_HISTORY) & (grad_norm > hyper["spike_factor"] * guard.norm_mean)
    skip = empty | nonfinite | spike
    accepted = guard.accepted + 1
    rate = 1.0 / jnp.minimum(accepted, GUARD_MEMORY).astype(jnp.float32)
    norm_mean = guard.norm_mean + rate * (grad_norm - guard.norm_mean)
    one = skip.astype(jnp.int32)
    new = Guard(
        guard.skipped + one,
        jnp.where(skip, guard.consecutive + 1, 0),
        jnp.where(skip, guard.accepted, accepted),
        jnp.where(skip, guard.norm_mean, norm_mean),
    )
    reasons = {"skipped": skip, "empty": empty, "nonfinite": nonfinite & ~empty, "spike": spike & ~empty & ~nonfinite}
    return new, {name: flag.astype(jnp.int32) for name, flag in reasons.items()}


def make_eval_step(loss_fn: LossFn | Coupled, *, keep: Sequence[str] = ()) -> Callable[..., Any]:
    """eval_step(params, frozen, batch, key, hyper) -> unreduced sums of every term and metric. Not jitted.

    Add them over batches (`metrics.terms.add`) and divide once (`metrics.terms.means`): the result is the mean over
    all tokens of all batches, whatever their sizes. A coupled loss is taken batch by batch, without memory.

    Args:
      keep: metrics that are no means; they come back as they are, (sums, {name: value}).
    """
    whole = uncoupled(loss_fn) if isinstance(loss_fn, Coupled) else loss_fn

    def eval_step(params: Params, frozen: Params, batch: Any, key: PRNGKeyArray, hyper: Hyper) -> Any:
        terms, metrics = whole(params, frozen, batch, key, hyper)
        sums = reduce_terms(terms, {name: term for name, term in metrics.items() if name not in keep})
        return (sums, {name: metrics[name].value for name in keep}) if keep else sums

    return eval_step
