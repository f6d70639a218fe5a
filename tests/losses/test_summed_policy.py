"""Where a token's loss is its own, the sum taken with its gradient is the sum that is differentiated afterwards."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_policy import HYPER, TAUS, arrays, bigram_model, to_batch

from jaxpost.losses import correction, policy, surrogates
from jaxpost.losses.aggregate import constant_mean, sequence_mean, token_mean
from jaxpost.metrics.terms import means, reduce_terms

CASES = [
    (surrogates.ppo, token_mean, None, True),
    (surrogates.ppo, constant_mean(4), correction.masked(correction.mean_sequence_weights), True),
    (surrogates.cispo, sequence_mean, correction.truncated(), True),
    (surrogates.cispo_two_sided, constant_mean(4), None, True),
    (surrogates.reinforce, sequence_mean, None, False),
    (surrogates.sapo, sequence_mean, correction.truncated(), True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_both_ways_give_one_loss(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    surrogate, aggregate, corrected, old = case
    params, batch = arrays()
    batch |= {} if old else {"old_logprobs": None}
    batch = to_batch({name: x for name, x in batch.items() if x is not None})
    hyper = {name: jnp.float32(x) for name, x in (HYPER | TAUS).items() if name != "entropy_coef"}

    def total(p: Any) -> Any:
        how = {"surrogate": surrogate, "aggregate": aggregate, "correction": corrected, "chunk_tokens": 6}
        terms = policy.policy_gradient(bigram_model(), p, {}, batch, jax.random.key(0), hyper, **how)
        return means(reduce_terms(*terms))["loss"], (means(reduce_terms(*terms)), jnp.size(terms[0]["policy"].value))

    start = {"policy": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)}
    summed, (now, one) = jax.grad(total, has_aux=True)(start)
    monkeypatch.setattr(policy, "PER_TOKEN", ())
    apart, (later, many) = jax.grad(total, has_aux=True)(start)
    assert (one, many) == (1, 16)
    for got, want in zip(jax.tree.leaves((summed, now)), jax.tree.leaves((apart, later)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
