"""A forward pass over pages equals the dense cache and the plain forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.models.layouts import HEAD, for_decoding, unstack
from jaxpost.models.pages import PagedCache, Tables, copy, init_pools, page_bytes
from jaxpost.models.transformer import build_model
from jaxpost.ops import platform
from jaxpost.ops.linear import Panels
from jaxpost.types import Inputs

QUICK_COMPILER = True
SIZE = 4


def make(window=None, softcap=None):
    kinds = (BlockConfig(rope=RopeConfig(), window=window), BlockConfig(rope=RopeConfig()))
    config = ModelConfig(
        family="llama", vocab_size=17, width=16, mlp_width=24, heads=4, kv_heads=2, head_dim=8,
        stacks=(StackConfig(repeats=2, period=kinds),), max_positions=64, attention_softcap=softcap,
    )  # fmt: skip
    model = build_model(config)
    return model, model.init(jax.random.key(0))


def as_inputs(tokens, positions, valid):
    return Inputs(*(jnp.asarray(x, jnp.int32) for x in (tokens, np.where(valid, positions, 0), valid)))


def run(model, params, tokens, lengths, chunks, *, dtype=jnp.float32, fresh=False):
    """Feeds each row's tokens in chunks through pages dealt out in a scattered order."""
    batch, length = tokens.shape
    pages = -(-length // SIZE)
    table = jnp.asarray(1 + np.random.default_rng(0).permutation(batch * pages).reshape(batch, pages), jnp.int32)
    pools = init_pools(
        model.config, pages=batch * pages + 1, window_pages=batch * pages + 1, page_size=SIZE, dtype=dtype
    )
    out, at = [], 0
    for width in chunks:
        positions = np.broadcast_to(np.arange(at, at + width, dtype=np.int32), (batch, width))
        valid = positions < np.asarray(lengths)[:, None]
        inputs = as_inputs(tokens[:, at : at + width], positions, valid)
        cache = PagedCache(pools, Tables(table, table), fresh=fresh and at == 0)
        outputs = jax.jit(model.forward)(params, inputs, cache)
        pools = outputs.cache.pools
        out.append(outputs.hidden)
        at += width
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("window", [None, 3, 6])
@pytest.mark.parametrize("fresh", [False, True])
def test_pages_read_as_one_sequence(window, fresh):
    model, params = make(window, softcap=20.0 if window == 3 else None)
    tokens = np.random.default_rng(1).integers(0, 17, (3, 14)).astype(np.int32)
    lengths = [14, 9, 1]
    positions = np.broadcast_to(np.arange(14, dtype=np.int32), tokens.shape)
    valid = positions < np.asarray(lengths)[:, None]
    want = model.forward(params, as_inputs(tokens, positions, valid)).hidden
    for chunks in ([14], [5, 9], [6] + [1] * 8):
        got = run(model, params, tokens, lengths, chunks, fresh=fresh)
        np.testing.assert_allclose(got[valid], want[valid], rtol=2e-5, atol=2e-6)


def test_a_rows_result_does_not_depend_on_longer_neighbours():
    """More pages to look at change no bit of a row that does not see them."""
    model, params = make(window=3)
    tokens = np.random.default_rng(1).integers(0, 17, (2, 20)).astype(np.int32)
    both = run(model, params, tokens, [6, 20], [20])
    short = run(model, params, tokens, [6, 6], [20])
    np.testing.assert_array_equal(both[0, :6], short[0, :6])


def test_layers_one_by_one_equal_the_scan():
    model, params = make(window=3)
    tokens = np.random.default_rng(1).integers(0, 17, (2, 9)).astype(np.int32)
    want = run(model, params, tokens, [9, 9], [8, 1])
    for layout in (unstack, for_decoding):
        np.testing.assert_allclose(run(model, layout(params), tokens, [9, 9], [8, 1]), want, rtol=1e-5, atol=1e-6)


def is_panels(x):
    return isinstance(x, Panels)


def test_kernels_in_panels_give_the_same_states_and_logits(monkeypatch):
    model, params = make(window=3)
    rule = platform.PanelRule(widths=(64, 8), least=2, groups=3, threads=10**6)
    monkeypatch.setitem(platform.CHOICES, "cpu", dataclasses.replace(platform.CHOICES["cpu"], panels=rule))
    cut = for_decoding(params, panels=True)
    kinds = {type(leaf) for leaf in jax.tree.leaves(cut, is_leaf=is_panels)}
    assert Panels in kinds
    tokens = np.random.default_rng(1).integers(0, 17, (2, 9)).astype(np.int32)
    want = run(model, params, tokens, [9, 9], [8, 1])
    got = run(model, cut, tokens, [9, 9], [8, 1])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    head = {HEAD: Panels.of(params["embed"]["table"].T, width=1, groups=4)}
    logits = model.unembed(params | head, jnp.asarray(want))
    np.testing.assert_allclose(logits, model.unembed(params, jnp.asarray(want)), rtol=1e-5, atol=1e-6)
    alone = dataclasses.replace(rule, threads=0)
    monkeypatch.setitem(platform.CHOICES, "cpu", dataclasses.replace(platform.CHOICES["cpu"], panels=alone))
    kinds = [type(leaf) for leaf in jax.tree.leaves(for_decoding(params, panels=True), is_leaf=is_panels)]
    assert Panels not in kinds, "more threads use whole products better"


def test_int8_pages_err_by_at_most_half_a_step_and_take_a_third_of_the_bytes():
    model, params = make()
    tokens = np.random.default_rng(1).integers(0, 17, (2, 12)).astype(np.int32)
    exact = run(model, params, tokens, [12, 12], [8, 4])
    rounded = run(model, params, tokens, [12, 12], [8, 4], dtype=jnp.int8)
    relative = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < relative < 0.02
    sizes = [page_bytes(model.config, page_size=64, dtype=t, window=False) for t in (jnp.float32, jnp.int8)]
    assert sizes[0] == 2 * 2 * 2 * 2 * 64 * 8 * 4
    assert sizes[1] == 2 * 2 * 2 * 2 * 64 * (8 + 4)


def test_copied_pages_continue_alike():
    """A row that reads copies of another's pages continues as that one would."""
    model, params = make(window=6)
    tokens = np.random.default_rng(1).integers(0, 17, (1, 7)).astype(np.int32)
    pools = init_pools(model.config, pages=6, window_pages=6, page_size=SIZE)
    table = jnp.asarray([[1, 2]], jnp.int32)

    def feed(pools, table, first, last):
        positions = np.arange(first, last, dtype=np.int32)[None]
        inputs = as_inputs(tokens[:, first:last], positions, np.ones_like(positions, bool))
        outputs = model.forward(params, inputs, PagedCache(pools, Tables(table, table)))
        return outputs.hidden, outputs.cache.pools

    _, pools = feed(pools, table, 0, 6)
    want, _ = feed(pools, table, 6, 7)
    moved = jnp.asarray([[[2], [5]]], jnp.int32)
    pools = copy(pools, moved, moved, model.config)
    got, _ = feed(pools, jnp.asarray([[1, 5]], jnp.int32), 6, 7)
    np.testing.assert_array_equal(got, want)
