"""Reinforcement-learning presets: what is read, what a mistake is told, and that no key is there for nothing."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxpost import config_env, config_policy_losses, config_rewards, config_rl
from jaxpost.config_check_rl import check_config
from jaxpost.config_flags import apply_flags
from jaxpost.config_io import ConfigError, dump, loads
from jaxpost.config_rewards import JudgeSection, RewardSection

ROOT = Path(__file__).parent.parent
LEAST = "method: rl\nreward: {parts: [{kind: math}]}\n"


def read(text: str = "") -> Any:
    return loads(LEAST + text, source="p.yaml")


WHOLE = """\
prompts: {kind: files, sources: [{path: a.jsonl}], template: "Q: {prompt}"}
rollout: {prompts: 4, samples: 2, overlap: 1, uninformative: count, stop: [x], tensor: 2}
advantage: {kind: grpo_process, separator: ";", scale: none}
loss: {kind: cispo, sides: both, aggregate: constant_mean, divisor: 5, truncated: mask}
kl: {coef: 0.1, where: reward, estimator: k1, target: 0.2}
correction: {kind: masked, level: sequence_mean, low: 0.1}
critic: {network: separate, clip: null}
learner: {epochs: 2, minibatches: 4, share_prompts: false}
evals: [{name: a, samples: 4, temperature: 1.0, pass_at: [1, 4], reward: {parts: [{kind: choice}]}}, {name: b}]
train: {steps: 7, watch: {kl: 1e9}}
"""


def test_every_section_survives_the_round_trip() -> None:
    config = read(WHOLE)
    assert loads(dump(config), source="dump") == config
    assert config.rollout.overlap == 1
    assert isinstance(config.rollout.overlap, int)
    for kinds, name in (
        (config_rl.AdvantageSection, "advantage"), (config_policy_losses.PolicyLossSection, "loss"),
        (config_rl.CorrectionSection, "correction"), (config_rl.PromptsSection, "prompts"),
    ):  # fmt: skip
        for kind in kinds.__args__:
            one = replace(read(), **{name: kind()})
            assert loads(dump(one), source="dump") == one


def test_flags_reach_unions_and_numbers_that_are_choices() -> None:
    args = (
        "--rollout.overlap",
        "1",
        "--correction",
        "{kind: truncated}",
        "--advantage.kind",
        "rloo",
        "--kl.coef",
        "0.5",
    )
    config = apply_flags(read(), args)
    assert config.rollout.overlap == 1
    assert config.correction == config_rl.TruncatedCorrection()
    assert config.advantage == config_rl.RLOOAdvantage()
    assert config.kl.coef == 0.5
    with pytest.raises(ConfigError, match="'2' is none of 0, 1"):
        read("rollout: {overlap: 2}")


WRONG = {
    "advantage: {kind: best_worst}": "advantage.kind best_worst or self_play and loss.kind preference belong together",
    "advantage: {kind: best_worst}\nloss: {kind: preference, losses: [{kind: kto}]}": "judge single answers, but",
    "advantage: {kind: best_worst}\nloss: {kind: preference}\nkl: {coef: 0.1}": "kl.coef does not go with loss.kind",
    "advantage: {kind: nash}": "advantage.kind nash compares with an opponent's samples; give --rollout.opponent",
    "rollout: {opponent: {kind: mixture}}": "rollout.opponent draws samples that advantage.kind grpo would take",
    "advantage: {kind: nash}\nrollout: {samples: 2, opponent: {kind: reference, samples: 2}}": "opponent.samples is 2",
    "advantage: {kind: nash}\nrollout: {opponent: {kind: mixture, weight: 1.5}}": "rollout.opponent.weight is 1.5",
    "advantage: {kind: nash}\nrollout: {tensor: 2, opponent: {kind: mixture}}": "leave rollout.tensor out",
    "advantage: {kind: nash, scale: 0}\nrollout: {opponent: {kind: mixture}}": "advantage.scale",
    "advantage: {kind: nash}\nenv: {}\nrollout: {opponent: {kind: mixture}}": "does not go with env",
    "advantage: {kind: best_worst}\nloss: {kind: preference, losses: [{kind: dpo}, {kind: xpo}]}": "take method rl",
    "prompts: {kind: files}": "prompts.sources names no file; say --prompts.sources.0.path problems.jsonl",
    "prompts: {template: x}": "prompts.template is 'x'; it must hold {prompt}",
    "prompts: {chat: false, system_prompt: x}": "prompts.system_prompt needs the chat format",
    "prompts: {held_out: 1.0}": "prompts.held_out",
    "prompts: {seed: -1}": "prompts.seed",
    "rollout: {samples: 0}": "rollout.samples",
    "rollout: {min_tokens: 300}": "rollout.min_tokens 300 exceeds rollout.max_tokens 256",
    "rollout: {temperature: 0.0}": "rollout.temperature",
    "rollout: {samples: 1}": "grpo compares a group's samples: at least 2",
    "rollout: {max_refills: 1}\nadvantage: {kind: remax}": "rollout.max_refills asks for informative groups",
    "rollout: {max_refills: 1, uninformative: count}": "rollout.uninformative must be drop",
    "rollout: {overlap: 1}": "rollout.overlap draws samples one step early: give a correction",
    "rollout: {overlap: 1}\nloss: {kind: reinforce}\nlearner: {old_logprobs: sampler}": "give a correction",
    "advantage: {eps: -1.0}": "advantage.eps",
    'advantage: {kind: grpo_process, separator: ""}': "advantage.separator is empty",
    "advantage: {kind: reinforce, decay: 1.5}": "advantage.decay is 1.5; it must be from 0 to 1",
    "advantage: {kind: gae, trace: 1.5}": "advantage.trace is 1.5; it must be from 0 to 1",
    "advantage: {kind: reinforce_plus_plus, group_baseline: true}\nkl: {coef: 0.1, where: reward}": "set kl.where",
    "advantage: {kind: reinforce_plus_plus, group_baseline: true}\nrollout: {samples: 1}": "needs groups",
    "loss: {entropy_coef: -1.0}": "loss.entropy_coef",
    "loss: {divisor: 5}": "loss.divisor belongs to aggregate: constant_mean, not token_mean",
    "loss: {clip_low: 0.0}": "loss.clip_low",
    "loss: {dual_clip: 1.1}": "loss.dual_clip is 1.1; it must exceed 1 + clip_high, 1.2",
    "loss: {kind: cispo, clip_low: -0.5}": "loss.clip_low",
    "loss: {kind: cispo, clip_high: 0.0}": "loss.clip_high",
    "kl: {coef: -0.1}": "kl.coef",
    "kl: {coef: 0.1, estimator: k1}": "kl.estimator k1 has no penalty in its plain gradient",
    "kl: {coef: 0.1, where: reward, estimator: k3}": "kl.estimator k3 has another gradient than the KL's",
    "kl: {coef: 0.1, where: sample, gradient: corrected}": "kl.gradient corrected belongs to kl.where loss",
    "kl: {target: 0.1}": "kl.target adapts kl.coef, which is 0",
    "kl: {coef: 0.1, target: 0.1, horizon: 12}": "kl.horizon 12 is so far below a step's 64 samples",
    "correction: {kind: truncated, cap: 0.0}": "correction.cap",
    "correction: {kind: masked, low: 2.0, high: 1.0}": "give 0 <= low < high",
    "correction: {kind: masked}\nlearner: {old_logprobs: sampler}": "sampler they are the same",
    "critic: {clip: 0.0}": "critic.clip",
    "learner: {epochs: 0}": "learner.epochs",
    "learner: {minibatches: 9}": "learner.minibatches 9 exceeds rollout.prompts 8",
    "evals: [{name: a/b}]": "evals.0.name is 'a/b'; each evaluation needs a name of its own",
    "evals: [{name: a}, {name: a}]": "evals.1.name is 'a'",
    "evals: [{items: 0}]": "evals.0.items",
    "evals: [{pass_at: [2]}]": "evals.0.pass_at (2,) must lie within 1 .. samples = 1",
    "evals: [{samples: 4}]": "evals.0 draws 4 samples at temperature 0, all alike",
    "loss: {kind: gmpo, clip_high: 0.0}": "loss.clip_high",
    "loss: {kind: sapo, tau_negative: 0.0}": "loss.tau_negative",
    "advantage: {kind: gdpo}": "advantage.columns is []; name two or more different columns",
    "advantage: {kind: gdpo, columns: [math, math]}": "advantage.columns is ['math', 'math']; name two or more",
    "advantage: {kind: gdpo, columns: [math, format], weights: [1.0]}": "advantage.weights has 1 numbers for 2 columns",
    "advantage: {kind: gdpo, columns: [a, b]}\nkl: {coef: 0.1, where: sample}": "set kl.where to reward or loss",
    "loss: {top_entropy: 0.0}": "loss.top_entropy is 0; give the share of tokens that is trained",
    "loss: {kind: gmpo, top_entropy: 0.2}": "loss.top_entropy picks tokens, but loss.kind gmpo judges whole samples",
    "advantage: {kind: opo}\nrollout: {samples: 1}": "opo compares a group's samples: at least 2",
    "train: {steps: 0}": "train.steps",
    "train: {save_every: -1}": "train.save_every",
    "train: {guard: {max_skips: 0}}": "train.guard.max_skips",
    "train: {eval_every: 5}": "train.eval_every asks for evaluations, but evals is empty",
    "optim: {lr: 0.0}": "optim.lr",
    "env: {}": "env.tools is empty; add one, such as --env.tools '[{kind: calculator}]'",
    "env: {tools: [{kind: calculator, name: a b}]}": "env.tools.0.name is 'a b'; each tool needs a name of its own",
    "env: {tools: [{kind: calculator}, {kind: python, name: calculator}]}": "env.tools.1.name is 'calculator'",
    "env: {tools: [{kind: python, seconds: 0.0}]}": "env.tools.0.seconds",
    "env: {tools: [{kind: search, source: {path: a.jsonl}, count: 0}]}": "env.tools.0.count",
    "env: {tools: [{kind: calculator}], max_turns: 0}": "env.max_turns",
    "env: {tools: [{kind: calculator}], max_tokens: 8}": "rollout.max_tokens 256, the limit of one turn, exceeds env",
    "env: {tools: [{kind: calculator}], role: ''}": "env.role is empty",
    "env: {tools: [{kind: calculator}], system: Hi}": "env.system must hold {tools}",
    "env: {tools: [{kind: calculator}]}\nprompts: {chat: false}": "env needs the chat format; set prompts.chat true",
    "env: {tools: [{kind: calculator}]}\nevals: [{max_tokens: 999}]": "evals.0.max_tokens 999, the limit of one turn",
    "env: {tools: [{kind: calculator}]}\nadvantage: {kind: grpo_process}": "grpo_process scores the steps of a single",
}


def test_the_least_and_the_whole_preset_are_sound() -> None:
    assert check_config(read()) == read()
    check_config(read(WHOLE))


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_is_said_with_its_key(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(read(text))
    assert WRONG[text] in str(error.value)


def test_a_penalty_that_no_answer_can_have_is_refused() -> None:
    reward = "method: rl\nreward: {parts: [{kind: math}, {kind: overlong, max_tokens: 512, buffer: 128}]}\n"
    check_config(loads(reward + "rollout: {max_tokens: 385}\n", source="p.yaml"))
    with pytest.raises(ConfigError, match=r"reward\.parts\.1: its penalty begins above 384 tokens"):
        check_config(loads(reward + "rollout: {max_tokens: 384}\n", source="p.yaml"))


def test_a_run_without_a_reward_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward\.parts is empty; add one"):
        check_config(loads("method: rl\n", source="p.yaml"))


def sections() -> set[type]:
    found = [*vars(config_rl).values(), *vars(config_rewards).values(), *vars(config_env).values()]
    found = [kind for kind in found if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    # Preference losses' numbers go on whole (`assemble.preference_losses.preference_hyper`).
    return {kind for kind in found if kind.__module__ != "jaxpost.config_preference_losses"}


def test_every_key_is_read_somewhere() -> None:
    """Beyond the files that declare and check it: as an attribute, or by its name where a section goes on whole."""
    skipped = {
        "config_policy_losses.py",
        "config_rl.py",
        "config_rewards.py",
        "config_env.py",
        "config_check_rl.py",
        "config_check.py",
        "config_io.py",
    }
    read_names: set[str] = set()
    for path in (ROOT / "jaxpost").rglob("*.py"):
        if path.name not in skipped:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read_names.add(node.attr)
    keys = {field.name for section in sections() for field in dataclasses.fields(section)}
    # Told apart by their classes; the mesh is read as a mapping.
    assert keys - read_names <= {"kind", "method", "expert", "fsdp"}


def test_a_judge_of_pairs_needs_several_samples_of_a_problem() -> None:
    pairs = RewardSection(parts=(JudgeSection(mode="pair"),))
    config = replace(read("rollout: {samples: 1}\nadvantage: {kind: remax}\nevals: [{name: a}]"), reward=pairs)
    with pytest.raises(ConfigError) as error:
        check_config(config)
    first, second = str(error.value).splitlines()
    assert first == "rollout.samples is 1; a judge of mode pair compares a problem's samples: at least 2"
    assert second.startswith("evals.0 draws one sample of a problem, and a judge of mode pair compares several; raise")
    several = replace(config.evals[0], samples=2, temperature=1.0)
    check_config(replace(config, rollout=replace(config.rollout, samples=2), evals=(several,)))
