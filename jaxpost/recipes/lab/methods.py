"""From a method's preset to a run on the lab's model: what makes the method is kept, all else is the lab's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxpost.config import AdamWSection, ModelSection, RunSection, ScheduleSection, SourceSection
from jaxpost.config_flags import apply_flags
from jaxpost.config_io import ConfigError, load
from jaxpost.config_rewards import MathSection, RewardSection
from jaxpost.config_rl import EvalSection, FilePrompts, OnlineSection, RLConfig
from jaxpost.recipes.lab.model import LONGEST, Lab

FOLDER = Path(__file__).parent / "presets"
STYLE = ("overlong", "repetition", "target_length", "finished")
"""Parts of a preset's reward that belong to the method and not to its task."""
COMPARED = "greedy"
"""The evaluation of every run, which the table shows."""
RIGHT = RewardSection(parts=(MathSection(name="right", sources=("number",)),), workers=1)


@dataclass(frozen=True)
class Budget:
    """What every method is given."""

    samples: int = 2_048
    """Drawn in all, those that are thrown away too."""
    prompts: int = 16
    """Per step."""
    group: int = 8
    """Samples per prompt."""
    minibatches: int = 2
    """Updates per pass over a step's samples."""
    lr: float = 1e-4


def names() -> list[str]:
    """Methods that the lab brings."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_method(name: str) -> RLConfig:
    """A method by the lab's name for it, or by the path of a preset.

    Raises:
      ConfigError: no such method, or a preset of another kind.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            raise ConfigError(f"{name} is no method of the lab ({', '.join(names())}) and no preset (a .yaml file)")
    config = load(path)
    if not isinstance(config, RLConfig):
        raise ConfigError(f"{path}: `method: {config.method}`; the lab compares presets of `method: rl`")
    return config


def title_of(name: str) -> str:
    """How a method is called in tables and folders: its file's stem.

    >>> title_of("grpo"), title_of("configs/grpo/gspo.yaml")
    ('grpo', 'gspo')
    """
    return Path(name).stem


def lab_config(
    method: RLConfig, lab: Lab, budget: Budget, *, name: str, seed: int, folder: Path, flags: Sequence[str] = ()
) -> RLConfig:
    """The method's advantage, loss, KL, correction, critic, passes, refills and style rewards; the lab's model,
    problems, reward for right answers, batch, optimiser and length.

    Args:
      flags: settings for every method, as on the command line; they win over both.
    """
    problems = FilePrompts(sources=(SourceSection(path=str(lab.prompts)),), seed=seed)
    unseen = FilePrompts(sources=(SourceSection(path=str(lab.held_out)),))
    style = tuple(part for part in method.reward.parts if part.kind in STYLE)
    each = budget.prompts * budget.group
    config = dataclasses.replace(
        method,
        model=ModelSection(path=str(lab.model)),
        prompts=problems,
        rollout=dataclasses.replace(
            method.rollout,
            prompts=budget.prompts,
            samples=budget.group,
            max_tokens=LONGEST,
            min_tokens=0,
            temperature=1.0,
            rows=each,
            cache_tokens=None,
        ),
        reward=dataclasses.replace(RIGHT, parts=RIGHT.parts + style),
        learner=dataclasses.replace(
            method.learner,
            minibatches=budget.minibatches,
            row_tokens=None,
            microbatch_rows=2,  # rows that short answers leave empty are then not computed
            old_logprobs="sampler",
        ),
        optim=AdamWSection(lr=budget.lr, b2=0.95, schedule=ScheduleSection(kind="constant", warmup=0.0)),
        evals=(EvalSection(name=COMPARED, prompts=unseen, items=lab.recipe.held_out, reward=RIGHT),),
        train=OnlineSection(
            steps=-(-budget.samples // each), samples=budget.samples, save_every=20, keep_checkpoints=1
        ),
        run=RunSection(dir=str(folder), name=name, seed=seed, export=False),
    )
    return apply_flags(config, flags)
