"""A reinforcement-learning configuration -> a job for the online loop, and the run itself."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpost import config_io, sharding
from jaxpost.adapters import peft
from jaxpost.assemble import policy
from jaxpost.assemble.check_rl import check_problems
from jaxpost.assemble.credit import make_credit, step_rewards
from jaxpost.assemble.envs import Environments, judged, make_environments, system_of
from jaxpost.assemble.judge import Judge, make_judge
from jaxpost.assemble.model import Pretrained, load_model, on_mesh
from jaxpost.assemble.opponents import answers, make_opponent, rollout_sampler
from jaxpost.assemble.prompts import Problems, make_problems
from jaxpost.assemble.supervised import exporter, model_identity
from jaxpost.assemble.training import Training, make_training
from jaxpost.config import LoRASection
from jaxpost.config_rewards import FunctionSection
from jaxpost.config_rl import (
    GROUP_RELATIVE,
    EvalSection,
    GDPOAdvantage,
    NashAdvantage,
    ProcessAdvantage,
    ReinforceAdvantage,
    ReinforcePlusPlusAdvantage,
    ReMaxAdvantage,
    RLConfig,
)
from jaxpost.generate.sampler import Sampler
from jaxpost.rl.episodes import Episode, Problem
from jaxpost.rl.returns import adapted_kl_coef
from jaxpost.rl.rows import RowPlan
from jaxpost.train.job import RunResult
from jaxpost.train.online import run_online
from jaxpost.train.online_job import Draw, Evaluation, OnlineJob, Wish
from jaxpost.types import Params

ROWS = 64
"""Most answers of an evaluation that decode together, beyond what a rollout has."""


def train(config: RLConfig, *, command: Sequence[str] = tuple(sys.argv)) -> RunResult:
    """Runs reinforcement learning as configured, or goes on with it where it stopped.

    Raises:
      ValueError, FileNotFoundError: a model, problem, reward, mesh or run folder that does not fit.
    """
    sharding.initialize_distributed()
    return run_online(make_job(config, command=command))


def make_job(config: RLConfig, *, command: Sequence[str] = tuple(sys.argv)) -> OnlineJob:
    """Everything that the loop needs, with names looked up and frozen weights in place."""
    mesh = sharding.make_mesh(config.mesh)
    pretrained = load_model(config.model, mesh)
    tokenizer = pretrained.tokenizer
    tools = system_of(config.env)
    problems = make_problems(config.prompts, tokenizer, tools=tools)
    evals = {
        s.name: make_problems(s.prompts, tokenizer, key=f"evals.{i}.prompts", tools=tools)
        for i, s in enumerate(config.evals)
    }
    check_problems(config, pretrained.config.max_positions, problems, evals)
    environments = make_environments(config.env, config.rollout, tokenizer, context=pretrained.config.max_positions)
    plan, whole = _plans(config, pretrained, problems.longest)
    training = _training(config, pretrained, plan)
    generate, sampler = _generator(config, pretrained, training, environments)
    oppose = make_opponent(config, pretrained, training, sampler, problems)
    judges = _judges(config, mesh)
    return OnlineJob(
        **_of_any_run(config, pretrained, training),
        **_of_method(config, pretrained, training, judges[0]),
        identity={
            "model": model_identity(pretrained),
            "tokenizer": tokenizer.fingerprint,
            "problems": problems.fingerprint,
            **{f"eval {name}": found.fingerprint for name, found in evals.items()},
            **(environments.identity if environments is not None else {}),
            **_judged_by(config, judges),
        },
        command=tuple(command),
        problem=problems.at,
        generate=generate,
        oppose=oppose,
        plan=plan,
        whole=whole,
        evals=tuple(
            _evaluation(config, section, evals[section.name], judge)
            for section, judge in zip(config.evals, judges[1:], strict=True)
        ),
        forget=sampler.forget_weights,
        close=partial(_close, judges),
    )


def _training(config: RLConfig, pretrained: Pretrained, plan: RowPlan) -> Training:
    return make_training(
        pretrained,
        loss=policy.make_policy_loss(config, pretrained.model, pretrained.mesh),
        adapter=config.adapter,
        optim=config.optim,
        num_steps=config.train.steps * config.learner.epochs * config.learner.minibatches,
        microbatches=plan.pieces,
        skip_empty=True,
        networks=policy.critic_networks(config, pretrained),
        network_lr=config.critic.lr,
        frozen=_reference(config, pretrained),
        hyper=policy.loss_hyper(config),
        guard=config.train.guard,
        seed=config.run.seed,
    )


def _of_any_run(config: RLConfig, pretrained: Pretrained, training: Training) -> dict[str, Any]:
    """What a job of either loop has."""
    return {
        "folder": Path(config.run.dir.format(name=config.run.name)),
        "config_text": config_io.dump(config),
        "run": config.run,
        "num_steps": config.train.steps,
        "step": training.step,
        "init_state": training.init_state,
        "abstract_state": training.abstract_state,
        "frozen": training.frozen,
        "hyper": training.hyper,
        "mesh": pretrained.mesh,
        "place": _placer(pretrained.mesh),
        "eval_params": training.eval_params,
        "lr_at": training.lr_at,
        "export": exporter(config.adapter, pretrained, training) if config.run.export else None,
    }


def _of_method(config: RLConfig, pretrained: Pretrained, training: Training, judge: Judge) -> dict[str, Any]:
    """What makes the method: sections of the preset that the loop reads, and the functions that others name."""
    keeps_old, tokenizer, score = _keeps_old(config), pretrained.tokenizer, judged(judge)
    asks_learner = keeps_old and config.learner.old_logprobs == "learner"
    steps = config.advantage.separator if isinstance(config.advantage, ProcessAdvantage) else None
    return {
        "train": config.train,
        "rollout": config.rollout,
        "learner": config.learner,
        "score": score,
        "process": None if steps is None else step_rewards(steps, tokenizer.decode, score, by_step=judge.by_step),
        "credit": make_credit(config.advantage, kl=config.kl, loss=config.loss),
        "answer_tokens": config.answer_tokens,
        "rescore": policy.make_rescore(config, pretrained.model, pretrained.mesh, training.policy, asks_learner),
        "keeps_old": keeps_old,
        "compared": config.advantage.columns if isinstance(config.advantage, GDPOAdvantage) else (),
        "group_relative": isinstance(config.advantage, GROUP_RELATIVE),
        "equal_alarm": _compares_in_groups(config),
        "kl_compared": config.kl.coef > 0 and config.kl.where == "sample",
        "greedy": isinstance(config.advantage, ReMaxAdvantage),
        "always_trained": bool(config.kl.coef or config.loss.entropy_coef),
        "running_baseline": _running_baseline(config),
        "adapt_kl": _adapter_of_kl(config),
        "unscore_truncated": config.loss.truncated == "unscore",
        "measure": policy.measure_of(config.loss),
        "replicated": sharding.replicated(pretrained.mesh),
        "pad_id": tokenizer.pad_id,
    }


def _plans(config: RLConfig, pretrained: Pretrained, longest: int) -> tuple[RowPlan, RowPlan]:
    """Rows of one update, and of all samples of a step."""
    learner, rollout, mesh = config.learner, config.rollout, pretrained.mesh
    uses_splash = config.model.attention == "splash" or (
        config.model.attention == "auto" and jax.default_backend() == "tpu"
    )
    share = not uses_splash if learner.share_prompts is None else learner.share_prompts
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    make = partial(
        RowPlan.make,
        samples=rollout.samples,
        prompt=longest,
        answer=config.answer_tokens,
        row_tokens=learner.row_tokens,
        piece_rows=learner.microbatch_rows * shards,
        share=share,
    )
    return make(groups=-(-rollout.prompts // learner.minibatches)), make(groups=rollout.prompts)


def _keeps_old(config: RLConfig) -> bool:
    """Whether ratios can differ from 1: several updates from one step's samples, or samples of an older policy."""
    several = config.learner.epochs * config.learner.minibatches > 1
    in_reward = config.kl.coef > 0 and config.kl.where != "loss"
    return several or bool(config.rollout.overlap) or in_reward


def _reference(config: RLConfig, pretrained: Pretrained) -> dict[str, Params]:
    """What the first policy differs by from what stands still anyway, where a KL term or an opponent reads it."""
    adapter = config.adapter
    if not policy.keeps_reference(config):
        return {}
    if not isinstance(adapter, LoRASection):
        return {"reference": pretrained.load()}
    if adapter.init_from is None:
        return {}  # a new adapter starts at its base
    start, _ = peft.load(adapter.init_from, pretrained.config)
    return {"start": jax.device_put(start, sharding.replicated(pretrained.mesh))}


def _compares_in_groups(config: RLConfig) -> bool:
    section = config.advantage
    centred = isinstance(section, ReinforcePlusPlusAdvantage) and section.group_baseline
    return centred or isinstance(section, (*GROUP_RELATIVE, NashAdvantage))


def _running_baseline(config: RLConfig) -> float | None:
    section = config.advantage
    running = isinstance(section, ReinforceAdvantage) and section.baseline == "running_mean"
    return section.decay if isinstance(section, ReinforceAdvantage) and running else None


def _adapter_of_kl(config: RLConfig) -> Any:
    section = config.kl
    if section.target is None or section.coef <= 0:
        return None
    target, horizon = section.target, section.horizon
    return lambda coef, measured, samples: adapted_kl_coef(
        coef, measured, target=target, horizon=horizon, samples=samples
    )


def _placer(mesh: Any) -> Any:
    def place(batch: Any) -> Any:
        rows = sharding.local_rows(mesh, batch.tokens.shape[0])
        return sharding.to_global(jax.tree.map(lambda x: np.ascontiguousarray(x[rows]), batch), mesh=mesh)

    return place


def _generator(
    config: RLConfig, pretrained: Pretrained, training: Training, environments: Environments | None
) -> tuple[Any, Sampler]:
    """Answers by the engine, and the sampler behind them."""
    rollout = config.rollout
    if rollout.tensor is not None:
        pretrained = on_mesh(pretrained, sharding.remesh(pretrained.mesh, {"tensor": rollout.tensor, "data": -1}))
    sampler = rollout_sampler(pretrained, rollout)

    def generate(params: Params, frozen: Params, problems: Sequence[Problem], wish: Wish, draw: Draw) -> list[Episode]:
        return answers(sampler, training.policy(params, frozen), rollout, problems, wish, draw)

    if environments is None:
        return generate, sampler
    play_all = environments.play

    def play(params: Params, frozen: Params, problems: Sequence[Problem], wish: Wish, draw: Draw) -> list[Episode]:
        return play_all(
            partial(sampler, training.policy(params, frozen), policy_version=draw.version), problems, wish, draw
        )

    return play, sampler


def _judges(config: RLConfig, mesh: Any) -> list[Judge]:
    """The run's reward, and each evaluation's; a reward model is loaded once."""
    make = partial(make_judge, mesh=mesh, loaded={})
    return [make(config.reward), *(make(s.reward or config.reward, key=f"evals {s.name} reward") for s in config.evals)]


def _judged_by(config: RLConfig, judges: list[Judge]) -> dict[str, str]:
    """Fingerprints of the reward models and of the files with reward functions, the run's and the evaluations'."""
    found = dict(judges[0].identity)
    for section, judge in zip(config.evals, judges[1:], strict=True):
        if section.reward is not None:
            found |= {f"eval {section.name}, {name}": digest for name, digest in judge.identity.items()}
    for reward in (config.reward, *(section.reward for section in config.evals if section.reward is not None)):
        for part in (*reward.parts, *reward.gates):
            if isinstance(part, FunctionSection):
                file = Path(part.path.rpartition(":")[0]).expanduser()
                found[f"reward function {part.path}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
    return found


def _close(judges: list[Judge]) -> None:
    for judge in judges:
        judge.close()


def _evaluation(config: RLConfig, section: EvalSection, problems: Problems, judge: Judge) -> Evaluation:
    items = section.items if problems.count is None else min(section.items, problems.count)
    return Evaluation(
        section=section,
        problems=tuple(problems.at(i) for i in range(items)),
        score=judged(judge),
        wish=Wish(section.samples, section.temperature, section.max_tokens or config.rollout.max_tokens),
    )
