"""Nash advantages against a loop over all pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.rl.advantages import by_order, nash

BEATS = {"order": by_order, "logistic": lambda x: jax.nn.sigmoid(x / 0.7)}


def probability(name: str, mine: float, other: float) -> float:
    if name == "logistic":
        return 1 / (1 + np.exp(-(mine - other) / 0.7))
    return 1.0 if mine > other else 0.5 if mine == other else 0.0


@pytest.mark.parametrize("name", BEATS)
def test_mean_over_the_opponents_samples_of_the_group(name):
    rng = np.random.default_rng(0)
    rewards = rng.choice([0.0, 0.3, 1.0, np.nan], 90, p=[0.3, 0.3, 0.3, 0.1]).astype(np.float32)
    groups = np.sort(rng.integers(0, 14, 90)).astype(np.int32)
    opponent = rng.random(90) < 0.4
    want = np.zeros(90)
    for i in range(90):
        others = [j for j in range(90) if groups[j] == groups[i] and opponent[j] and not np.isnan(rewards[j])]
        if others and not opponent[i] and not np.isnan(rewards[i]):
            want[i] = np.mean([probability(name, rewards[i], rewards[j]) - 0.5 for j in others])
    found = nash(jnp.asarray(rewards), jnp.asarray(groups), jnp.asarray(opponent), BEATS[name])
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert np.count_nonzero(want) > 10
