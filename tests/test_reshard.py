"""Arrays from one mesh to another of the same devices."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost import sharding
from jaxpost.sharding.reshard import move
from tests.pods._aot import collectives

PLACES = [
    ({"tensor": 8}, P(None, "tensor")),
    ({"tensor": 4, "data": -1}, P(None, "tensor")),
    ({"tensor": 2, "data": 4}, P("tensor")),
]


@pytest.mark.parametrize(("sizes", "spec"), PLACES)
def test_values_stay_and_places_are_as_asked(sizes, spec):
    old = sharding.make_mesh({"fsdp": 8})
    new = sharding.remesh(old, sizes)
    assert list(new.devices.flat) == list(old.devices.flat)
    values = {"w": np.arange(64 * 32, dtype=np.float32).reshape(64, 32), "norm": np.ones(32, np.float32)}
    before = jax.device_put(values, {"w": NamedSharding(old, P("fsdp")), "norm": NamedSharding(old, P())})
    places = {"w": NamedSharding(new, spec), "norm": NamedSharding(new, P())}
    after = sharding.reshard(before, places)
    assert after["w"].sharding.is_equivalent_to(places["w"], 2)
    np.testing.assert_array_equal(after["w"], values["w"])
    np.testing.assert_array_equal(before["w"], values["w"])
    assert after["norm"] is before["norm"], "what lies right is not copied"
    assert sharding.reshard(after, places)["w"] is after["w"]


@pytest.mark.parametrize(("sizes", "spec"), PLACES)
def test_no_device_ever_holds_more_than_its_new_part(sizes, spec):
    old = sharding.make_mesh({"fsdp": 8})
    place = NamedSharding(sharding.remesh(old, sizes), spec)
    x = jax.ShapeDtypeStruct((64, 32), np.float32, sharding=NamedSharding(old, P("fsdp")))
    found = collectives(move.lower(x, place).compile().as_text())
    assert found
    assert max(c.bytes for c in found) <= x.size // sizes["tensor"] * 4
    # The partitioner alone would gather all of it.
    if sizes["tensor"] == 4:
        alone = jax.jit(lambda x: x, out_shardings=place).lower(x).compile()
        assert max(c.bytes for c in collectives(alone.as_text())) == x.size * 4


def test_other_devices_are_refused():
    new = sharding.make_mesh({"tensor": 8})
    with pytest.raises(ValueError, match=r"a/w lies on 1 devices, and shall go to 8 others"):
        sharding.reshard({"a": {"w": jax.numpy.ones(8)}}, {"a": {"w": NamedSharding(new, P("tensor"))}})
