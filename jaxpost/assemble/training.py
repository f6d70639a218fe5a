"""Loss, adapter and optimiser sections -> one train step and the state it starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpost import sharding
from jaxpost.adapters import lora, peft
from jaxpost.adapters.bind import bind, bind_policy, count, select
from jaxpost.assemble.model import Pretrained
from jaxpost.config import AdapterSection, DFTSection, GuardSection, LoRASection, LossSection, OptimSection
from jaxpost.losses import supervised
from jaxpost.models import heads
from jaxpost.models.table import abstract_params, axes_tree
from jaxpost.ops import platform
from jaxpost.train.job import trained_params
from jaxpost.train.optim import make_optimizer, scale_parts
from jaxpost.train.refresh import (
    and_reference,
    eval_with_reference,
    reads_reference,
    refresh_reference,
    with_reference,
)
from jaxpost.train.step import PostUpdate, ema_update, init_state, make_eval_step, make_train_step
from jaxpost.types import Coupled, Hyper, LossFn, Model, Params, ParamSpec, TrainState, TrainStep


@dataclass(frozen=True)
class Training:
    """The functions of one training, and what they work on. Nothing is jitted yet."""

    step: TrainStep
    eval_step: Callable[..., Any]
    """Sums of a batch, or (sums, what is kept of it)."""
    init_state: Callable[[], TrainState]
    """Reads weights or draws adapters, straight into their shardings."""
    abstract_state: TrainState
    frozen: Params
    hyper: Hyper
    lr_at: Callable[[int], Any]
    eval_params: Callable[[TrainState], Params]
    """What is evaluated and exported: the trained parameters, or their moving average."""
    policy: Callable[[Params, Params], Params]
    """policy(params, frozen) -> the tree that the model reads."""
    trained: int
    """Number of trained scalars."""


@dataclass(frozen=True)
class Network:
    """Another network that is trained beside the policy: a critic, a reward model's head."""

    abstract: Params
    axes: Params
    load: Callable[[], Params]


def head_network(table: tuple[ParamSpec, ...], *, load: Callable[[], Params] | None = None, seed: int = 0) -> Network:
    """A head as a network: loaded, or drawn from the seed."""
    first = partial(heads.init_head, jax.random.key(seed), table)
    return Network(abstract_params(table), axes_tree(table), first if load is None else load)


@dataclass(frozen=True)
class _Parts:
    """What an adapter section says: where the trained network comes from and what stands still beside it."""

    abstract: Params
    axes: Params
    load: Callable[[], Params]
    frozen: Params
    policy: Callable[[Params, Params], Params]


def make_loss(section: LossSection, model: Model, mesh: Mesh | None = None) -> LossFn:
    """The loss function that a `loss` section names; on a mesh each device that holds rows has its own chunk."""
    common = {"z_loss": section.z_loss, "chunk_tokens": chunk_tokens_of(section.chunk_tokens, mesh)}
    if isinstance(section, DFTSection):
        return partial(supervised.dft, model, **common)
    return partial(supervised.cross_entropy, model, label_smoothing=section.label_smoothing, **common)


def chunk_tokens_of(chunk_tokens: int | None, mesh: Mesh | None) -> int:
    """Tokens whose logits exist at one time, over all devices that hold rows; None: by the platform."""
    each = platform.choices().chunk_tokens if chunk_tokens is None else chunk_tokens
    return each * (1 if mesh is None else math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "seq")))


def make_training(
    pretrained: Pretrained,
    *,
    loss: LossFn | Coupled,
    eval_loss: LossFn | None = None,
    keep: Sequence[str] = (),
    adapter: AdapterSection,
    optim: OptimSection,
    num_steps: int,
    microbatches: int = 1,
    skip_empty: bool = False,
    networks: Mapping[str, Network] = MappingProxyType({}),
    network_lr: float | None = None,
    frozen: Mapping[str, Params] = MappingProxyType({}),
    hyper: Mapping[str, float] = MappingProxyType({}),
    refresh: Mapping[str, Any] | None = None,
    guard: GuardSection = GuardSection(),  # noqa: B008 - frozen
    seed: int = 0,
) -> Training:
    """Joins a model, a loss, what is trained of the model, and an optimiser.

    Args:
      loss: of {"policy": the tree that the model reads, and the `networks` by name}.
      eval_loss, keep: what evaluation computes in the loss's place, and its metrics that are no means.
      microbatches, skip_empty: `train.step.make_train_step`'s.
      networks, network_lr: what else is trained, and at which learning rate; None: the policy's.
      frozen, hyper: what else the loss reads.
      refresh: {"every", "mix"} of a reference that follows the policy (`train.refresh`); None: there is none.

    Raises:
      ValueError: patterns that match nothing, an adapter that does not fit, a schedule that exceeds the run.
    """
    parts = _parts(pretrained, adapter, seed)
    optimizer, lr_at = make_optimizer(optim, num_steps)
    if network_lr is not None and networks:
        optimizer = scale_parts(optimizer, dict.fromkeys(networks, network_lr / optim.lr))
    make_state = partial(
        _initial,
        optimizer=optimizer,
        ema=optim.ema_decay is not None,
        memory=loss.memory if isinstance(loss, Coupled) else (),
        reference=refresh is not None,
    )
    trained = {"policy": Network(parts.abstract, parts.axes, parts.load), **networks}
    places, first, abstract_state = _placed(trained, make_state, pretrained.mesh)
    seen = partial(_seen_through, wrap=lambda fn: sharding.pinned(bind_policy(fn) if parts.frozen else fn, places))
    make_step = partial(make_train_step, num_microbatches=microbatches, skip_empty=skip_empty)
    step = make_step(seen(loss), optimizer, post_update=_after(optim.ema_decay, refresh))
    step, eval_step, eval_params = _evaluated(step, seen(eval_loss or loss), keep, optim, refresh, parts.policy)
    return Training(
        step=step,
        eval_step=eval_step,
        init_state=first,
        abstract_state=abstract_state,
        frozen={**parts.frozen, **frozen},
        hyper=_scalars(guard, hyper),
        lr_at=lr_at,
        eval_params=eval_params,
        policy=parts.policy,
        trained=sum(count(network.abstract) for network in trained.values()),
    )


def _scalars(guard: GuardSection, hyper: Mapping[str, float]) -> dict[str, Any]:
    limits = {} if guard.spike_factor is None else {"spike_factor": guard.spike_factor}
    return {name: jnp.float32(value) for name, value in {**limits, **hyper}.items()}


def _seen_through(loss: LossFn | Coupled, wrap: Callable[[Any], Any]) -> LossFn | Coupled:
    """What reads parameters, wrapped."""
    return loss._replace(stats=wrap(loss.stats)) if isinstance(loss, Coupled) else wrap(loss)


def _initial(params: Params, *, optimizer: Any, ema: bool, memory: Any, reference: bool) -> TrainState:
    state = init_state(params, optimizer, ema=ema, memory=memory)
    return with_reference(state) if reference else state


def _evaluated(
    step: TrainStep,
    loss: LossFn | Coupled,
    keep: Sequence[str],
    optim: OptimSection,
    refresh: Any,
    policy: Callable[..., Params],
) -> tuple[TrainStep, Callable[..., Any], Callable[[TrainState], Params]]:
    """The step, and what evaluates: with the averaged parameters, and with the reference of the state if it moves."""
    eval_step = make_eval_step(loss, keep=keep)
    eval_params = trained_params if optim.ema_decay is None else _averaged
    if refresh is None:
        return step, eval_step, eval_params
    return reads_reference(step, policy), eval_with_reference(eval_step, policy), and_reference(eval_params)


def _after(ema_decay: float | None, refresh: Mapping[str, Any] | None) -> PostUpdate | None:
    """What follows an accepted update."""
    updates = [] if ema_decay is None else [ema_update(ema_decay)]
    updates += [] if refresh is None else [refresh_reference(**refresh)]
    return (lambda state: reduce(lambda found, update: update(found), updates, state)) if updates else None


def _placed(
    trained: Mapping[str, Network], make_state: Callable[..., TrainState], mesh: Mesh
) -> tuple[dict[str, Any], Callable[[], TrainState], TrainState]:
    """Where the networks lie, the first state (weights read straight into their shardings), and its shapes."""
    abstract = {name: network.abstract for name, network in trained.items()}
    places = {
        name: sharding.param_shardings(network.axes, mesh=mesh, abstract=network.abstract)
        for name, network in trained.items()
    }
    shapes = jax.eval_shape(make_state, abstract)
    state_places = sharding.state_shardings(shapes, places, mesh)

    def first() -> TrainState:
        loaded = jax.device_put({name: network.load() for name, network in trained.items()}, places)
        return jax.jit(make_state, out_shardings=state_places, donate_argnums=0)(loaded)

    whole = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, state_places)
    return places, first, whole


def _averaged(state: TrainState) -> Params:
    """The moving average, in the parameters' dtypes."""
    return jax.tree.map(lambda e, p: e.astype(p.dtype), state.extra["ema"], state.params)


def _parts(pretrained: Pretrained, adapter: AdapterSection, seed: int) -> _Parts:
    table = pretrained.model.table
    if isinstance(adapter, LoRASection):
        return _lora_parts(pretrained, adapter, seed)
    if adapter.trainable == ("*",):
        whole = lambda params, frozen: params["policy"]  # noqa: E731
        return _Parts(pretrained.abstract, axes_tree(table), pretrained.load, {}, whole)
    trained, _ = select(pretrained.abstract, adapter.trainable)
    return _Parts(
        abstract=trained,
        axes=lora.axes_tree(table, trained),
        load=lambda: select(pretrained.load(), adapter.trainable)[0],
        frozen={"base": select(pretrained.load(), adapter.trainable)[1]},
        policy=_overlaid,
    )


def _lora_parts(pretrained: Pretrained, adapter: LoRASection, seed: int) -> _Parts:
    table = pretrained.model.table
    if adapter.init_from is None:
        new = partial(lora.init, jax.random.key(seed), table, adapter)
        abstract, scales = jax.eval_shape(new)[0], new()[1]
        load = lambda: new()[0]  # noqa: E731
    else:
        read = partial(peft.load, adapter.init_from, pretrained.config)
        loaded, scales = read()
        abstract = jax.eval_shape(lambda: loaded)
        load = lambda: read()[0]  # noqa: E731  read again, because the first state takes it over
    scales = jax.device_put(scales, sharding.replicated(pretrained.mesh))
    axes = lora.axes_tree(table, abstract)
    return _Parts(abstract, axes, load, {"base": pretrained.load(), "scales": scales}, _overlaid)


def _overlaid(params: Params, frozen: Params) -> Params:
    return bind(frozen["base"], params["policy"], frozen.get("scales"))
