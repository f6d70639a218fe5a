from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, GEMMA, LLAMA, VOCAB, random_params, rows

from jaxpost.models import transformer
from jaxpost.models.config import BlockConfig, RopeConfig, StackConfig
from jaxpost.models.table import flatten, nest
from jaxpost.models.transformer import build_model
from jaxpost.ops.attention import attention
from jaxpost.ops.linear import LoRA, materialize
from jaxpost.types import Inputs


def made(config, **options):
    model = build_model(config, **options)
    return model, random_params(model)


def logits(model, params, inputs):
    return jax.jit(lambda p: model.unembed(p, model.forward(p, inputs).hidden))(params)


@pytest.mark.parametrize("name", CONFIGS)
def test_scan_equals_the_hand_unrolled_layers(name):
    """The same blocks called one after another with each layer's own slice."""
    config = CONFIGS[name]
    model, params = made(config)
    inputs = rows(6, 4)
    position, segment = inputs.positions, inputs.segment_ids
    kinds = {kind for stack in config.stacks for kind in stack.period}

    @partial(jax.jit, static_argnums=0)
    def one(kind, weights, x):
        ropes = {b.rope: transformer.rope_rotation(b.rope, config.head_dim, position) for b in kinds}
        context = transformer.Context(position, segment, position, segment, ropes, None)
        return transformer.block(
            config, kind, weights, x, context, None, attend=attention, constrain=lambda x, axes: x
        )[0]  # fmt: skip

    x = params["embed"]["table"][inputs.tokens] * config.embed_scale
    for s, stack in enumerate(config.stacks):
        for layer in range(stack.repeats):
            for b, kind in enumerate(stack.period):
                weights = jax.tree.map(lambda w, layer=layer: np.asarray(w)[layer], params["stacks"][str(s)][str(b)])
                x = one(kind, weights, x)
    got = jax.jit(model.forward)(params, inputs).hidden
    wide = np.asarray(x, np.float64)
    scale = np.asarray(params["final_norm"]["scale"]) + config.norm_offset
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + config.norm_eps) * scale
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_equal_rows_of_their_own(name):
    model, params = made(CONFIGS[name])
    apart = rows(5, 3, 4)
    pieces = [jax.tree.map(lambda x, b=b, n=n: x[b, :n], apart) for b, n in enumerate((5, 3, 4))]
    packed = Inputs(*(jnp.concatenate(x)[None] for x in zip(*(piece[:3] for piece in pieces), strict=True)))
    packed = packed._replace(segment_ids=jnp.repeat(jnp.asarray([1, 2, 3]), jnp.asarray([5, 3, 4]))[None])
    packed = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 2))), packed)
    got, want = logits(model, params, packed)[0], logits(model, params, apart)
    for b, (first, n) in enumerate([(0, 5), (5, 3), (8, 4)]):
        np.testing.assert_allclose(got[first : first + n], want[b, :n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_left_padding_equals_right_padding(name):
    model, params = made(CONFIGS[name])
    right, left = (logits(model, params, rows(5, 3, width=8, left=side)) for side in (False, True))
    for b, n in enumerate((5, 3)):
        np.testing.assert_allclose(left[b, 8 - n :], right[b, :n], rtol=1e-4, atol=1e-5)


def test_remat_changes_memory_not_gradients():
    config, inputs = replace(GEMMA, stacks=GEMMA.stacks[:1]), rows(6, 4)
    gradients = []
    for remat in ("none", "dots", "full"):
        model, params = made(config, remat=remat)
        gradients.append(jax.jit(jax.grad(lambda p, m=model: jnp.sin(m.forward(p, inputs).hidden).sum()))(params))
    for other in gradients[1:]:
        for got, want in zip(jax.tree.leaves(other), jax.tree.leaves(gradients[0]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def low_rank(params, rank=2):
    """Every kernel of a stack as a LoRA leaf."""
    rng, flat = np.random.default_rng(1), flatten(params)
    for path, w in flat.items():
        if path[0] == "stacks" and path[-1] == "kernel":
            a, b = (
                jnp.asarray(rng.normal(0, 0.3, s), jnp.float32)
                for s in ((w.shape[0], w.shape[1], rank), (w.shape[0], rank, w.shape[2]))
            )
            flat[path] = LoRA(w, a, b, jnp.linspace(0.5, 2.0, w.shape[0]))
    return nest(flat)


def test_lora_leaves_scan_and_equal_their_materialised_weights():
    model, params = made(GEMMA)
    bound = low_rank(params)
    plain = nest({path: materialize(w) for path, w in flatten(bound).items()})
    inputs = rows(6, 4)
    np.testing.assert_allclose(logits(model, bound, inputs), logits(model, plain, inputs), rtol=1e-3, atol=1e-4)


def equations(jaxpr):
    """Every equation of a jaxpr, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def projections(jaxpr):
    """Result shapes of the products of two matrices; attention's products have batch axes."""
    dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    return [e.outvars[0].aval.shape for e in dots if not e.params["dimension_numbers"][1][0]]


def test_a_frozen_base_gets_no_gradient_work_and_no_copy():
    """In a LoRA step no product has the shape of a base kernel, and no scan gives out a stack of kernels."""
    config = replace(LLAMA, width=24, mlp_width=40, stacks=(replace(LLAMA.stacks[0], repeats=3),))
    model, params = made(config)
    inputs = rows(6, 4)
    leaves = {path: w for path, w in flatten(low_rank(params)).items() if isinstance(w, LoRA)}

    def loss(adapters, params):
        flat = flatten(params)
        for path, w in leaves.items():
            flat[path] = w._replace(base=flat[path], **adapters["/".join(path)])
        return model.forward(nest(flat), inputs).hidden.sum()

    adapters = {"/".join(path): {"a": w.a, "b": w.b} for path, w in leaves.items()}
    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapters, params).jaxpr
    kernels = {w.base.shape[1:] for w in leaves.values()}
    assert kernels == {(24, 32), (24, 16), (32, 24), (24, 40), (40, 24)}
    assert kernels.isdisjoint(projections(jaxpr))
    given = {v.aval.shape for e in equations(jaxpr) if e.primitive.name == "scan" for v in e.outvars}
    assert (3, 24, 2) in given  # gradients of the adapters
    assert given.isdisjoint({(3, *shape) for shape in kernels})


def test_the_backward_pass_with_dots_repeats_no_projection():
    """Seven products forward and fourteen backward: the gradients of each one's input and weight."""
    inputs = rows(6, 4)

    def count(remat):
        model, params = made(LLAMA, remat=remat)
        return len(projections(jax.make_jaxpr(jax.grad(lambda p: model.forward(p, inputs).hidden.sum()))(params).jaxpr))

    assert count("none") == count("dots") == 7 + 14
    assert count("full") == 7 + 7 + 14 - 1  # the last product of a layer is needed by nothing


def test_mixed_precision_keeps_its_dtypes():
    model = build_model(LLAMA, compute_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(model))
    inputs = rows(6, 4)
    out = jax.jit(model.forward)(params, inputs)
    assert out.hidden.dtype == jnp.bfloat16
    assert model.unembed(params, out.hidden).dtype == jnp.float32
    assert model.init_cache(1, 4).keys[0][0].dtype == jnp.bfloat16
    master = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    loss = jax.grad(lambda p: model.forward(p, inputs).hidden.astype(jnp.float32).sum())
    assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(loss, master))} == {jnp.dtype("float32")}
    wide = jax.jit(build_model(LLAMA).forward)(master, inputs).hidden
    np.testing.assert_allclose(out.hidden.astype(jnp.float32), wide, atol=0.1)


def test_embedding_scale_is_rounded_to_the_parameters_dtype():
    """Gemma's sqrt(3072) = 55.4256 acts as 55.5 on bfloat16 weights."""
    config = replace(LLAMA, embed_scale=3072**0.5, stacks=(replace(LLAMA.stacks[0], repeats=1),))
    seen = []

    def record(x, axes):
        seen.append((axes, x))
        return x

    model = build_model(config, record)
    params = jax.tree.map(lambda x: jnp.ones_like(x, jnp.bfloat16), random_params(model))
    model.forward(params, rows(1))
    first = next(x for axes, x in seen if axes == ("batch", "length", "act_embed"))
    assert float(first[0, 0, 0]) == 55.5
    assert first.dtype == jnp.float32


def test_activations_are_constrained_by_meaning():
    seen = set()

    def record(x, axes):
        assert x.ndim == len(axes)
        seen.add(axes)
        return x

    model = build_model(CONFIGS["qwen"], record)
    jax.eval_shape(lambda p: model.unembed(p, model.forward(p, rows(3)).hidden), random_params(model))
    assert {
        ("batch", "length", "act_embed"),
        ("batch", "length", "act_heads", None),
        ("batch", "length", "act_kv_heads", None),
        ("batch", "length", "act_mlp"),
    } <= seen
    assert any(axes[-1] == "act_vocab" for axes in seen)


def test_logits_are_capped():
    model, params = made(GEMMA)
    values = logits(model, jax.tree.map(lambda x: 10 * x, params), rows(6))
    assert float(jnp.abs(values).max()) <= 3.0
    assert float(jnp.abs(values).max()) > 2.5


def test_unembed_takes_any_leading_axes():
    model, params = made(CONFIGS["qwen"])
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 16))
    want = np.asarray(hidden, np.float64) @ np.asarray(params["lm_head"]["kernel"], np.float64)
    for shape in ((2, 3), (6,), (3, 1, 2)):
        got = model.unembed(params, hidden.reshape(*shape, 16))
        np.testing.assert_allclose(got, want.reshape(*shape, VOCAB), rtol=1e-4, atol=1e-5)


def test_program_size_does_not_grow_with_depth():
    """What a scan promises: thirty layers make the program of three."""

    def size(repeats):
        stack = StackConfig(repeats=repeats, period=(BlockConfig(rope=RopeConfig()),))
        model = build_model(replace(LLAMA, stacks=(stack,)))
        params = jax.eval_shape(model.init, jax.random.key(0))
        step = jax.jit(jax.grad(lambda p: model.forward(p, rows(6, 4)).hidden.sum()))
        return len(step.lower(params).as_text().splitlines())

    assert size(30) == size(3)
