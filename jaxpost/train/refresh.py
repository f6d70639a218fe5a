"""A reference policy that follows the trained one (TR-DPO, 2404.09656).

theta_ref <- mix theta + (1 - mix) theta_ref after every `every` applied updates: mix 1 replaces it (the paper's hard
update), less moves it a part of the way (soft). It lives in `state.extra["reference"]`, so that it is saved, restored
and sharded with everything else that training changes; the loss reads it as `frozen["reference"]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from jaxpost.metrics.terms import Sums
from jaxpost.train.step import PostUpdate
from jaxpost.types import Hyper, Params, TrainState, TrainStep


class Reference(NamedTuple):
    """What `state.extra["reference"]` holds."""

    params: Params
    """As `state.params`."""
    age: Int[Array, ""]
    """Applied updates since it was last refreshed."""


def with_reference(state: TrainState) -> TrainState:
    """The first state, with a copy of its parameters as the reference."""
    copy = jax.tree.map(lambda x: jnp.array(x, copy=True), state.params)
    return state._replace(extra=state.extra | {"reference": Reference(copy, jnp.zeros((), jnp.int32))})


def refresh_reference(*, every: int, mix: float = 1.0) -> PostUpdate:
    """A `post_update`: after every `every` applied updates the reference moves to mix theta + (1 - mix) theta_ref.

    Raises:
      ValueError: `every` is below 1, or `mix` not in (0, 1].

    Example:
      >>> import optax
      >>> from jaxpost.train.step import init_state
      >>> state = with_reference(init_state({"policy": jnp.zeros(())}, optax.sgd(0.1)))
      >>> state = state._replace(params={"policy": jnp.ones(())})
      >>> after, values = refresh_reference(every=2, mix=0.75), []
      >>> for _ in range(4):
      ...     state = after(state)
      ...     values.append(float(state.extra["reference"].params["policy"]))
      >>> values
      [0.0, 0.75, 0.75, 0.9375]
    """
    if every < 1 or not 0.0 < mix <= 1.0:
        raise ValueError(f"a reference is refreshed every n >= 1 updates by a share in (0, 1], got {every} and {mix}")

    def mixed(old: Params, new: Params) -> Params:
        if mix == 1.0:
            return new
        part = lambda r, p: ((1.0 - mix) * r.astype(jnp.float32) + mix * p.astype(jnp.float32)).astype(r.dtype)  # noqa: E731
        return jax.tree.map(part, old, new)

    def update(state: TrainState) -> TrainState:
        reference: Reference = state.extra["reference"]
        due = reference.age + 1 >= every
        params = jax.lax.cond(due, mixed, lambda old, new: old, reference.params, state.params)
        new = Reference(params, jnp.where(due, 0, reference.age + 1))
        return state._replace(extra=state.extra | {"reference": new})

    return update


def reads_reference(step: TrainStep, policy: Callable[[Params, Params], Params]) -> TrainStep:
    """The step whose loss finds the state's reference in frozen["reference"].

    Args:
      policy: (trained parameters, frozen) -> the tree that the model reads.
    """

    def run(
        state: TrainState, frozen: Params, batch: Any, key: PRNGKeyArray, hyper: Hyper
    ) -> tuple[TrainState, dict[str, Array]]:
        reference = policy(state.extra["reference"].params, frozen)
        return step(state, {**frozen, "reference": reference}, batch, key, hyper)

    return run


def eval_with_reference(
    eval_step: Callable[..., dict[str, Sums]], policy: Callable[[Params, Params], Params]
) -> Callable[..., dict[str, Sums]]:
    """The same of an evaluation step; its parameters come with the reference (`and_reference`)."""

    def run(params: Params, frozen: Params, batch: Any, key: PRNGKeyArray, hyper: Hyper) -> dict[str, Sums]:
        params = dict(params)
        reference = policy(params.pop("reference"), frozen)
        return eval_step(params, {**frozen, "reference": reference}, batch, key, hyper)

    return run


def and_reference(eval_params: Callable[[TrainState], Params]) -> Callable[[TrainState], Params]:
    """What is evaluated, with the state's reference beside it."""
    return lambda state: {**eval_params(state), "reference": state.extra["reference"].params}
