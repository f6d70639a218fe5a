"""What every loss promises, tested alike for all of them: add a loss by adding a line to CASES.

Gradients are compared by relative error, in float32, on a real (tiny) transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost import sharding
from jaxpost.losses.aggregate import constant_mean, sequence_mean
from jaxpost.losses.correction import masked, mean_sequence_weights, truncated
from jaxpost.losses.kl import corrected, k1, k3, plain
from jaxpost.losses.policy import joined, policy_gradient
from jaxpost.losses.supervised import cross_entropy, dft
from jaxpost.losses.surrogates import cispo_two_sided, gmpo, gspo, ppo, sapo
from jaxpost.losses.value import value_loss
from jaxpost.metrics.terms import means
from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.models.table import axes_tree
from jaxpost.models.transformer import build_model
from jaxpost.rl.rows import Answer, RowPlan, pack
from jaxpost.train.gradients import weights_only
from jaxpost.train.step import init_state, make_eval_step, make_train_step
from jaxpost.types import Inputs, RolloutBatch, TokenBatch

TOLERANCE = 2e-5
ROWS, LENGTH, VOCAB = 8, 12, 40


class Case(NamedTuple):
    """A loss f(model, params, frozen, batch, key, hyper), and the kind of batch it reads."""

    name: str
    loss: Callable[..., Any]
    hyper: dict[str, float] = {}  # noqa: RUF012


def rollout(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss on `TokenBatch`es to which all that a rollout knows is added, token by token."""

    def on_tokens(model: Any, params: Any, frozen: Any, batch: TokenBatch, key: Any, hyper: Any) -> Any:
        angle = (batch.tokens * 3 + batch.positions * 7).astype(jnp.float32)
        advantages, old, other = jnp.sin(angle), -4 + 2 * jnp.sin(2 * angle), jnp.cos(3 * angle)
        known = (advantages, old, old + 0.5 * other, old + other, other, jnp.cos(angle))
        rest = RolloutBatch(*batch[:5], *known, getattr(batch, "prefix_ids", None))
        return loss(model, params, frozen, rest, key, hyper)

    return on_tokens


def actor_and_critic(model: Any, *args: Any) -> Any:
    """PPO with a value read off the policy's hidden states."""

    def values_of(params: Any, batch: RolloutBatch) -> jax.Array:
        return jnp.mean(model.forward(params["policy"], Inputs(*batch[:3], batch.prefix_ids)).hidden[..., :3], axis=-1)

    return joined(partial(policy_gradient, model, surrogate=ppo), partial(value_loss, values_of))(*args)


GRPO = partial(policy_gradient, surrogate=ppo, aggregate=sequence_mean, kl=plain(k3), correction=truncated())
GSPO = partial(policy_gradient, surrogate=gspo, aggregate=constant_mean(LENGTH), kl=corrected(k1))
CISPO = partial(policy_gradient, surrogate=cispo_two_sided, correction=masked(mean_sequence_weights))
GMPO = partial(policy_gradient, surrogate=gmpo, aggregate=sequence_mean, kl=plain(k3))
SAPO = partial(policy_gradient, surrogate=sapo, aggregate=sequence_mean)
CLIP = {"clip_low": 0.2, "clip_high": 0.3}

CASES = [
    Case("cross_entropy", partial(cross_entropy, chunk_tokens=24)),
    Case("smoothed", partial(cross_entropy, z_loss=1e-2, label_smoothing=0.1, chunk_tokens=40)),
    Case("dft", partial(dft, z_loss=1e-3, chunk_tokens=1000)),
    Case("grpo", rollout(partial(GRPO, chunk_tokens=24)), CLIP | {"kl_coef": 0.1, "temperature": 0.8}),
    Case("gspo", rollout(GSPO), CLIP | {"kl_coef": 0.1, "entropy_coef": 0.05}),
    Case("cispo", rollout(CISPO), CLIP),
    Case("gmpo", rollout(GMPO), CLIP | {"kl_coef": 0.1}),
    Case("sapo", rollout(SAPO), {"tau_positive": 1.0, "tau_negative": 1.05}),
    Case("ppo", rollout(actor_and_critic), CLIP | {"dual_clip": 3.0, "value_clip": 0.2, "value_coef": 0.5}),
]
VARIANTS = ("smoothed", "cispo", "gmpo", "sapo")
"""Whose programs differ little from another's; see `make slow`."""
MARKED = [pytest.param(c, marks=pytest.mark.slow if c.name in VARIANTS else (), id=c.name) for c in CASES]
every_loss = pytest.mark.parametrize("case", MARKED)
policy_losses = pytest.mark.parametrize("case", MARKED[3:])


# Models and batches


def tiny_config() -> ModelConfig:
    stack = StackConfig(repeats=2, period=(BlockConfig(rope=RopeConfig()),))
    return ModelConfig(
        family="llama", vocab_size=VOCAB, width=16, mlp_width=24, heads=2, kv_heads=1, head_dim=8, stacks=(stack,),
        max_positions=64, tie_embeddings=False,
    )  # fmt: skip


@cache
def model_of(mesh: Any = None, dtype: Any = jnp.float32) -> Any:
    constrain = {} if mesh is None else {"constrain": sharding.make_constrain(mesh), "mesh": mesh}
    return build_model(tiny_config(), compute_dtype=dtype, **constrain)


@cache
def params_of(dtype: Any = jnp.float32) -> Any:
    # Four times the usual start, so that attention and probabilities are far from uniform.
    params = model_of().init(jax.random.key(0))
    return {"policy": jax.tree.map(lambda x: (x if x.ndim == 1 else 4 * x).astype(dtype), params)}


def examples(seed: int = 0, count: int = ROWS) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, weights) of ragged length, ragged masks and unequal weights."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        n = int(rng.integers(2, LENGTH // 2 + 1))
        weights = rng.choice([0.0, 0.5, 1.0], n, p=[0.4, 0.2, 0.4]) if i else np.ones(n)
        out.append((rng.integers(0, VOCAB, n), weights))
    return out


def to_rows(rows: list[list[tuple[np.ndarray, np.ndarray]]], *, length: int = LENGTH, left: bool = False) -> TokenBatch:
    """Each row's examples one after another as segments 1, 2, ..., padding at the right or left; at least ROWS rows."""
    rows = rows + [[]] * (ROWS - len(rows))
    shape = (len(rows), length)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    weights = np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        at = length - sum(len(t) for t, _ in row) if left else 0
        for s, (t, w) in enumerate(row):
            place = (r, slice(at, at + len(t)))
            tokens[place], weights[place] = t, w
            positions[place], segments[place] = np.arange(len(t)), s + 1
            at += len(t)
    return jax.tree.map(
        jnp.asarray, TokenBatch(tokens, positions, segments, weights, np.arange(len(rows), dtype=np.int32))
    )


def padded() -> TokenBatch:
    return to_rows([[e] for e in examples()])


class Shared(NamedTuple):
    """A `TokenBatch` whose samples stand behind one copy of their prompt."""

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    weights: np.ndarray
    row_ids: np.ndarray
    prefix_ids: np.ndarray


def answered() -> tuple[TokenBatch, Shared]:
    """Two ragged samples of each of four prompts, the first one token long: padded rows, and shared prompts."""
    rng = np.random.default_rng(2)
    groups = []
    for size in (1, 3, 5, 2):
        prompt = rng.integers(0, VOCAB, size).tolist()
        lengths = rng.integers(1, 7, 2)
        weights = [rng.choice([0.0, 0.5, 1.0], n, p=[0.3, 0.2, 0.5]) for n in lengths]
        groups.append(
            [Answer(prompt, rng.integers(0, VOCAB, n).tolist(), w) for n, w in zip(lengths, weights, strict=True)]
        )
    each = [
        (np.array([*a.prompt, *a.tokens]), np.append(np.zeros(len(a.prompt)), a.weights)) for g in groups for a in g
    ]
    packed = pack(groups, RowPlan(2 * LENGTH, ROWS, 1, share=True)).batch
    shared = Shared(*packed[:5], packed.prefix_ids)
    return to_rows([[e] for e in each]), jax.tree.map(jnp.asarray, shared)


# The gradient of a step


def step_of(case: Case, *, microbatches: int = 1, mesh: Any = None, dtype: Any = jnp.float32) -> Any:
    """A train step whose new parameters are the gradients."""
    rule = lambda optimizer, grads, state, **_: (grads, state.opt_state)  # noqa: E731
    loss = partial(case.loss, model_of(mesh, dtype))
    return make_train_step(loss, optax.identity(), num_microbatches=microbatches, update_rule=rule)


QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options: quick to compile, not to run."""


@cache
def compiled(index: int, *how: tuple[str, Any]) -> Any:
    """The jitted step of CASES[index], compiled once for all tests of one shape."""
    return jax.jit(step_of(CASES[index], **dict(how)), compiler_options=QUICK)


def gradient(case: Case, batch: TokenBatch, *, params: Any = None, step: Any = None, **how: Any) -> Any:
    step = step or compiled(CASES.index(case), *sorted(how.items()))
    state = init_state(params_of() if params is None else params, optax.identity())
    state, metrics = step(state, {}, batch, jax.random.key(1), hyper_of(case))
    assert not metrics["skipped"]
    return state.params, metrics


def hyper_of(case: Case) -> dict[str, Any]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in case.hyper.items()}


def reference(case: Case) -> Any:
    """Gradient and metrics of the padded batch in one piece on one device."""
    return gradient(case, padded())


def assert_close(actual: tuple[Any, Any], expected: tuple[Any, Any], tolerance: float = TOLERANCE) -> None:
    """Each array's gradient within a relative error; the loss and every metric too."""
    for path, want in jax.tree.leaves_with_path(expected[0]):
        got = dict(jax.tree.leaves_with_path(actual[0]))[path]
        error = np.linalg.norm(np.asarray(got) - np.asarray(want)) / np.linalg.norm(want)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.2e}"
    for name, want in expected[1].items():
        np.testing.assert_allclose(actual[1][name], want, rtol=tolerance, atol=1e-6, err_msg=name)


# The promises


@every_loss
def test_gradient_is_of_the_stated_mean(case: Case) -> None:
    """The step's gradient is that of sum(value * weight) / sum(weight), taken plainly."""
    batch, key = padded(), jax.random.key(1)
    plain = lambda p: means(make_eval_step(partial(case.loss, model_of()))(p, {}, batch, key, hyper_of(case)))["loss"]  # noqa: E731
    assert_close((jax.jit(jax.grad(plain), compiler_options=QUICK)(params_of()), {}), (reference(case)[0], {}))


@every_loss
@pytest.mark.parametrize("microbatches", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8])
def test_microbatches(case: Case, microbatches: int) -> None:
    assert_close(gradient(case, padded(), microbatches=microbatches), reference(case))


@every_loss
@pytest.mark.parametrize(
    "axes",
    [
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
    ids=lambda a: "-".join(a),
)
def test_shards(case: Case, axes: dict[str, int]) -> None:
    mesh = sharding.make_mesh(axes)
    abstract = params_of()["policy"]
    place = sharding.param_shardings(axes_tree(model_of().table), mesh, abstract)
    params = {"policy": jax.device_put(abstract, place)}
    batch = jax.device_put(padded(), sharding.batch_sharding(mesh))
    assert_close(
        gradient(case, batch, params=params, mesh=mesh, **({"microbatches": 2} if "tensor" in axes else {})),
        reference(case),
    )


@every_loss
def test_packing(case: Case) -> None:
    e = examples()
    packed = to_rows([[e[i], e[i + 1]] for i in range(0, ROWS, 2)])
    assert_close(gradient(case, packed), reference(case))


@policy_losses
def test_shared_prompts(case: Case) -> None:
    """One copy of a prompt for all its samples, and two groups in a row."""
    alone, shared = answered()
    assert int(jnp.sum(jnp.any(shared.segment_ids > 0, axis=1))) < 4
    assert_close(gradient(case, shared), gradient(case, alone))


@every_loss
def test_left_padding(case: Case) -> None:
    assert_close(gradient(case, to_rows([[e] for e in examples()], left=True)), reference(case))


@every_loss
def test_a_masked_row_changes_nothing(case: Case) -> None:
    masked = [(t, np.zeros_like(w)) for t, w in examples(seed=5, count=1)]
    first, second, *rest = examples()
    assert_close(gradient(case, to_rows([masked, [first, second], *[[e] for e in rest]])), reference(case))


@every_loss
def test_masked_is_sliced(case: Case) -> None:
    """Tokens without weight at the end of an example count as little as if they were not there."""
    rng = np.random.default_rng(3)
    longer = [(np.concatenate([t, rng.integers(0, VOCAB, 4)]), np.concatenate([w, np.zeros(4)])) for t, w in examples()]
    assert_close(gradient(case, to_rows([[e] for e in longer])), reference(case))


@every_loss
def test_row_order_is_free(case: Case) -> None:
    order = np.random.default_rng(1).permutation(ROWS)
    assert_close(gradient(case, jax.tree.map(lambda x: x[order], padded())), reference(case))


@every_loss
def test_jit_is_eager(case: Case) -> None:
    assert_close(gradient(case, padded(), step=step_of(case)), reference(case))


@every_loss
def test_weights_do_not_read_params(case: Case) -> None:
    batch, key = padded(), jax.random.key(1)
    loss = partial(case.loss, model_of())
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params_of())
    weights_only(loss, nan, {}, batch, key, hyper_of(case))  # raises where the weights' program reads a parameter
    broken, _ = loss(nan, {}, batch, key, hyper_of(case))
    whole, _ = loss(params_of(), {}, batch, key, hyper_of(case))
    for name, term in whole.items():
        assert np.isfinite(broken[name].weight).all()
        np.testing.assert_array_equal(broken[name].weight, term.weight)
        assert np.isnan(broken[name].value).any(), "the test's parameters reach the value"


@every_loss
@pytest.mark.parametrize("microbatches", [1, 2])
def test_all_masked(case: Case, microbatches: int) -> None:
    """No weight at all: a finite zero gradient, and an update that is skipped and said to be."""
    batch = padded()._replace(weights=jnp.zeros((ROWS, LENGTH)))
    state = init_state(params_of(), optax.identity())
    how = (("microbatches", microbatches),) if microbatches > 1 else ()
    new, metrics = compiled(CASES.index(case), *how)(state, {}, batch, jax.random.key(1), hyper_of(case))
    assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)
    assert (metrics["skipped"], metrics["empty"], metrics["nonfinite"]) == (1, 1, 0)
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_finite_at_extremes(case: Case, dtype: Any) -> None:
    """Logits of +-1e4, so that probabilities are exactly 0 and 1."""
    params = jax.tree.map(jnp.array, params_of(dtype))
    head = params["policy"]["lm_head"]["kernel"]
    params["policy"]["lm_head"]["kernel"] = (1e4 * jnp.sign(head) / head.shape[0] ** 0.5).astype(dtype)
    grads, metrics = gradient(case, padded(), params=params, **({} if dtype == jnp.float32 else {"dtype": dtype}))
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(g.astype(jnp.float32)).all() for g in jax.tree.leaves(grads))


@every_loss
def test_hyper_never_recompiles(case: Case) -> None:
    traces = 0

    def counted(*args: Any) -> Any:
        nonlocal traces
        traces += 1
        return case.loss(model_of(), *args)

    step = jax.jit(make_train_step(counted, optax.sgd(0.1)))
    state, batch = init_state(params_of(), optax.sgd(0.1)), padded()
    programs = []
    for factor in (1.0, 0.5, 2.0):
        hyper = {name: factor * value for name, value in hyper_of(case).items()} | {"spike_factor": 5.0 * factor}
        programs.append(step.trace(state, {}, batch, jax.random.key(1), hyper).jaxpr)
        first = traces if len(programs) == 1 else first
    assert traces == first
    assert programs[0] is programs[1] is programs[2]
