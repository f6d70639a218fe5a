"""Optimisers and learning-rate schedules, made from `config.OptimSection`.

Parameters are matrices if their last two axes are one (kernels [in, out] or stacked [L, in, out], embeddings,
adapter factors); norms and biases are not, stacked or not. Moments and arithmetic are float32 whatever the
parameters' dtype. The learning rate is a function of the step given to `update`, not of a counter inside the
optimiser's state: a skipped update does not delay the schedule, and `lr_at(step)` is what was used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax import lax

from jaxpost.config import AdafactorSection, AdamWSection, LionSection, OptimSection, ScheduleSection
from jaxpost.ops import platform

Schedule = Callable[[Any], Any]


def make_schedule(section: ScheduleSection, num_steps: int) -> Schedule:
    """Fraction of the learning rate at step t = 0, 1, ..., `num_steps` - 1, from 1 at the end of warm-up.

    With w warm-up steps and u = (t - w) / (num_steps - 1 - w), clipped to [0, 1]:
      warm-up (t < w)  (t + 1) / (w + 1)
      constant         1
      linear           1 - (1 - final) u
      cosine           final + (1 - final) (1 + cos(pi u)) / 2
      wsd              1, then linear to `final` over the last `decay` steps (2404.06395)

    Raises:
      ValueError: warm-up and decay do not fit into the run.

    Example:
      >>> f = make_schedule(ScheduleSection(kind="linear", warmup=2.0), 5)
      >>> [round(float(f(t)), 3) for t in range(5)]
      [0.333, 0.667, 1.0, 0.5, 0.0]
    """
    warmup = _steps(section.warmup, num_steps, "warmup")
    decay = _steps(section.decay, num_steps, "decay") if section.kind == "wsd" else 0
    if section.decay < 1:  # fractions give way to each other's rounding in very short runs
        decay = min(decay, max(0, num_steps - warmup))
    if warmup + decay > num_steps:
        raise ValueError(f"optim.schedule: {warmup} warm-up and {decay} decay steps exceed the run's {num_steps} steps")
    last = num_steps - 1

    def at(step: Any) -> Any:
        t = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum((t + 1.0) / (warmup + 1.0), 1.0)
        if section.kind == "constant":
            return ramp
        start = last - decay if section.kind == "wsd" else warmup
        u = jnp.clip((t - start) / max(last - start, 1), 0.0, 1.0)
        shape = 0.5 * (1.0 + jnp.cos(jnp.pi * u)) if section.kind == "cosine" else 1.0 - u
        return ramp * (section.final + (1.0 - section.final) * shape)

    return at


def _steps(value: float, num_steps: int, name: str) -> int:
    """Steps (>= 1), or a fraction of all steps (< 1), as `ScheduleSection` counts."""
    if value < 0:
        raise ValueError(f"optim.schedule.{name} must not be negative, got {value}")
    return math.ceil(value * num_steps - 1e-9) if value < 1 else round(value)


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a parameter is a matrix, or a stack of matrices: norms and biases are vectors even when stacked."""
    return leaf.ndim >= 2 and _names(path)[-1] not in ("scale", "bias")


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]


def _mask(params: Any) -> Any:
    return jax.tree.map_with_path(is_matrix, params)


def _muon_axes(params: Any) -> Any:
    """Muon's axes for hidden matrices ([..., in, out]); None, that is AdamW, for embeddings, heads and vectors."""

    def axes(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        outer = {"embed", "lm_head", "head", "value"} & set(_names(path))
        return optax.contrib.MuonDimensionNumbers(-2, -1) if is_matrix(path, leaf) and not outer else None

    return jax.tree.map_with_path(axes, params)


def scale_by_step(schedule: Schedule, factor: float) -> optax.GradientTransformationExtraArgs:
    """updates -> factor * schedule(step) * updates, with `step` given to `update` by the train step."""

    def update(updates: Any, state: Any, params: Any = None, *, step: Any, **_: Any) -> tuple[Any, Any]:
        scale = factor * schedule(step)
        return jax.tree.map(lambda u: scale.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # ty: ignore[invalid-argument-type]


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same optimiser with float32 moments and arithmetic, for parameters of any floating dtype."""
    tx = optax.with_extra_args_support(tx)
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return tx.update(cast(updates), state, None if params is None else cast(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(cast(params)), update)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """g -> g min(1, limit / |g|), |g| over all parameters (1211.5063).

    One factor for all: optax's division and choice are as loops of their own over every gradient.

    Example:
      >>> tx = clip_by_global_norm(1.0)
      >>> [round(float(x), 3) for x in tx.update([jnp.array(3.0), jnp.array(4.0)], tx.init([]))[0]]
      [0.6, 0.8]
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class HeldAdamState(optax.ScaleByAdamState):
    """The state of `scale_by_adam`, which puts moments back itself where a step is skipped."""


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """(m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps), m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2 (1412.6980).

    optax.scale_by_adam, but that m' and v' are m and v where the step is skipped, and, where `ops.platform` says so,
    stored before the update is formed from them.
    """
    plain = optax.scale_by_adam(b1, b2, eps)

    def init(params: Any) -> HeldAdamState:
        state: Any = plain.init(params)
        return HeldAdamState(*state)

    def update(updates: Any, state: Any, params: Any = None, *, skip: Any = False, **_: Any) -> tuple[Any, Any]:
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        new = hold(skip, tuple(state), (state.count + 1, mu, nu))
        new = lax.optimization_barrier(new) if platform.choices().staged_update else new
        count, mu, nu = new
        at = jnp.maximum(count, 1)  # a skipped first step divides by no zero
        corrected = (optax.tree.bias_correction(mu, b1, at), optax.tree.bias_correction(nu, b2, at))
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), *corrected), HeldAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def hold(skip: Any, old: Any, new: Any) -> Any:
    """The optimiser's state after a step: `old` where it is skipped, else `new`.

    Example:
      >>> hold(jnp.array(True), {"mu": jnp.zeros(())}, {"mu": jnp.ones(())})["mu"].item()
      0.0
    """
    held = lambda x: isinstance(x, HeldAdamState)  # noqa: E731
    keep = lambda a, b: b if held(b) else jnp.where(skip, a, b)  # noqa: E731
    return jax.tree.map(keep, old, new, is_leaf=held)


def _direction(section: OptimSection, schedule: Schedule) -> optax.GradientTransformation:
    """The update before clipping: every optimiser ends with -lr(step) and decays matrices only."""
    step_down = lambda lr: scale_by_step(schedule, -lr)  # noqa: E731
    decay = optax.add_decayed_weights(section.weight_decay, mask=_mask) if section.weight_decay else optax.identity()
    if isinstance(section, AdamWSection):
        return optax.chain(scale_by_adam(section.b1, section.b2, section.eps), decay, step_down(section.lr))
    if isinstance(section, LionSection):
        return optax.chain(optax.scale_by_lion(section.b1, section.b2), decay, step_down(section.lr))
    if isinstance(section, AdafactorSection):
        factored = optax.scale_by_factored_rms(decay_rate=section.decay_rate)
        return optax.chain(factored, optax.clip_by_block_rms(1.0), decay, step_down(section.lr))
    muon = optax.contrib.scale_by_muon(
        ns_steps=section.ns_steps, beta=section.momentum, weight_dimension_numbers=_muon_axes
    )
    return optax.partition(
        {
            "muon": optax.chain(muon, optax.stateless(_widen), decay, step_down(section.lr)),
            "adamw": optax.chain(scale_by_adam(), decay, step_down(section.adam_lr)),
        },
        lambda params: jax.tree.map(lambda a: "adamw" if a is None else "muon", _muon_axes(params), is_leaf=_is_axes),
    )


def _widen(updates: Any, params: Any) -> Any:
    """Muon's factor sqrt(max(1, out / in)) on each matrix, which keeps the activations' change alike for all shapes."""
    return jax.tree.map(lambda u: math.sqrt(max(1.0, u.shape[-1] / u.shape[-2])) * u, updates)


def _is_axes(x: Any) -> bool:
    return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)


def make_optimizer(section: OptimSection, num_steps: int) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
    """The optimiser of a run, and the learning rate it uses at each step (for the log).

    Its `update(grads, state, params, step=...)` wants the number of the step, from 0.

    Example:
      >>> tx, lr_at = make_optimizer(AdamWSection(lr=1e-3, schedule=ScheduleSection(kind="constant", warmup=0.0)), 10)
      >>> round(float(lr_at(0)), 6)
      0.001
    """
    schedule = make_schedule(section.schedule, num_steps)
    direction = _direction(section, schedule)
    clip = optax.identity() if section.clip_norm is None else clip_by_global_norm(section.clip_norm)
    return in_float32(optax.chain(clip, direction)), lambda step: section.lr * schedule(step)


def scale_parts(
    optimizer: optax.GradientTransformationExtraArgs, factors: Mapping[str, float]
) -> optax.GradientTransformationExtraArgs:
    """The same optimiser with its updates of some networks, by their name in params, times a factor.

    Every optimiser here has updates that are proportional to the learning rate, so a factor is another rate.

    Example:
      >>> tx = scale_parts(optax.with_extra_args_support(optax.sgd(1.0)), {"critic": 10.0})
      >>> params = {"policy": jnp.ones(()), "critic": jnp.ones(())}
      >>> {name: float(x) for name, x in tx.update(params, tx.init(params))[0].items()}
      {'critic': -10.0, 'policy': -1.0}
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        changed, state = optimizer.update(updates, state, params, **extra)
        parts: Any = changed
        scaled = {name: optax.tree.scale(factors.get(name, 1.0), tree) for name, tree in parts.items()}
        return scaled, state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
