"""Reinforcement learning of an adapter, and of all weights: the base stands still; a sampling mesh of its own."""

import jax
import numpy as np
import pytest

from jaxpost.assemble import rl
from jaxpost.config import (
    AdamWSection,
    FullSection,
    LoRASection,
    MeshSection,
    ModelSection,
    RunSection,
    ScheduleSection,
)
from jaxpost.config_check_rl import check_rl
from jaxpost.config_rewards import FinishedSection, RewardSection
from jaxpost.config_rl import (
    ArithmeticPrompts,
    KLSection,
    OnlineSection,
    RLConfig,
    RolloutSection,
)
from jaxpost.train.online import run_online
from tests.train.toy_online import InProcess, records, scored_by


def test_an_adapter_learns_and_its_base_is_the_reference(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        rl, "make_judge", lambda *a, **k: InProcess(scored_by(lambda example, c: sum(t % 2 for t in c.tokens)))
    )

    def job(name, **adapter):
        config = RLConfig(
            model=ModelSection(path=str(tiny_model)),
            prompts=ArithmeticPrompts(),
            adapter=LoRASection(rank=4, **adapter),
            rollout=RolloutSection(prompts=2, samples=4, max_tokens=6, rows=8),
            reward=RewardSection(parts=(FinishedSection(),)),
            kl=KLSection(coef=0.1),
            optim=AdamWSection(lr=1e-2, schedule=ScheduleSection(kind="constant", warmup=0.0)),
            mesh=MeshSection(data=1, fsdp=8),
            train=OnlineSection(steps=2),
            run=RunSection(dir=str(tmp_path / name), name="toy"),
        )
        return rl.make_job(check_rl(config), command=("jaxpost",))

    first = job("run")
    assert "reference" not in first.frozen
    base = [np.asarray(x) for x in jax.tree.leaves(first.frozen["base"])]
    result = run_online(first)
    for before, after in zip(base, jax.tree.leaves(first.frozen["base"]), strict=True):
        np.testing.assert_array_equal(before, np.asarray(after))
    start, later = (r["kl"] for r in records(tmp_path / "run") if r["kind"] == "train")
    assert abs(start) < 1e-6, "an adapter starts at its base"
    assert later > 1e-4
    trained = jax.tree.leaves(result.state.params)
    assert sum(x.size for x in trained) < sum(x.size for x in base) / 2
    again = job("again", init_from=str(tmp_path / "run" / "export"))
    assert "reference" not in again.frozen, "the base is held once"
    for a, b in zip(trained, jax.tree.leaves(again.init_state().params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)
    run_online(again)
    start, later = (r["kl"] for r in records(tmp_path / "again") if r["kind"] == "train")
    assert abs(start) < 1e-6, "the reference is the policy that the run started from, its adapter too"
    assert later > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LoRASection(rank=2), FullSection()])
def test_samples_of_a_split_mesh_teach_the_same(tiny_model, tmp_path, monkeypatch, adapter):
    monkeypatch.setattr(
        rl, "make_judge", lambda *a, **k: InProcess(scored_by(lambda example, c: sum(t % 2 for t in c.tokens)))
    )

    def run(name, tensor):
        config = RLConfig(
            model=ModelSection(path=str(tiny_model)),
            prompts=ArithmeticPrompts(),
            adapter=adapter,
            rollout=RolloutSection(prompts=2, samples=4, max_tokens=6, rows=8, tensor=tensor),
            reward=RewardSection(parts=(FinishedSection(),)),
            optim=AdamWSection(lr=1e-3, schedule=ScheduleSection(kind="constant", warmup=0.0)),
            mesh=MeshSection(data=2, fsdp=4),
            train=OnlineSection(steps=2),
            run=RunSection(dir=str(tmp_path / name), name="toy"),
        )
        result = run_online(rl.make_job(check_rl(config), command=("jaxpost",)))
        return result.state.params, [r["reward"] for r in records(tmp_path / name) if r["kind"] == "train"]

    params, rewards = run("training", None)
    split, same = run("split", 2)
    assert rewards == same
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)
