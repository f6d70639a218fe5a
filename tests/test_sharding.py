"""Meshes, rules, and the shardings of parameters, optimiser states and batches on 8 CPU devices."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost import sharding
from jaxpost.config import MeshSection
from jaxpost.types import TokenBatch, TrainState

MESH_222 = {"data": 2, "fsdp": 2, "tensor": 2}


class Silent:
    """Collects what a function reports."""

    def __init__(self):
        self.said = []

    def __call__(self, sentence):
        self.said.append(sentence)


# Meshes


def test_minus_one_takes_the_remaining_devices():
    assert sharding.mesh_sizes(MeshSection(tensor=2), 8) == {"data": 1, "fsdp": 4, "tensor": 2, "seq": 1, "expert": 1}
    assert dict(sharding.make_mesh(MeshSection()).shape) == {"data": 1, "fsdp": 8, "tensor": 1, "seq": 1, "expert": 1}


def test_mesh_holds_every_device_once_with_auto_axes():
    mesh = sharding.make_mesh(MESH_222)
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"fsdp": 3, "data": 1}, ["needs 3 devices", "there are 8", "--mesh.fsdp"]),
        ({"fsdp": 16}, ["needs 16 devices", "there are 8"]),
        ({"fsdp": -1, "tensor": 3}, ["multiple of 3", "there are 8", "--mesh.tensor"]),
        ({"fsdp": -1, "data": -1}, ["only one axis may be -1"]),
        ({"fsdp": 0}, ["--mesh.fsdp must be at least 1"]),
        ({"fdsp": 8}, ["'fdsp'", "data, fsdp, tensor, seq, expert"]),
        ({}, ["needs 1 devices", "there are 8", "--mesh.fsdp"]),
    ],
)
def test_mesh_errors_say_numbers_and_flags(sizes, words):
    with pytest.raises(ValueError, match="mesh") as error:
        sharding.make_mesh(sizes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("data", "fsdp", "slices", "expected"),
    [(4, 8, 4, (4, 1)), (1, 32, 4, (1, 4)), (2, 16, 4, (2, 2)), (6, 4, 3, (3, 1)), (8, 1, 2, (2, 1))],
)
def test_slices_go_to_data_first_then_fsdp(data, fsdp, slices, expected):
    across = sharding.slice_sizes({"data": data, "fsdp": fsdp, "tensor": 4, "seq": 1, "expert": 1}, slices)
    assert (across["data"], across["fsdp"]) == expected
    assert across["tensor"] == 1


def test_slices_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"cannot be spread over 4 slices.*--mesh.data"):
        sharding.slice_sizes({"data": 3, "fsdp": 2, "tensor": 8, "seq": 1, "expert": 1}, 4)


# Specs


def test_specs_follow_the_rules():
    assert sharding.spec(("layers", "embed", "heads")) == P(None, "fsdp", "tensor")
    assert sharding.spec(("vocab", "embed")) == P("tensor", "fsdp")
    assert sharding.spec(("batch", "length", "act_embed")) == P(("data", "fsdp"), "seq")
    assert sharding.spec((None, "norm")) == P()


def test_axes_of_size_one_leave_the_spec():
    mesh = sharding.make_mesh({"fsdp": 8})
    assert sharding.spec(("layers", "embed", "heads"), mesh=mesh) == P(None, "fsdp")
    assert sharding.spec(("batch",), mesh=mesh) == P("fsdp")


def test_collision_is_an_error_whatever_the_mesh():
    rules = {**sharding.RULES, "embed": "tensor"}
    with pytest.raises(ValueError, match=r"'tensor' would split both 'embed' and 'mlp'"):
        sharding.spec(("layers", "embed", "mlp"), rules, sharding.make_mesh({"fsdp": 8}))


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="'wide' has no sharding rule"):
        sharding.spec(("wide",))
    with pytest.raises(ValueError, match="'model', which is no mesh axis"):
        sharding.spec(("embed",), {"embed": "model"})


# Parameters


def abstract_of(shapes):
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


def test_param_shardings_place_shards_as_numpy_slices():
    mesh = sharding.make_mesh(MESH_222)
    kernel = np.arange(2 * 8 * 12, dtype=np.float32).reshape(2, 8, 12)
    places = sharding.param_shardings({"k": ("layers", "embed", "mlp")}, mesh, {"k": kernel})
    array = jax.device_put(kernel, places["k"])
    for shard in array.addressable_shards:
        _, f, t, _, _ = np.argwhere(mesh.devices == shard.device)[0][:5]
        np.testing.assert_array_equal(shard.data, kernel[:, f * 4 : f * 4 + 4, t * 6 : t * 6 + 6])


def test_indivisible_dimension_names_parameter_number_and_flag():
    mesh = sharding.make_mesh({"fsdp": 8})
    tree = abstract_of({"stacks": {"0": {"q_proj": {"kernel": (2, 12, 8)}}}})
    axes = {"stacks": {"0": {"q_proj": {"kernel": ("layers", "embed", "heads")}}}}
    with pytest.raises(ValueError, match=r"stacks/0/q_proj/kernel: dimension 1 \(embed, 12\).*fsdp=8.*--mesh.fsdp"):
        sharding.param_shardings(axes, mesh, tree)


def test_small_axes_stay_whole_and_are_reported():
    mesh, report = sharding.make_mesh({"fsdp": 2, "tensor": 4}), Silent()
    places = sharding.param_shardings(
        {"k": ("layers", "embed", "kv_heads"), "v": ("vocab", "embed")},
        mesh,
        abstract_of({"k": (2, 8, 6), "v": (7, 8)}),
        report=report,
    )
    assert places["k"].spec == P(None, "fsdp")
    assert places["v"].spec == P(None, "fsdp")
    assert len(report.said) == 2
    assert "dimension 2 (kv_heads, 6) cannot be split by tensor=4" in report.said[0]


def test_axes_must_name_every_dimension():
    with pytest.raises(ValueError, match=r"parameter w: axes \('embed',\)"):
        sharding.param_shardings({"w": ("embed",)}, sharding.make_mesh({"fsdp": 8}), abstract_of({"w": (8, 8)}))


class Overlay(NamedTuple):
    a: object
    b: object


def test_axes_reach_into_weight_leaves():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    axes = {"q": Overlay(("layers", "embed", "rank"), ("layers", "rank", "heads"))}
    shape = {"q": Overlay(jnp.zeros((2, 8, 3)), jnp.zeros((2, 3, 6)))}
    places = sharding.param_shardings(axes, mesh, shape)
    assert (places["q"].a.spec, places["q"].b.spec) == (P(None, "fsdp"), P(None, None, "tensor"))


# Optimiser states

AXES = {"policy": {"embed": ("vocab", "embed"), "kernel": ("layers", "embed", "mlp"), "scale": ("layers", "norm")}}
PARAMS = {"policy": {"embed": (256, 128), "kernel": (2, 128, 256), "scale": (2, 128)}}
OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "adamw_masked": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    ),
    "lion": optax.lion(1e-3),
    "muon": optax.contrib.muon(1e-3),
    "adafactor": optax.adafactor(1e-3),
    "multi_steps": optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation(),
}


def make_state(tx, params):
    average = {"ema": params, "skips": jnp.zeros((), jnp.int32)}
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_shardings_mirror_the_parameters(name):
    """Oracle: a leaf of a parameter's shape and name lies as that parameter; shards are their declared fraction."""
    mesh, report, tx = sharding.make_mesh(MESH_222), Silent(), OPTIMIZERS[name]
    params = abstract_of(PARAMS)
    places = sharding.param_shardings(AXES, mesh, params)
    abstract = jax.eval_shape(partial(make_state, tx), params)
    shardings = sharding.state_shardings(abstract, places, mesh, report=report)
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract)
    assert shardings.params == places
    assert shardings.extra["ema"] == places
    mirrored = 0
    for path, place in jax.tree_util.tree_leaves_with_path(shardings.opt_state):
        shape = _leaf(abstract.opt_state, path).shape
        kind = str(path[-1].key) if hasattr(path[-1], "key") else ""
        same = kind in PARAMS["policy"] and shape == PARAMS["policy"][kind]
        assert place == (places["policy"][kind] if same else sharding.replicated(mesh)), path
        mirrored += same
    moments = {"adamw": 6, "adamw_masked": 6, "lion": 3, "muon": 4, "adafactor": 1, "multi_steps": 9}
    assert mirrored == moments[name]
    assert report.said == []


def _leaf(tree, path):
    return dict(jax.tree_util.tree_leaves_with_path(tree))[path]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_update_equals_one_device(name):
    tx, mesh = OPTIMIZERS[name], sharding.make_mesh(MESH_222)
    leaves, tree = jax.tree.flatten(abstract_of(PARAMS))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = tree.unflatten([jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)])
    state = make_state(tx, params)

    def step(state):
        grads = jax.tree.map(jnp.sin, state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises b1 to an integer count
            updates, opt = tx.update(grads, state.opt_state, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt)

    places = sharding.state_shardings(
        jax.eval_shape(lambda s: s, state), sharding.param_shardings(AXES, mesh, params), mesh
    )
    there = jax.jit(step, out_shardings=places)(jax.device_put(state, places))
    assert jax.tree.map(lambda x: x.sharding, there) == places
    here = jax.jit(step)(state)
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_large_replicated_state_is_reported():
    mesh, report = sharding.make_mesh({"fsdp": 8}), Silent()
    params = abstract_of({"w": (8, 8)})
    state = TrainState(abstract_of(()), params, {"sketch": jax.ShapeDtypeStruct((2**20,), jnp.float32)}, {})
    places = sharding.param_shardings({"w": ("embed", "mlp")}, mesh, params)
    sharding.state_shardings(state, places, mesh, report=report)
    assert len(report.said) == 1
    assert "sketch" in report.said[0]


def test_state_shardings_want_the_parameters_own_tree():
    mesh = sharding.make_mesh({"fsdp": 8})
    state = TrainState(abstract_of(()), abstract_of({"w": (8, 8)}), (), {})
    with pytest.raises(ValueError, match="differ at u"):
        sharding.state_shardings(state, {"u": sharding.replicated(mesh)}, mesh)


# Activations


def test_constrain_places_and_keeps_values():
    mesh = sharding.make_mesh(MESH_222)
    x = jnp.arange(8 * 4 * 6, dtype=jnp.float32).reshape(8, 4, 6)
    y = jax.jit(lambda x: sharding.make_constrain(mesh)(x, ("batch", "length", "act_mlp")))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), 3)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("rows", "expected"), [(8, P(("data", "fsdp"))), (2, P("data")), (1, P()), (3, P())])
def test_constrain_gives_up_axes_that_do_not_divide(rows, expected):
    mesh = sharding.make_mesh(MESH_222)
    y = jax.jit(lambda x: sharding.make_constrain(mesh)(x, ("batch",)))(jnp.zeros(rows))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, expected), 1)


def test_constrain_wants_a_name_for_every_dimension():
    with pytest.raises(ValueError, match="do not name the dimensions"):
        sharding.make_constrain(sharding.make_mesh(MESH_222))(jnp.zeros((2, 2)), ("batch",))


def test_pinned_gives_gradients_the_parameters_places():
    """The loss wants the matrix split by its columns; its gradient comes back split by rows, and equal."""
    mesh = sharding.make_mesh({"fsdp": 8})
    places = sharding.param_shardings({"w": ("embed", None)}, mesh, {"w": jnp.zeros((8, 16))})
    constrain = sharding.make_constrain(mesh)

    def loss(params, x):
        return jnp.sum(jnp.sin(x @ constrain(params["w"], (None, "embed"))))

    params, x = {"w": jnp.arange(128.0).reshape(8, 16) / 100}, jnp.ones((4, 8))
    plain, kept = (jax.jit(jax.grad(f))(params, x)["w"] for f in (loss, sharding.pinned(loss, places)))
    assert not plain.sharding.is_equivalent_to(places["w"], 2)
    assert kept.sharding.is_equivalent_to(places["w"], 2)
    np.testing.assert_array_equal(plain, kept)
    alone = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    assert sharding.pinned(loss, {"w": sharding.replicated(alone)}) is loss


# Batches


def token_batch(rows):
    ints = np.arange(rows * 4, dtype=np.int32).reshape(rows, 4)
    return TokenBatch(ints, ints, ints, ints.astype(np.float32), np.arange(rows, dtype=np.int32))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, MESH_222, {"tensor": 8}, {"data": 4, "seq": 2}])
def test_to_global_round_trip(sizes):
    mesh, batch = sharding.make_mesh(sizes), token_batch(16)
    placed = sharding.to_global(batch, mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for a, b in zip(batch, placed, strict=True):
        assert b.sharding == sharding.batch_sharding(mesh)
        assert b.addressable_shards[0].data.shape[0] == 16 // ways
        np.testing.assert_array_equal(a, b)


def test_rows_that_cannot_be_dealt_are_an_error():
    mesh = sharding.make_mesh(MESH_222)
    with pytest.raises(ValueError, match=r"tokens of shape \(6, 4\).*multiple of 4"):
        sharding.to_global(token_batch(6), mesh)
    with pytest.raises(ValueError, match=r"batch_size 6 cannot be dealt to 4 devices.*multiple of 4, such as 8"):
        sharding.check_batch(6, mesh)
    with pytest.raises(ValueError, match=r"batch_size 8 in 4 microbatches.*multiple of 16"):
        sharding.check_batch(8, mesh, microbatches=4)
    sharding.check_batch(16, mesh, microbatches=4)


def test_local_rows_cover_the_batch_in_mesh_order():
    """One process holds every row; the order is ascending even where the mesh permutes devices."""
    devices = np.array(jax.devices())[[0, 1, 4, 5, 2, 3, 6, 7]].reshape(1, 8, 1, 1, 1)
    np.testing.assert_array_equal(sharding.local_rows(Mesh(devices, sharding.AXES), 16), np.arange(16))


# Processes


def test_distributed_only_when_asked(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: calls.append(a))
    assert not sharding.initialize_distributed({})
    assert not sharding.initialize_distributed({"JAXPOST_DISTRIBUTED": "0"})
    assert calls == []
    assert sharding.initialize_distributed({"JAXPOST_DISTRIBUTED": "auto"})
    three = {"JAXPOST_COORDINATOR": "h:1", "JAXPOST_NUM_PROCESSES": "2", "JAXPOST_PROCESS_ID": "1"}
    assert sharding.initialize_distributed(three)
    assert calls == [(), ("h:1", 2, 1)]


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"JAXPOST_DISTRIBUTED": "yes"}, "auto, 0 or unset"),
        ({"JAXPOST_COORDINATOR": "h:1"}, "JAXPOST_NUM_PROCESSES, JAXPOST_PROCESS_ID not"),
        (
            {"JAXPOST_COORDINATOR": "h:1", "JAXPOST_NUM_PROCESSES": "two", "JAXPOST_PROCESS_ID": "0"},
            "whole numbers",
        ),
    ],
)
def test_distributed_errors(environ, words):
    with pytest.raises(ValueError, match=words):
        sharding.initialize_distributed(environ)
