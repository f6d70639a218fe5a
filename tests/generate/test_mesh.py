"""The engine on a mesh of 8 devices writes what it writes on one: rows and their pages are split, texts are not."""

from functools import cache, partial

import jax
import numpy as np
import pytest

from jaxpost import sharding
from jaxpost.generate.engine import Engine
from jaxpost.generate.pages import OutOfPages
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import make_sampler
from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.models.table import axes_tree
from jaxpost.models.transformer import build_model

PROMPTS = [[1, 2, 3], [4], [0, 5, 2, 1, 3, 3, 1], [2, 2, 2, 2, 2, 2, 2, 2, 1]]
MESHES = {
    "data8": {"data": 8},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp2_tensor4": {"fsdp": 2, "tensor": 4},  # more tensor shards than key/value heads
    "tensor2": {"data": 4, "tensor": 2},
}
PAGE = 8
OPTIONS = {"eos_ids": (6,), "context": 200, "rows": 8, "page_size": PAGE, "prefill_tokens": 64, "max_steps": 32}


@cache
def toy(window=None):
    """Functions and parameters of two layers with sharp predictions, without a mesh."""
    kinds = (BlockConfig(rope=RopeConfig(), window=window), BlockConfig(rope=RopeConfig()))
    config = ModelConfig(
        family="llama", vocab_size=8, width=16, mlp_width=24, heads=4, kv_heads=2, head_dim=8,
        stacks=(StackConfig(repeats=1, period=kinds) if window else StackConfig(repeats=2, period=kinds[1:]),),
        max_positions=256,
    )  # fmt: skip
    model = build_model(config)
    return model, jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, model.init(jax.random.key(3)))


def on_mesh(name, window=None):
    """The toy model's functions and parameters on a mesh, placed as training places them."""
    model, params = toy(window)
    mesh = sharding.make_mesh(MESHES[name])
    many = build_model(model.config, sharding.make_constrain(mesh), mesh=mesh)
    places = sharding.param_shardings(axes_tree(many.table), mesh, params, report=lambda _: None)
    return many, jax.device_put(params, places), mesh


def sampler(name, window=None, **settings):
    model, params, mesh = on_mesh(name, window)
    sample = make_sampler(model, mesh=mesh, **(OPTIONS | settings))
    return lambda *a, **k: sample(params, *a, **k), sample


@cache
def on_one_device(window=None, **settings):
    model, params = toy(window)
    return partial(make_sampler(model, **(OPTIONS | settings)), params)


shared = cache(sampler)


def told(completions):
    return {(c.example, c.sample): (c.tokens, c.finish) for c in completions}


def all_pages_came_back(engine):
    return all(book.free == book.full.count - 1 for book in engine.books)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "data2_fsdp2_tensor2" else pytest.mark.slow) for name in MESHES]
)
def test_texts_are_those_of_one_device(name, capfd):
    many, made = shared(name)
    one = on_one_device()
    # Rows that end early make room for smaller programs: once is enough.
    some = {"max_tokens": 20, "ignore_eos": name != "data2_fsdp2_tensor2"}
    for wish in (SamplingParams(temperature=0, n=2, **some), SamplingParams(n=2, **some)):
        want, found = one(PROMPTS, wish, seed=3, draw=1), many(PROMPTS, wish, seed=3, draw=1)
        assert told(found) == told(want)
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert len({c.tokens for c in found}) == 8
    assert all_pages_came_back(made.engine)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
def test_windows_and_int8_pages_on_a_mesh():
    wish = SamplingParams(n=2, max_tokens=20, ignore_eos=True)
    settings = {"kv_dtype": np.int8}
    many = sampler("data2_fsdp2_tensor2", 5, **settings)[0]
    assert told(many(PROMPTS, wish, seed=4)) == told(on_one_device(5, **settings)(PROMPTS, wish, seed=4))


def test_each_device_holds_its_own_pages_only():
    many, made = shared("data2_fsdp2_tensor2")
    many(PROMPTS, SamplingParams(n=2, max_tokens=20))
    for pool in jax.tree.leaves(made.engine.pools):
        layers, pages, heads, size, width = pool.shape
        assert {s.data.shape for s in pool.addressable_shards} == {(layers, pages // 4, heads // 2, size, width)}
    assert made.engine.capacity == 4 * (made.engine.book.full.count - 1) * PAGE


def test_a_prompts_samples_share_a_part_where_it_has_rows(monkeypatch):
    many, made = shared("data2_fsdp2_tensor2")
    many(PROMPTS, SamplingParams(n=2, max_tokens=20))
    stored = []
    store = made.engine._store
    monkeypatch.setattr(
        made.engine, "_store", lambda weights, part: (stored.append(int(part.counts.sum())), store(weights, part))[1]
    )
    many(PROMPTS, SamplingParams(n=2, max_tokens=20))
    assert sum(stored) == sum(len(p) - 1 for p in PROMPTS), "4 prompts in 4 parts, each read once"
    stored.clear()
    many([PROMPTS[3]], SamplingParams(n=8, max_tokens=20))
    assert stored == [4 * (len(PROMPTS[3]) - 1)], "8 samples of one prompt use all 4 parts, which read it in one pass"


def test_a_part_that_overflows_puts_its_last_row_back():
    wishes = [SamplingParams(n=1 + i, max_tokens=17 + i, ignore_eos=True) for i in range(4)]
    tight, made = sampler("data2_fsdp2_tensor2", cache_tokens=4 * 56)
    tight(PROMPTS, wishes[:1] * 4)
    put_back = []
    engine = made.engine
    release = engine.release
    engine.release = lambda texts: (put_back.extend(len(t.tokens) for t in texts), release(texts))[1]
    assert told(tight(PROMPTS, wishes, seed=3)) == told(on_one_device()(PROMPTS, wishes, seed=3))
    ends = sorted(len(PROMPTS[i]) + w.max_tokens for i, w in enumerate(wishes) for _ in range(w.n))
    assert len(put_back) > len(ends) + len(PROMPTS), "some rows were put back before their ends"
    assert all_pages_came_back(engine)
    with pytest.raises(ValueError, match="the cache holds 56 in each of the 4 parts"):
        tight([[1] * 30], SamplingParams(max_tokens=30))


def test_a_reservation_that_fails_in_one_part_changes_none():
    model, params, mesh = on_mesh("data2_fsdp2_tensor2")
    engine = Engine(model, cache_tokens=4 * 32, page_size=PAGE, mesh=mesh)
    weights = engine.weights(params)
    texts = engine.admit(weights, [[1, 2, 3]] * 4)
    assert [t.pages.shard for t in texts] == [0, 1, 2, 3]
    before = [book.free for book in engine.books]
    with pytest.raises(OutOfPages) as caught:
        engine.admit(weights, [[1] * 9, [1] * 40], shards=[0, 2])
    assert caught.value.shard == 2
    assert [book.free for book in engine.books] == before
    engine.release(texts)
    small, params = toy()
    alone = Engine(small, cache_tokens=64, page_size=PAGE)
    for got, want in zip(engine.score(weights, PROMPTS), alone.score(alone.weights(params), PROMPTS), strict=True):
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_weights_of_a_training_mesh_are_moved_and_others_taken_as_they_are():
    many, made = shared("tensor2")
    model, params, mesh = on_mesh("tensor2")
    wish = SamplingParams(n=2, max_tokens=20, ignore_eos=True)
    want = told(many(PROMPTS, wish, seed=3))
    training = sharding.remesh(mesh, {"fsdp": 8})
    places = sharding.param_shardings(axes_tree(model.table), training, params, report=lambda _: None)
    trained = jax.device_put(toy()[1], places)
    assert told(made(trained, PROMPTS, wish, seed=3)) == want
    assert made.engine.weights(params).stacked is params
