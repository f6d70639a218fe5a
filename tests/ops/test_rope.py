import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.ops.rope import inverse_frequencies, rotate, rotation, yarn_attention_factor

HEAD = 16


def plain(theta, head=HEAD):
    return np.asarray([theta ** (-2 * i / head) for i in range(head // 2)])


def test_rotation_is_a_complex_product_in_float64():
    """Channels (i, i + H/2) as a complex number times e^(i position f)."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 3, HEAD)))
    positions = np.asarray([[0, 1, 2, 3, 4], [7, 100, 0, 1, 2]])
    turn = np.exp(1j * positions[..., None] * plain(100.0))[:, :, None, :]
    z = (x[..., : HEAD // 2] + 1j * x[..., HEAD // 2 :]) * turn
    want = np.concatenate([z.real, z.imag], axis=-1)
    cos, sin = rotation(jnp.asarray(positions), inverse_frequencies(HEAD, theta=100.0))
    np.testing.assert_allclose(rotate(jnp.asarray(x), cos, sin), want, rtol=1e-4, atol=2e-5)


def test_scores_depend_on_distance_only():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, HEAD)) for i in range(2))
    frequencies = inverse_frequencies(HEAD, theta=1e4)

    def score(at, back):
        turned = [rotate(x, *rotation(jnp.asarray([[p]]), frequencies)) for x, p in ((q, at), (k, at - back))]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(50, 4), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_linear_scaling_stretches_positions():
    np.testing.assert_allclose(
        inverse_frequencies(HEAD, theta=1e4, scaling="linear", factor=4.0), plain(1e4) / 4, rtol=1e-6
    )


def test_llama3_scaling_by_wavelength():
    """Each pair by the rule of its own wavelength, one after the other."""
    original, factor, low, high, theta = 64, 8.0, 1.0, 4.0, 1e3
    got = inverse_frequencies(
        HEAD, theta=theta, scaling="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high,
        original_max_positions=original,
    )  # fmt: skip
    kinds = set()
    for f, scaled in zip(plain(theta), got, strict=True):
        wavelength = 2 * math.pi / f
        if wavelength < original / high:
            want, kind = f, "kept"
        elif wavelength > original / low:
            want, kind = f / factor, "divided"
        else:
            share = (original / wavelength - low) / (high - low)
            want, kind = (1 - share) * f / factor + share * f, "between"
        kinds.add(kind)
        assert scaled == pytest.approx(want, rel=1e-5)
    assert kinds == {"kept", "divided", "between"}


def test_yarn_scaling_by_turns():
    """Pairs that turn often are kept, those that turn little divided, with a ramp over the pairs between."""
    original, factor, fast, slow, theta = 64, 4.0, 4.0, 0.5, 1e3
    got = inverse_frequencies(
        HEAD, theta=theta, scaling="yarn", factor=factor, beta_fast=fast, beta_slow=slow,
        original_max_positions=original,
    )  # fmt: skip
    base = plain(theta)
    turns = original * base / (2 * math.pi)
    first = max(math.floor(np.interp(-math.log(fast), -np.log(turns), np.arange(len(base)))), 0)
    last = math.ceil(np.interp(-math.log(slow), -np.log(turns), np.arange(len(base))))
    for i, scaled in enumerate(got):
        ramp = min(max((i - first) / (last - first), 0), 1)
        assert scaled == pytest.approx(base[i] / factor * ramp + base[i] * (1 - ramp), rel=1e-5)
    assert 0 < first < last < len(base)


def test_yarn_factor_multiplies_cos_and_sin():
    factor = yarn_attention_factor(4.0)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    cos, sin = rotation(jnp.asarray([[5]]), inverse_frequencies(HEAD, theta=1e4), factor=factor)
    np.testing.assert_allclose(cos**2 + sin**2, factor**2, rtol=1e-5)


def test_low_precision_heads_turn_in_float32():
    """At position 4000 a bfloat16 angle would be off by radians."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    y = rotate(x, *rotation(jnp.asarray([[4001]]), inverse_frequencies(2, theta=1.0)))
    assert y.dtype == jnp.bfloat16
    want = [math.cos(4001) - math.sin(4001), math.cos(4001) + math.sin(4001)]
    np.testing.assert_allclose(y.astype(jnp.float32).ravel(), want, atol=1e-2)


def test_odd_heads_are_refused():
    with pytest.raises(ValueError, match="even, not 7"):
        inverse_frequencies(7, theta=1e4)
