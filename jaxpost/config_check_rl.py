"""What a reinforcement-learning configuration's values must satisfy together. Imports no jax."""

from __future__ import annotations

from collections.abc import Iterator

from jaxpost.config_check import above, adapter, at_least, check, fraction, mesh, optim, run
from jaxpost.config_check_preference import check_preference, data_kind, loss_problems
from jaxpost.config_check_reward import check_reward
from jaxpost.config_check_search import check_search
from jaxpost.config_env import EnvSection, PythonTool, SearchTool
from jaxpost.config_io import Config, ConfigError
from jaxpost.config_policy_losses import CISPOLoss, GMPOLoss, GSPOLoss, OnlinePreferenceLoss, PPOLoss, SAPOLoss
from jaxpost.config_preference import PreferenceConfig
from jaxpost.config_reward import RewardConfig
from jaxpost.config_rewards import JudgeSection, OverlongSection, RewardSection
from jaxpost.config_rl import (
    GROUP_RELATIVE,
    ArithmeticPrompts,
    BestWorst,
    EvalSection,
    FilePrompts,
    GAEAdvantage,
    GDPOAdvantage,
    GRPOAdvantage,
    GymPrompts,
    MaskedCorrection,
    NashAdvantage,
    ProcessAdvantage,
    PromptsSection,
    ReinforceAdvantage,
    ReinforcePlusPlusAdvantage,
    RLConfig,
    SelfPlay,
    TruncatedCorrection,
)
from jaxpost.config_rollout import GivenOpponent, MixtureOpponent, ReferenceOpponent
from jaxpost.config_search import SearchConfig


def check_config(config: Config) -> Config:
    """The configuration itself, of whichever method, if a run could follow it.

    Raises:
      ConfigError: see `config_check.check`, `check_rl`, `check_preference`, `check_reward` and `check_search`.
    """
    if isinstance(config, PreferenceConfig):
        return check_preference(config)
    if isinstance(config, RewardConfig):
        return check_reward(config)
    if isinstance(config, SearchConfig):
        return check_search(config)
    return check_rl(config) if isinstance(config, RLConfig) else check(config)


def check_rl(config: RLConfig) -> RLConfig:
    """The configuration itself, if a run could follow it.

    Raises:
      ConfigError: all that cannot be, a line each, with the key and what to do.
    """
    problems = [*_prompts("prompts", config.prompts), *_rollout(config), *_advantage(config), *_loss(config)]
    problems += [
        *_preference(config),
        *_kl(config),
        *_correction(config),
        *_critic(config),
        *_learner(config),
        *_evals(config),
    ]
    problems += [*_train(config), *_env(config), *adapter(config.adapter), *optim(config.optim)]
    problems += [*mesh(config.mesh), *run(config.run)]
    problems += [*_reward(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _reward(config: RLConfig) -> Iterator[str]:
    if not config.reward.parts:
        yield "reward.parts is empty; add one, such as --reward.parts '[{kind: math}]'"
    for i, part in enumerate(config.reward.parts):
        free = part.max_tokens - part.buffer if isinstance(part, OverlongSection) else 0
        if free >= config.answer_tokens:
            yield (
                f"reward.parts.{i}: its penalty begins above {free} tokens (max_tokens - buffer), "
                f"which an answer of at most {config.answer_tokens} never has; set max_tokens and buffer to fit"
            )


def _prompts(key: str, prompts: PromptsSection) -> Iterator[str]:
    if isinstance(prompts, FilePrompts):
        if not prompts.sources:
            yield f"{key}.sources names no file; say --{key}.sources.0.path problems.jsonl"
        yield from at_least(f"{key}.max_tokens", prompts.max_tokens, 1)
    if isinstance(prompts, ArithmeticPrompts):
        yield from fraction(f"{key}.held_out", prompts.held_out)
    if "{prompt}" not in prompts.template:
        yield f"{key}.template is {prompts.template!r}; it must hold {{prompt}}, where the problem stands"
    if prompts.system_prompt is not None and not prompts.chat:
        yield f"{key}.system_prompt needs the chat format; set {key}.chat true or leave it out"
    yield from at_least(f"{key}.seed", prompts.seed, 0)


def _rollout(config: RLConfig) -> Iterator[str]:
    rollout = config.rollout
    for name in ("prompts", "samples", "max_tokens", "rows", "cache_tokens", "prefill_tokens", "tensor"):
        yield from at_least(f"rollout.{name}", getattr(rollout, name), 1)
    yield from at_least("rollout.min_tokens", rollout.min_tokens, 0)
    yield from at_least("rollout.max_refills", rollout.max_refills, 0)
    yield from above("rollout.temperature", rollout.temperature, 0)
    if rollout.min_tokens > rollout.max_tokens:
        yield f"rollout.min_tokens {rollout.min_tokens} exceeds rollout.max_tokens {rollout.max_tokens}"
    yield from _opponent(config)
    compares = isinstance(config.advantage, (*GROUP_RELATIVE, ProcessAdvantage))
    if compares and rollout.samples < 2:
        yield f"rollout.samples is {rollout.samples}; {config.advantage.kind} compares a group's samples: at least 2"
    if rollout.samples < 2 and _judges_pairs(config.reward):
        yield f"rollout.samples is {rollout.samples}; a judge of mode pair compares a problem's samples: at least 2"
    if rollout.max_refills and not isinstance(config.advantage, GROUP_RELATIVE):
        yield (
            f"rollout.max_refills asks for informative groups, which advantage {config.advantage.kind} does not need; "
            "set it to 0, or take advantage.kind grpo or rloo"
        )
    if rollout.max_refills and rollout.uninformative == "count":
        yield "rollout.max_refills replaces uninformative groups, so rollout.uninformative must be drop"
    if rollout.refill_by is not None and not rollout.max_refills:
        yield "rollout.refill_by belongs to dynamic sampling; set rollout.max_refills above 0, or leave it out"
    by_ratio = config.loss.kind != "reinforce"
    if rollout.overlap and config.correction is None and not (by_ratio and config.learner.old_logprobs == "sampler"):
        yield (
            "rollout.overlap draws samples one step early: give a correction (--correction '{kind: truncated}')"
            + (", or start ratios from the sampler (--learner.old_logprobs sampler)" if by_ratio else "")
        )


def _opponent(config: RLConfig) -> Iterator[str]:
    section, rollout = config.rollout.opponent, config.rollout
    if isinstance(config.advantage, NashAdvantage):
        yield from above("advantage.scale", config.advantage.scale, 0)
        if section is None:
            yield "advantage.kind nash compares with an opponent's samples; give --rollout.opponent '{kind: mixture}'"
    if isinstance(config.advantage, SelfPlay):
        if not isinstance(section, GivenOpponent):
            yield "advantage.kind self_play compares with given answers; give --rollout.opponent '{kind: given}'"
        if rollout.overlap:
            yield "advantage.kind self_play compares with the policy that drew the samples; set rollout.overlap to 0"
    if section is None:
        return
    if not isinstance(config.advantage, (NashAdvantage, BestWorst, SelfPlay)):
        yield (
            f"rollout.opponent draws samples that advantage.kind {config.advantage.kind} would take for the policy's "
            "own; take nash, or best_worst or self_play with loss.kind preference"
        )
    if isinstance(section, GivenOpponent) and section.samples != 1:
        yield f"rollout.opponent.samples is {section.samples}, but a problem has one given answer"
    if not 1 <= section.samples < rollout.samples:
        yield (
            f"rollout.opponent.samples is {section.samples}; of rollout.samples {rollout.samples} at least one must be "
            "the opponent's and one the policy's"
        )
    if isinstance(section, MixtureOpponent):
        yield from fraction("rollout.opponent.weight", section.weight)
        if rollout.tensor is not None:
            yield "rollout.opponent.kind mixture samples on the mesh of training; leave rollout.tensor out"
    if config.env is not None:
        yield "rollout.opponent answers in one turn, so it does not go with env; leave one of them out"


def _advantage(config: RLConfig) -> Iterator[str]:
    section = config.advantage
    if isinstance(section, (GRPOAdvantage, ProcessAdvantage, GDPOAdvantage)):
        yield from at_least("advantage.eps", section.eps, 0)
    if isinstance(section, GDPOAdvantage):
        yield from _gdpo(section, config)
    if isinstance(section, ProcessAdvantage) and not section.separator:
        yield "advantage.separator is empty; give the text that ends a step"
    if isinstance(section, ReinforceAdvantage) and not 0 <= section.decay <= 1:
        yield f"advantage.decay is {section.decay:g}; it must be from 0 to 1"
    if isinstance(section, GAEAdvantage):
        for name in ("discount", "trace"):
            if not 0 <= getattr(section, name) <= 1:
                yield f"advantage.{name} is {getattr(section, name):g}; it must be from 0 to 1"
    grouped = isinstance(section, ReinforcePlusPlusAdvantage) and section.group_baseline
    if grouped and config.rollout.samples < 2:
        yield f"advantage.group_baseline needs groups: rollout.samples {config.rollout.samples} is too few"
    if grouped and config.kl.coef > 0 and config.kl.where != "loss":
        yield "advantage.group_baseline has the KL in the loss; set kl.where to loss"
    if isinstance(section, ProcessAdvantage) and config.kl.coef > 0 and config.kl.where == "sample":
        yield "advantage.kind grpo_process has rewards by step; set kl.where to reward or loss"


def _gdpo(section: GDPOAdvantage, config: RLConfig) -> Iterator[str]:
    columns, weights = section.columns, section.weights
    if len(set(columns)) < 2 or len(set(columns)) < len(columns):
        yield (
            f"advantage.columns is {list(columns)}; name two or more different columns of the reward, such as the "
            "names of its parts"
        )
    if weights and len(weights) != len(columns):
        yield f"advantage.weights has {len(weights)} numbers for {len(columns)} columns; give one each, or none"
    if config.kl.coef > 0 and config.kl.where == "sample":
        yield "advantage.kind gdpo compares each reward by itself; set kl.where to reward or loss"


def _loss(config: RLConfig) -> Iterator[str]:
    loss = config.loss
    yield from at_least("loss.entropy_coef", loss.entropy_coef, 0)
    yield from at_least("loss.divisor", loss.divisor, 1)
    yield from at_least("loss.chunk_tokens", loss.chunk_tokens, 1)
    if not 0 < loss.top_entropy <= 1:
        yield f"loss.top_entropy is {loss.top_entropy:g}; give the share of tokens that is trained, above 0, at most 1"
    if loss.top_entropy < 1 and isinstance(loss, (GMPOLoss, OnlinePreferenceLoss)):
        yield f"loss.top_entropy picks tokens, but loss.kind {loss.kind} judges whole samples; leave it out"
    if loss.divisor is not None and loss.aggregate != "constant_mean":
        yield f"loss.divisor belongs to aggregate: constant_mean, not {loss.aggregate}"
    if isinstance(loss, (PPOLoss, GSPOLoss, GMPOLoss)):
        yield from above("loss.clip_low", loss.clip_low, 0)
        yield from above("loss.clip_high", loss.clip_high, 0)
    if isinstance(loss, (PPOLoss, GSPOLoss)) and loss.dual_clip is not None and loss.dual_clip <= 1 + loss.clip_high:
        yield f"loss.dual_clip is {loss.dual_clip:g}; it must exceed 1 + clip_high, {1 + loss.clip_high:g}"
    if isinstance(loss, SAPOLoss):
        yield from above("loss.tau_positive", loss.tau_positive, 0)
        yield from above("loss.tau_negative", loss.tau_negative, 0)
    if isinstance(loss, CISPOLoss):
        yield from at_least("loss.clip_low", loss.clip_low, 0)
        yield from above("loss.clip_high", loss.clip_high, 0)


def _preference(config: RLConfig) -> Iterator[str]:
    paired, loss = isinstance(config.advantage, (BestWorst, SelfPlay)), config.loss
    if paired != isinstance(loss, OnlinePreferenceLoss):
        yield (
            "advantage.kind best_worst or self_play and loss.kind preference belong together: pairs, and a loss that "
            "reads pairs"
        )
    if not isinstance(loss, OnlinePreferenceLoss):
        return
    by_reference = isinstance(config.rollout.opponent, ReferenceOpponent)
    yield from loss_problems("loss.losses", loss.losses, opponent=by_reference)
    if data_kind(loss.losses) != "pairs":
        yield "loss.losses judge single answers, but the best and the worst of a group are pairs; take a loss of pairs"
    for key, value, wanted in (
        ("rollout.temperature", config.rollout.temperature, 1.0),
        ("rollout.uninformative", config.rollout.uninformative, "drop"),
        ("kl.coef", config.kl.coef, 0.0),
        ("correction", config.correction, None),
        ("learner.row_tokens", config.learner.row_tokens, None),
        ("learner.share_prompts", config.learner.share_prompts is not False, True),
        ("loss.entropy_coef", loss.entropy_coef, 0.0),
    ):
        if value != wanted:
            yield f"{key} does not go with loss.kind preference, which needs {'null' if wanted is None else wanted}"


def _kl(config: RLConfig) -> Iterator[str]:
    yield from at_least("kl.coef", config.kl.coef, 0)
    yield from above("kl.target", config.kl.target, 0)
    yield from at_least("kl.horizon", config.kl.horizon, 1)
    in_loss = config.kl.coef > 0 and config.kl.where == "loss"
    if in_loss and config.kl.estimator == "k1" and config.kl.gradient == "plain":
        yield "kl.estimator k1 has no penalty in its plain gradient (mean 0); set kl.gradient corrected, or take k2, k3"
    if config.kl.coef > 0 and config.kl.where != "loss":
        if config.kl.estimator in ("k2", "k3"):
            yield (
                f"kl.estimator {config.kl.estimator} has another gradient than the KL's where kl.where is "
                f"{config.kl.where}; take k1 there, or set kl.where loss"
            )
        if config.kl.gradient != "plain":
            yield f"kl.gradient {config.kl.gradient} belongs to kl.where loss, not {config.kl.where}; leave it out"
    if config.kl.target is not None and not config.kl.coef:
        yield "kl.target adapts kl.coef, which is 0; start it above 0"
    drawn = config.rollout.prompts * config.rollout.samples
    if config.kl.target is not None and 0 < 5 * config.kl.horizon <= drawn:
        yield (
            f"kl.horizon {config.kl.horizon} is so far below a step's {drawn} samples that kl.coef, which moves by up "
            f"to 0.2 x samples / horizon, would fall below 0; raise it above {drawn // 5}"
        )


def _correction(config: RLConfig) -> Iterator[str]:
    section = config.correction
    if section is not None and config.learner.old_logprobs == "sampler":
        yield (
            "correction weighs the learner's log-probabilities against the sampler's, but with learner.old_logprobs "
            "sampler they are the same; set it to learner or leave the correction out"
        )
    if isinstance(section, TruncatedCorrection):
        yield from above("correction.cap", section.cap, 0)
    if isinstance(section, MaskedCorrection) and not 0 <= section.low < section.high:
        yield f"correction.low {section.low:g} and correction.high {section.high:g}: give 0 <= low < high"


def _critic(config: RLConfig) -> Iterator[str]:
    yield from at_least("critic.coef", config.critic.coef, 0)
    yield from above("critic.clip", config.critic.clip, 0)
    yield from above("critic.lr", config.critic.lr, 0)


def _learner(config: RLConfig) -> Iterator[str]:
    learner = config.learner
    for name in ("epochs", "minibatches", "microbatch_rows", "row_tokens"):
        yield from at_least(f"learner.{name}", getattr(learner, name), 1)
    if learner.minibatches > config.rollout.prompts:
        yield f"learner.minibatches {learner.minibatches} exceeds rollout.prompts {config.rollout.prompts}"


def _judges_pairs(reward: RewardSection) -> bool:
    return any(isinstance(part, JudgeSection) and part.mode == "pair" for part in (*reward.parts, *reward.gates))


def _evals(config: RLConfig) -> Iterator[str]:
    names = [section.name for section in config.evals]
    for i, section in enumerate(config.evals):
        key = f"evals.{i}"
        yield from _prompts(f"{key}.prompts", section.prompts)
        if not section.name or "/" in section.name or names.count(section.name) > 1:
            yield f"{key}.name is {section.name!r}; each evaluation needs a name of its own, without slashes"
        for name in ("items", "samples", "max_tokens"):
            yield from at_least(f"{key}.{name}", getattr(section, name), 1)
        yield from at_least(f"{key}.temperature", section.temperature, 0)
        if any(k < 1 or k > section.samples for k in section.pass_at):
            yield f"{key}.pass_at {section.pass_at} must lie within 1 .. samples = {section.samples}"
        if section.samples < 2 and _judges_pairs(section.reward or config.reward):
            yield (
                f"{key} draws one sample of a problem, and a judge of mode pair compares several; raise {key}.samples "
                f"and {key}.temperature, or give {key}.reward"
            )
        yield from _unseen(key, section, config)
        if section.samples > 1 and section.temperature == 0:
            yield f"{key} draws {section.samples} samples at temperature 0, all alike; raise one or lower the other"


def _unseen(key: str, section: EvalSection, config: RLConfig) -> Iterator[str]:
    """Problem i of a gym's seed s is that of s + i: seeds that lie close share problems."""
    trained, held_out = config.prompts, section.prompts
    if isinstance(trained, GymPrompts) and isinstance(held_out, GymPrompts) and trained.task == held_out.task:
        drawn = (config.train.steps + 1) * config.rollout.prompts * (1 + config.rollout.max_refills)
        if -section.items < held_out.seed - trained.seed < drawn:
            yield (
                f"{key}.prompts.seed {held_out.seed} gives problems that training may draw; take one from "
                f"{trained.seed + drawn} on"
            )


def _train(config: RLConfig) -> Iterator[str]:
    for name in ("steps", "samples", "keep_checkpoints", "log_every", "sample_every"):
        yield from at_least(f"train.{name}", getattr(config.train, name), 1)
    for name in ("save_every", "eval_every"):
        yield from at_least(f"train.{name}", getattr(config.train, name), 0)
    yield from at_least("train.guard.max_skips", config.train.guard.max_skips, 1)
    yield from above("train.guard.spike_factor", config.train.guard.spike_factor, 1)
    if config.train.eval_every and not config.evals:
        yield "train.eval_every asks for evaluations, but evals is empty"


def _env(config: RLConfig) -> Iterator[str]:
    env = config.env
    if env is None:
        return
    yield from _tools(env)
    for name in ("max_turns", "max_tokens", "max_result", "workers"):
        yield from at_least(f"env.{name}", getattr(env, name), 1)
    if not env.role:
        yield "env.role is empty; give user, or tool where the chat template has such turns"
    if env.system and "{tools}" not in env.system:
        yield "env.system must hold {tools}, where the tools stand; leave it out, or give an empty text for none"
    sections = {"prompts": config.prompts, **{f"evals.{i}.prompts": e.prompts for i, e in enumerate(config.evals)}}
    yield from (f"env needs the chat format; set {key}.chat true" for key, one in sections.items() if not one.chat)
    turns = {"rollout.max_tokens": config.rollout.max_tokens}
    turns |= {f"evals.{i}.max_tokens": e.max_tokens for i, e in enumerate(config.evals) if e.max_tokens is not None}
    for key, turn in turns.items():
        if turn > env.max_tokens:
            yield f"{key} {turn}, the limit of one turn, exceeds env.max_tokens {env.max_tokens}, the whole answer's"
    if isinstance(config.advantage, ProcessAdvantage):
        yield "advantage.kind grpo_process scores the steps of a single turn; with env take another, such as grpo"


def _tools(env: EnvSection) -> Iterator[str]:
    if not env.tools:
        yield "env.tools is empty; add one, such as --env.tools '[{kind: calculator}]', or leave env out"
    names = [tool.name for tool in env.tools]
    for i, tool in enumerate(env.tools):
        key = f"env.tools.{i}"
        if not tool.name.isidentifier() or names.count(tool.name) > 1:
            yield f"{key}.name is {tool.name!r}; each tool needs a name of its own, of letters, digits and underscores"
        if isinstance(tool, PythonTool):
            yield from above(f"{key}.seconds", tool.seconds, 0)
            yield from at_least(f"{key}.memory_mb", tool.memory_mb, 64)
            yield from at_least(f"{key}.output_kb", tool.output_kb, 1)
        if isinstance(tool, SearchTool):
            for name in ("count", "max_chars"):
                yield from at_least(f"{key}.{name}", getattr(tool, name), 1)
