import jax

from jaxpost.ops import platform


def test_a_program_may_be_traced_for_another_machine():
    assert platform.current() == jax.default_backend() == "cpu"
    with platform.target("tpu"):
        assert platform.choices() is platform.CHOICES["tpu"]
        with platform.target("gpu"):
            assert platform.current() == "gpu"
        assert platform.current() == "tpu"
    assert platform.current() == "cpu"
