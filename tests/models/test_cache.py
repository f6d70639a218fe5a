import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, GEMMA, LLAMA, random_params, rows

from jaxpost.models.cache import init_cache, reserve
from jaxpost.models.transformer import build_model
from jaxpost.types import Inputs


def columns(inputs, first, last):
    return jax.tree.map(lambda x: x[:, first:last], inputs)


@pytest.fixture(params=["llama", "gemma"])
def made(request):
    model = build_model(CONFIGS[request.param])
    return random_params(model), jax.jit(model.forward), model


def test_token_by_token_equals_the_whole_row(made):
    """Window blocks included: 9 tokens, windows of 3."""
    params, forward, model = made
    inputs = rows(9, 9)
    cache = model.init_cache(2, 12)
    out = forward(params, columns(inputs, 0, 4), cache)
    hidden = [out.hidden]
    for t in range(4, 9):
        out = forward(params, columns(inputs, t, t + 1), out.cache)
        hidden.append(out.hidden)
    want = forward(params, inputs).hidden
    np.testing.assert_allclose(jnp.concatenate(hidden, axis=1), want, rtol=1e-5, atol=1e-5)
    assert int(out.cache.length) == 9


@pytest.mark.parametrize("left", [False, True])
def test_ragged_prompts_continue_as_if_alone(made, left):
    """Rows of 7, 2 and 4 tokens, padded on either side, then three more tokens each."""
    params, forward, model = made
    prompts, full = (7, 2, 4), rows(10, 5, 7)
    start = rows(*prompts, left=left)
    start = start._replace(
        tokens=jnp.stack([
            jnp.zeros(7, jnp.int32).at[7 - n if left else 0 : 7 if left else n].set(full.tokens[b, :n])
            for b, n in enumerate(prompts)
        ])
    )  # fmt: skip
    out = forward(params, start, model.init_cache(3, 11))
    want = forward(params, full).hidden
    for step in range(3):
        at = np.asarray(prompts) + step
        token = jnp.take_along_axis(full.tokens, jnp.asarray(at)[:, None], axis=1)
        out = forward(
            params, Inputs(token, jnp.asarray(at, jnp.int32)[:, None], jnp.ones((3, 1), jnp.int32)), out.cache
        )
        for b in range(3):
            np.testing.assert_allclose(out.hidden[b, 0], want[b, at[b]], rtol=1e-5, atol=1e-5)


def test_a_finished_row_leaves_holes_and_may_go_on(made):
    """A row whose tokens have segment 0 stores nothing: what it says later is as if they had not been."""
    params, forward, model = made
    inputs = rows(6, 6)
    out = forward(params, columns(inputs, 0, 4), model.init_cache(2, 9))
    pause = columns(inputs, 4, 5)._replace(segment_ids=jnp.asarray([[1], [0]]))
    out = forward(params, pause, out.cache)
    assert np.asarray(out.cache.positions[:, :6]).tolist() == [[0, 1, 2, 3, 4, -1], [0, 1, 2, 3, -1, -1]]
    out = forward(params, columns(inputs, 4, 5), out.cache)
    want = forward(params, inputs).hidden
    np.testing.assert_allclose(out.hidden[1, 0], want[1, 4], rtol=1e-5, atol=1e-5)


def test_the_cache_is_carried_through_the_layers_not_copied():
    """As scan inputs and outputs the cache would appear twice more in the program's temporaries."""
    model = build_model(LLAMA)
    params = jax.eval_shape(model.init, jax.random.key(0))
    cache = jax.eval_shape(lambda: model.init_cache(2, 4096))
    one = jax.eval_shape(lambda: rows(1, 1))
    step = jax.jit(lambda p, i, c: model.forward(p, i, c)[:2], donate_argnums=2)
    memory = step.lower(params, one, cache).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= 0.99 * size
    assert memory.temp_size_in_bytes < 1.2 * size


def test_a_low_precision_cache_rounds_keys_and_values_only():
    model = build_model(LLAMA)
    params = random_params(model)
    inputs = rows(5)
    out = jax.jit(model.forward)(params, inputs, model.init_cache(1, 8, jnp.bfloat16))
    assert out.cache.keys[0][0].dtype == jnp.bfloat16
    assert out.hidden.dtype == jnp.float32
    np.testing.assert_allclose(out.hidden, jax.jit(model.forward)(params, inputs).hidden, atol=5e-2)


def test_shapes_follow_stacks_and_impossible_ones_are_refused():
    cache = init_cache(GEMMA, 2, 7)
    assert [[k.shape for k in stack] for stack in cache.keys] == [[(2, 2, 2, 7, 8)] * 2, [(1, 2, 2, 7, 8)]]
    assert cache.capacity == 7
    with pytest.raises(ValueError, match="0 rows and 4 slots"):
        init_cache(GEMMA, 0, 4)
    with pytest.raises(ValueError, match="8 tokens do not fit into a cache of 7"):
        reserve(cache, jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 8), bool))


def test_beyond_its_capacity_a_cache_gives_nan_not_wrong_numbers():
    model = build_model(LLAMA)
    params = random_params(model)
    forward = jax.jit(model.forward)
    out = forward(params, rows(4), model.init_cache(1, 6))
    out = forward(params, rows(2), out.cache)  # full to the last slot
    assert np.isfinite(out.hidden).all()
    assert np.isnan(forward(params, rows(2), out.cache).hidden).all()
