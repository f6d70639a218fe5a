"""The KL summed into a sample's reward, against arithmetic by hand."""

import numpy as np

from jaxpost.assemble.credit import make_credit
from jaxpost.config_policy_losses import ReinforceLoss
from jaxpost.config_rl import GRPOAdvantage, KLSection, RLOOAdvantage
from jaxpost.train.online_job import Known

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], np.float32)
LOGPROBS, REFERENCE = (RNG.normal(-1, 0.3, MASK.shape).astype(np.float32) for _ in range(2))
REWARDS = np.array([1, 0, 1, np.nan], np.float32)


def credit(advantage, **kl):
    section = KLSection(coef=0.1, where="sample", **kl)
    nothing = np.zeros_like(MASK)
    known = Known(REWARDS, np.zeros(4, np.int32), MASK, np.zeros(4, bool), np.full(4, np.nan, np.float32),
                  LOGPROBS, REFERENCE, nothing, None)  # fmt: skip
    return make_credit(advantage, kl=section, loss=ReinforceLoss())(known, {"kl_coef": 0.1, "baseline": 0.0})


def test_rloo_compares_rewards_with_their_kl():
    total = REWARDS - 0.1 * np.sum(MASK * (LOGPROBS - REFERENCE), axis=1)
    found = credit(RLOOAdvantage(), estimator="k1")
    for i in range(3):
        others = [total[j] for j in range(3) if j != i]
        np.testing.assert_allclose(found.advantages[i], MASK[i] * (total[i] - np.mean(others)), rtol=1e-5)
    assert not found.advantages[3].any()
    assert not found.weights[3].any()


def test_other_estimators_and_advantages_read_it_too():
    x = LOGPROBS - REFERENCE
    total = (REWARDS - 0.1 * np.sum(MASK * x**2 / 2, axis=1))[:3]
    found = credit(GRPOAdvantage(scale="none"), estimator="k2")
    np.testing.assert_allclose(found.advantages[:3], MASK[:3] * (total - total.mean())[:, None], rtol=1e-5)


def test_a_truncated_sample_that_is_masked_has_its_kl_among_the_others():
    known = Known(np.ones(4, np.float32), np.zeros(4, np.int32), MASK, np.array([False, False, False, True]),
                  np.full(4, np.nan, np.float32), LOGPROBS, REFERENCE, np.zeros_like(MASK), None)  # fmt: skip
    one = lambda truncated: make_credit(  # noqa: E731
        RLOOAdvantage(), kl=KLSection(coef=0.1, where="sample"), loss=ReinforceLoss(truncated=truncated)
    )(known, {"kl_coef": 0.1, "baseline": 0.0})
    np.testing.assert_allclose(one("mask").advantages[:3], one("keep").advantages[:3], rtol=1e-6)
    assert not one("mask").weights[3].any()
