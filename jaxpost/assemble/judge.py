"""A run's rewards as one function: rules in worker processes, reward models on the policy's devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxpost.assemble.generative import Verdicts, make_verdicts
from jaxpost.assemble.reward_scores import Encoded, Reduce, RewardModel, load_ensemble
from jaxpost.assemble.rewards import make_pool
from jaxpost.assemble.supervised import model_identity
from jaxpost.config import ModelSection
from jaxpost.config_rewards import RewardSection
from jaxpost.rewards.combine import leaves
from jaxpost.rewards.contract import Completion, Example, Rewards
from jaxpost.rewards.runner import Pool, Problem, Scored
from jaxpost.rewards.scored import JudgeScore, ModelScore, OffPool
from jaxpost.text.messages import DataError
from jaxpost.train.agree import scored_once


@dataclass(frozen=True)
class Scoring:
    """A loaded reward model, or an ensemble of them, in the place of a `ModelScore`."""

    spec: ModelScore
    models: tuple[RewardModel, ...]

    @property
    def reduce(self) -> Reduce:
        return Reduce(self.spec.members, self.spec.penalty, self.spec.steps, self.spec.objectives)

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> tuple[Rewards, list[Problem]]:
        """Columns NAME and, of ensembles, NAME/uncertainty; NaN with a fault where an answer cannot be scored."""
        found, faults = self._scores(examples, [(c.text, None) for c in completions])
        value, spread = np.full(len(found), np.nan), np.full(len(found), np.nan)
        for i, scores in enumerate(found):
            if scores is not None:
                value[i], spread[i] = self.reduce(scores)
        columns = {self.spec.name: value}
        if sum(model.readout.members for model in self.models) > 1:
            columns[f"{self.spec.name}/uncertainty"] = spread
        return columns, faults

    def by_step(
        self, examples: Sequence[Example], steps: Sequence[Sequence[str]]
    ) -> tuple[list[np.ndarray], list[Problem]]:
        """A process model's score of every step of every answer, NaN for steps of nothing but spaces."""
        kept = [[text for text in each if text.strip()] for each in steps]
        found, faults = self._scores(examples, [("\n".join(each), each) for each in kept])
        out = []
        for scores, each in zip(found, steps, strict=True):
            values = np.full(len(each), np.nan)
            if scores is not None:
                values[[n for n, text in enumerate(each) if text.strip()]] = self.reduce.by_step(scores)[0]
            out.append(values)
        return out, faults

    def _scores(
        self, examples: Sequence[Example], answers: Sequence[tuple[str, Sequence[str] | None]]
    ) -> tuple[list[np.ndarray | None], list[Problem]]:
        """[steps, members of all models, objectives] of every answer; None where it cannot be scored."""
        faults: dict[int, str] = {}
        parts: list[list[np.ndarray]] = [[] for _ in answers]
        for model in self.models:
            encoded: list[tuple[int, Encoded]] = []
            for i, (example, (text, steps)) in enumerate(zip(examples, answers, strict=True)):
                try:
                    encoded.append((i, model.encode(self._prompt(example), text, steps=steps)))
                except DataError as error:
                    faults[i] = str(error)
            for (i, _), scores in zip(encoded, model.scores([e for _, e in encoded]), strict=True):
                parts[i].append(scores)
        found = [None if i in faults else np.concatenate(each, axis=1) for i, each in enumerate(parts)]
        return found, [Problem(self.spec.name, i, reason) for i, reason in sorted(faults.items())]

    def _prompt(self, example: Example) -> Any:
        prompt = example.get("prompt")
        if prompt is None:
            raise DataError(f"the problem has no prompt to show the reward model; it has {', '.join(example)}")
        if not isinstance(prompt, str) or self.spec.template == "{prompt}":
            return prompt
        try:
            return self.spec.template.format(**example)
        except (KeyError, IndexError) as error:
            raise DataError(f"the template {self.spec.template!r} names {error}, which the problem lacks") from None


class Judge:
    """judge(examples, completions) -> columns of rewards and faults; rules by process 0, models by all together."""

    def __init__(self, pool: Pool, models: Mapping[OffPool, Scoring | Verdicts]):
        self.pool, self.models = pool, models

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> Scored:
        known, faults = {}, []
        for spec, scoring in self.models.items():
            known[spec], told = scoring(examples, completions)
            faults += told
        scored = scored_once(partial(self.pool, known=known))(examples, completions)
        return Scored(scored.rewards, (*faults, *scored.problems))

    @property
    def by_step(self) -> Callable[..., tuple[list[np.ndarray], list[Problem]]] | None:
        """Scores of steps, where the reward is a process model alone."""
        scoring = self.models.get(self.pool.reward) if isinstance(self.pool.reward, ModelScore) else None
        return scoring.by_step if isinstance(scoring, Scoring) and scoring.models[0].readout.steps else None

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints of the reward models."""
        return {
            f"reward model {scoring.spec.name} {n}": model_identity(model.pretrained)
            for scoring in self.models.values()
            if isinstance(scoring, Scoring)
            for n, model in enumerate(scoring.models)
        }

    def close(self) -> None:
        """Ends the worker processes."""
        self.pool.close()


def make_judge(
    section: RewardSection, mesh: Mesh, *, key: str = "reward", loaded: dict[Any, Scoring | Verdicts] | None = None
) -> Judge:
    """The rewards that a section names, their models loaded on the mesh.

    Args:
      loaded: models that are there already, by what they are told; new ones are added.

    Raises:
      ValueError, FileNotFoundError: as `make_pool` and `load_reward_model`; `key` names the section.
    """
    pool, loaded = make_pool(section, key=key), {} if loaded is None else loaded
    for leaf in leaves(pool.reward):
        if isinstance(leaf, JudgeScore) and leaf not in loaded:
            loaded[leaf] = make_verdicts(leaf)
        if isinstance(leaf, ModelScore) and leaf not in loaded:
            how = ModelSection(param_dtype=leaf.param_dtype, compute_dtype=leaf.compute_dtype)
            try:
                models = load_ensemble(leaf.path, tokens=leaf.tokens, mesh=mesh, section=how)
                Reduce(objectives=leaf.objectives)(np.zeros((1, 1, len(models[0].readout.objectives))))
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"{key}, model reward {leaf.name!r}: {error}") from None
            loaded[leaf] = Scoring(leaf, tuple(models))
    return Judge(pool, {leaf: loaded[leaf] for leaf in leaves(pool.reward) if isinstance(leaf, OffPool)})
