"""Overlays, subsets, LoRA entries: what is trained, what is not, what merging gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.adapters import lora
from jaxpost.adapters.bind import LowRank, bind, bind_policy, count, merge, select
from jaxpost.config import AdamWSection, LoRASection, ScheduleSection
from jaxpost.losses.supervised import cross_entropy
from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.models.table import flatten, nest
from jaxpost.models.transformer import build_model
from jaxpost.ops.linear import LoRA
from jaxpost.sharding import make_mesh, param_shardings
from jaxpost.train.optim import make_optimizer
from jaxpost.train.step import init_state, make_train_step
from jaxpost.types import Inputs, TokenBatch

BLOCKS = (BlockConfig(rope=RopeConfig(), window=3), BlockConfig(rope=RopeConfig()))
CONFIG = ModelConfig(
    family="llama", vocab_size=24, width=16, mlp_width=24, heads=2, kv_heads=1, head_dim=8,
    stacks=(StackConfig(repeats=2, period=BLOCKS),), max_positions=64, tie_embeddings=False,
)  # fmt: skip
RANK = 3
MODEL = build_model(CONFIG)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base() -> Any:
    return MODEL.init(jax.random.key(0))


def batch() -> TokenBatch:
    rng = np.random.default_rng(0)
    # 21 tokens, in chunks of 9: no activation has the shape of a kernel.
    tokens = jnp.asarray(rng.integers(0, 24, (3, 7)), jnp.int32)
    positions = jnp.tile(jnp.arange(7, dtype=jnp.int32), (3, 1))
    return TokenBatch(tokens, positions, jnp.ones_like(tokens), jnp.ones((3, 7)), jnp.arange(3, dtype=jnp.int32))


def adapters(*targets: str, **settings: Any) -> tuple[Any, Any]:
    return lora.init(jax.random.key(1), MODEL.table, LoRASection(rank=RANK, alpha=6.0, targets=targets, **settings))


def moved(overlay: Any) -> Any:
    """An overlay as after training: no factor is zero."""
    keys = iter(jax.random.split(jax.random.key(2), 100))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), overlay)


def logits(params: Any) -> jax.Array:
    b = batch()
    forward = lambda p: MODEL.unembed(p, MODEL.forward(p, Inputs(b.tokens, b.positions, b.segment_ids)).hidden)  # noqa: E731
    return jax.jit(forward)(params)


# Targets


@pytest.mark.parametrize(
    ("targets", "modules", "blocks"),
    [
        (("all-linear",), LINEARS, "01"),
        (("q_proj", "v_proj"), ("q_proj", "v_proj"), "01"),
        (("stacks/0/1/*",), LINEARS, "1"),
        (("*/0/?_proj",), ("q_proj", "k_proj", "v_proj", "o_proj"), "0"),
        (("*/down_proj/kernel", "q_proj"), ("q_proj", "down_proj"), "01"),
    ],
)
def test_targets(targets: Any, modules: Any, blocks: str) -> None:
    found = {spec.path for spec in lora.find_targets(MODEL.table, targets)}
    assert found == {("stacks", "0", b, m, "kernel") for b in blocks for m in modules}


def test_the_head_only_by_name() -> None:
    found = lora.find_targets(MODEL.table, ["lm_head"])
    assert [spec.path for spec in found] == [("lm_head", "kernel")]
    overlay, scales = adapters("lm_head")
    bound = bind(base(), moved(overlay), scales)
    np.testing.assert_allclose(logits(bound), logits(merge(bound)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("query", r"'query' names no linear layer of this model; there are: q_proj, k_proj, .*lm_head"),
        ("embed", "'embed' names an embedding of this model"),
        ("stacks/7/*", r"names no linear layer.*stacks/\*/\*/q_proj/kernel"),
    ],
)
def test_targets_that_match_nothing(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapters("q_proj", target)


# Start, scale, merge


def test_a_new_adapter_changes_nothing_and_has_pefts_start() -> None:
    overlay, scales = adapters("all-linear")
    np.testing.assert_array_equal(logits(bind(base(), overlay, scales)), logits(base()))
    leaf = overlay["stacks"]["0"]["0"]["down_proj"]["kernel"]
    assert leaf.a.shape == (2, 24, 3)
    assert leaf.b.shape == (2, 3, 16)
    a = np.concatenate([x.a.ravel() * np.sqrt(x.a.shape[1]) for x in flatten(overlay).values()])
    assert abs(a).max() <= 1
    np.testing.assert_allclose([a.mean(), a.std()], [0, 3**-0.5], atol=0.03)  # uniform in [-1, 1]
    assert not any(x.b.any() for x in flatten(overlay).values())


def test_the_start_of_a_kernel_does_not_depend_on_the_others() -> None:
    alone, among = adapters("q_proj")[0], adapters("all-linear")[0]
    pick = lambda tree: tree["stacks"]["0"]["1"]["q_proj"]["kernel"].a  # noqa: E731
    np.testing.assert_array_equal(pick(alone), pick(among))
    assert (pick(alone) != alone["stacks"]["0"]["0"]["q_proj"]["kernel"].a).any()


def test_scales() -> None:
    scale = lambda **s: adapters("q_proj", **s)[1]["stacks"]["0"]["0"]["q_proj"]["kernel"]  # noqa: E731
    np.testing.assert_allclose(scale(), [2.0, 2.0])  # alpha / r, one for each layer
    np.testing.assert_allclose(scale(rslora=True), [6 / 3**0.5] * 2, rtol=1e-6)


def test_merged_weights_equal_the_bound_forward_and_the_formula() -> None:
    overlay, scales = adapters("all-linear")
    bound = bind(base(), moved(overlay), scales)
    merged = merge(bound)
    np.testing.assert_allclose(logits(merged), logits(bound), rtol=1e-5, atol=1e-6)
    assert np.abs(logits(merged) - logits(base())).max() > 0.1
    for path, leaf in flatten(moved(overlay)).items():
        w0, a, b = (np.asarray(x, np.float64) for x in (flatten(base())[path], *leaf))
        np.testing.assert_allclose(flatten(merged)[path], w0 + 2.0 * a @ b, rtol=1e-5, atol=1e-6)


def test_rank_below_one() -> None:
    with pytest.raises(ValueError, match=r"adapter\.rank must be at least 1, got 0"):
        lora.init(jax.random.key(0), MODEL.table, LoRASection(rank=0))


# Binding and subsets


def test_bind_refuses_strangers() -> None:
    overlay, scales = adapters("q_proj")
    with pytest.raises(ValueError, match="stacks/0/0/q_proj/kernel has no scale"):
        bind(base(), overlay)
    with pytest.raises(ValueError, match="stacks/0/0/q_proj/kernel is no parameter of the base"):
        bind({"embed": base()["embed"]}, overlay, scales)


def test_select_splits_and_bind_joins() -> None:
    trained, frozen = select(base(), ["*norm*", "stacks/0/1/q_proj/*"])
    assert {p[-2] for p in flatten(trained)} == {"attn_norm", "mlp_norm", "final_norm", "q_proj"}
    assert not set(flatten(trained)) & set(flatten(frozen))
    jax.tree.map(np.testing.assert_array_equal, bind(frozen, trained), base())
    with pytest.raises(ValueError, match=r"'\*typo\*' matches no parameter; there are: embed/table, stacks"):
        select(base(), ["*", "*typo*"])


def test_counts() -> None:
    overlay, _ = adapters("q_proj", "up_proj")
    assert count(overlay) == 4 * (3 * (16 + 16) + 3 * (16 + 24))
    assert count(base()) == sum(np.prod(spec.shape) for spec in MODEL.table)


# Training


def train_step(overlay: Any, frozen: Any) -> tuple[Any, Any]:
    tx, _ = make_optimizer(AdamWSection(lr=1e-2, schedule=ScheduleSection(kind="constant", warmup=0.0)), 10)
    loss = bind_policy(partial(cross_entropy, MODEL, chunk_tokens=9))
    return make_train_step(loss, tx), init_state({"policy": overlay}, tx)


def test_training_moves_the_adapter_only_and_keeps_no_state_for_the_base() -> None:
    overlay, scales = adapters("all-linear")
    frozen = {"base": base(), "scales": scales}
    step, state = train_step(overlay, frozen)
    sizes = sorted(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert sizes == sorted([x.size for x in jax.tree.leaves(overlay)] * 2), "two moments for each factor, no others"
    losses = []
    step = jax.jit(step)
    for _ in range(8):
        state, metrics = step(state, frozen, batch(), jax.random.key(0), {})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05
    assert jax.tree.structure(state.params["policy"]) == jax.tree.structure(overlay)


def equations(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def products(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of the results of all products that sum over tokens: A B of an updated kernel sums over the rank."""
    return {
        e.outvars[0].aval.shape
        for e in equations(jaxpr)
        if e.primitive.name == "dot_general" and e.invars[0].aval.shape[e.params["dimension_numbers"][0][0][0]] != RANK
    }


@pytest.mark.parametrize("trained", ["lora", "norms"])
def test_the_program_takes_no_gradient_of_the_base(trained: str) -> None:
    """No product of the step gives an array of the shape of a frozen kernel, stacked or not, or of the head."""
    overlay, scales = adapters("all-linear")
    frozen = {"base": base(), "scales": scales}
    if trained == "norms":
        overlay, rest = select(base(), ["*norm*"])
        frozen = {"base": rest}
    step, state = train_step(overlay, frozen)
    jaxpr = jax.make_jaxpr(step)(state, frozen, batch(), jax.random.key(0), {}).jaxpr
    results = products(jaxpr)
    kernels = {spec.shape for spec in MODEL.table if spec.path[-1] in ("kernel", "table")}
    kernels |= {shape[1:] for shape in kernels if len(shape) == 3}
    both_ways = kernels | {(*s[:-2], s[-1], s[-2]) for s in kernels}
    assert not results & both_ways
    full, state = train_step(base(), {})
    jaxpr = jax.make_jaxpr(full)(state, {"base": {}}, batch(), jax.random.key(0), {}).jaxpr
    assert products(jaxpr) & both_ways, "full training does take them, so this test can fail"


def test_gradients_of_factors_equal_those_of_the_merged_weights() -> None:
    """dA = scale dW B^T and dB = scale A^T dW, by the chain rule from the merged model's dW."""
    overlay, scales = adapters("all-linear")
    overlay = moved(overlay)

    def loss(policy: Any) -> jax.Array:
        terms, _ = cross_entropy(MODEL, {"policy": policy}, {}, batch(), jax.random.key(0), {}, chunk_tokens=9)
        return terms["cross_entropy"].value

    got = jax.jit(jax.grad(lambda o: loss(bind(base(), o, scales))))(overlay)
    dense = flatten(jax.jit(jax.grad(loss))(merge(bind(base(), overlay, scales))))
    for path, leaf in flatten(overlay).items():
        dw, a, b = (np.asarray(x, np.float64) for x in (dense[path], *leaf))
        np.testing.assert_allclose(flatten(got)[path].a, 2.0 * dw @ b.swapaxes(1, 2), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(flatten(got)[path].b, 2.0 * a.swapaxes(1, 2) @ dw, rtol=1e-3, atol=1e-6)


def test_axes_place_an_overlay_on_a_mesh() -> None:
    overlay, _ = adapters("q_proj", "o_proj")
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    place = flatten(param_shardings(lora.axes_tree(MODEL.table, overlay), mesh, overlay))
    specs = {path[3]: (leaf.a.spec, leaf.b.spec) for path, leaf in place.items()}
    assert {k: [tuple(s) for s in v] for k, v in specs.items()} == {
        "q_proj": [(None, "fsdp"), (None, None, "tensor")],
        "o_proj": [(None, "tensor"), (None, None, "fsdp")],
    }
    trained, _ = select(base(), ["*norm*"])
    assert lora.axes_tree(MODEL.table, trained)["final_norm"]["scale"] == ("norm",)


def test_bound_leaves_are_weight_leaves() -> None:
    overlay, scales = adapters("q_proj")
    bound = flatten(bind(base(), overlay, scales))
    assert {type(leaf) for path, leaf in bound.items() if "q_proj" in path} == {LoRA}
    assert isinstance(nest(bound)["stacks"]["0"]["0"]["q_proj"]["kernel"].base, jax.Array)
    assert isinstance(overlay["stacks"]["0"]["0"]["q_proj"]["kernel"], LowRank)
