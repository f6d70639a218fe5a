"""An unscored sample might as well not be there, whatever the advantage: the others' credit is the same."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.assemble.credit import _step_ends, make_credit
from jaxpost.config_policy_losses import PPOLoss
from jaxpost.config_rl import (
    BestWorst,
    GAEAdvantage,
    GDPOAdvantage,
    GRPOAdvantage,
    KLSection,
    NashAdvantage,
    ProcessAdvantage,
    ReinforceAdvantage,
    ReinforcePlusPlusAdvantage,
    ReMaxAdvantage,
    RLOOAdvantage,
    SelfPlay,
)
from jaxpost.train.online_job import Known

NAN = float("nan")
REWARDS = np.array([1.0, 0.0, NAN, 0.5, 2.0, NAN, -1.0, 3.0, NAN], np.float32)
GROUPS = np.repeat(np.arange(3, dtype=np.int32), 3)
SECTIONS = [
    *(GRPOAdvantage(scale=scale) for scale in ("group", "batch", "none")),
    RLOOAdvantage(),
    *(ReinforceAdvantage(baseline=baseline) for baseline in ("none", "batch_mean", "running_mean")),
    ReMaxAdvantage(),
    *(ReinforcePlusPlusAdvantage(group_baseline=baseline) for baseline in (False, True)),
    *(GAEAdvantage(whiten=whiten) for whiten in (False, True)),
    ProcessAdvantage(),
    BestWorst(),
    NashAdvantage(),
    GDPOAdvantage(columns=("a", "b"), weights=(1.0, 0.5)),
]


def known() -> Known:
    rng = np.random.default_rng(0)
    numbers = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    mask = np.ones((9, 4), np.float32)
    mask[1, 3:] = mask[4, 2:] = mask[5, 1:] = 0
    steps = numbers(9, 2)
    steps[np.isnan(REWARDS)] = NAN
    found = Known(
        REWARDS, GROUPS, mask, np.zeros(9, bool), numbers(9), numbers(9, 4), numbers(9, 4), numbers(9, 4),
        (steps, np.tile(np.array([0, 1], np.int32), (9, 1))), np.array([False, True, False] * 3), numbers(9, 2),
        np.abs(numbers(9, 4)),
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, found)


def kept(found: Known, rows: np.ndarray) -> Known:
    return jax.tree.map(lambda x: x[rows], found)


CASES = [(section, "reward") for section in SECTIONS] + [(GRPOAdvantage(), "sample"), (RLOOAdvantage(), "sample")]
CASES += [(GAEAdvantage(), "loss"), (ReinforcePlusPlusAdvantage(group_baseline=True), "loss")]


QUICK = ("grpo-group-", "rloo-", "reinforce-running_mean-", "gae-")
"""Those that are tried every time."""


def marked(section: Any, where: str) -> Any:
    name = "-".join(map(str, vars(section).values())) + f"-{where}"
    quick = name.startswith(QUICK) and where == "reward" and not getattr(section, "whiten", False)
    return pytest.param(section, where, id=name.strip(), marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("section", "where"), [marked(*case) for case in CASES])
@pytest.mark.parametrize("share", [1.0, pytest.param(0.4, marks=pytest.mark.slow)])
def test_the_credit_of_the_scored_is_as_if_they_were_alone(section: Any, where: Any, share: float) -> None:
    if share < 1 and isinstance(section, BestWorst):
        pytest.skip("pairs are of whole samples")
    rows = np.flatnonzero(~np.isnan(REWARDS))
    numbers = {"kl_coef": 0.3, "baseline": 0.25}
    kl = KLSection(coef=0.3, where=where, estimator="k1")
    credit = make_credit(section, kl=kl, loss=PPOLoss(top_entropy=share))
    whole, alone = credit(known(), numbers), credit(kept(known(), rows), numbers)
    for name, one, other in zip(whole._fields, whole, alone, strict=True):
        np.testing.assert_allclose(one[rows], other, rtol=1e-5, atol=1e-6, err_msg=name)
    gone = np.isnan(REWARDS)
    assert not whole.advantages[gone].any()
    assert not whole.weights[gone].any()
    assert np.isfinite(np.concatenate([np.ravel(x) for x in whole])).all()


def test_tokens_of_low_entropy_keep_their_weight_and_lose_their_advantage() -> None:
    found = known()
    make = lambda share: make_credit(GRPOAdvantage(), kl=KLSection(), loss=PPOLoss(top_entropy=share))  # noqa: E731
    whole, part = (make(share)(found, {}) for share in (1.0, 0.25))
    np.testing.assert_array_equal(part.weights, whole.weights)
    on = whole.weights != 0
    high = on & (found.entropy >= np.quantile(np.asarray(found.entropy)[on], 0.75))
    np.testing.assert_array_equal(part.advantages, np.where(high, whole.advantages, 0.0))
    assert 0.2 < high.sum() / on.sum() < 0.35
    silent = found._replace(entropy=found.entropy.at[:3].set(NAN))  # of a group that was not computed
    assert not make(0.25)(silent, {}).advantages[:3].any()


def test_a_pair_has_two_sides_that_are_trained() -> None:
    found, truncated = known(), jnp.arange(9) == 7  # 7 is the third group's best
    for section in (BestWorst(), SelfPlay()):
        credit = make_credit(section, kl=KLSection(), loss=PPOLoss(truncated="mask"))
        seen = credit(found._replace(truncated=truncated, rewards=jnp.nan_to_num(found.rewards)), {"baseline": 0.0})
        trained = seen.weights.any(axis=1)
        signs = [sorted(np.sign(seen.advantages[(g == GROUPS) & trained][:, 0])) for g in range(3)]
        assert signs == [[-1, 1]] * 2 + ([[-1, 1]] if isinstance(section, BestWorst) else [[]])


def test_what_adds_no_text_is_no_step() -> None:
    words = {0: "", 1: "4", 2: "\n", 3: "5\n"}
    ends = lambda *tokens: _step_ends(tokens, "\n", lambda ids: "".join(words[i] for i in ids))  # noqa: E731
    assert ends(1, 2, 1, 2, 0) == [1, 4]
    assert ends(1, 2, 2, 2, 2, 0) == [5], "blank lines and the end token belong to the line before"
    assert ends(2, 2, 3, 1) == [2, 3], "and those at the start to the first"
    assert ends(1, 1) == [1]
    assert ends(2, 0) == [1]
    assert ends(0) == [0]
