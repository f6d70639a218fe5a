"""`method: reward`: what training a reward model can be told. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpost.config import (
    AdamWSection,
    AdapterSection,
    AnswerDataSection,
    FullSection,
    MeshSection,
    ModelSection,
    OptimSection,
    RunSection,
    TrainSection,
)


@dataclass(frozen=True, kw_only=True)
class BradleyTerryLoss:
    """-log s(r_i - r_j) of the better and the worse answer (1909.08593); rows: pairs, or whole rankings."""

    kind: Literal["bradley_terry"] = "bradley_terry"
    rows: Literal["pairs", "rankings"] = "pairs"
    """rankings: all pairs of a ranking are one element of the mean (2203.02155)."""
    margin: float = 0.0
    """Factor of a pair's strength that r_i - r_j must exceed (2307.09288); strengths by grade: data.grades."""
    label_smoothing: float = 0.0
    """Share of pairs that are thought to be labelled the wrong way round."""
    centre: float = 0.0
    """Weight of (r_i + r_j)^2, which keeps scores near 0 (2312.09244)."""


@dataclass(frozen=True, kw_only=True)
class PlackettLuceLoss:
    """-log P(order) of a whole ranking; tied answers in any order."""

    kind: Literal["plackett_luce"] = "plackett_luce"
    centre: float = 0.0
    """Weight of (r_i + r_j)^2 over the ranking's pairs."""


@dataclass(frozen=True, kw_only=True)
class RegressionLoss:
    """(r - y)^2 on scored answers (2311.09528)."""

    kind: Literal["regression"] = "regression"


@dataclass(frozen=True, kw_only=True)
class OutcomeLoss:
    """Right or wrong answers, by cross-entropy: an outcome reward model (2110.14168)."""

    kind: Literal["outcome"] = "outcome"
    rows: Literal["labels", "scores"] = "labels"
    """scores: probabilities, such as a share of successful continuations."""
    at: Literal["last", "tokens"] = "last"
    """After the last token, or after every token of the answer, as 2110.14168 trains its verifiers."""
    label_smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ProcessLoss:
    """A label for every step, by cross-entropy: a process reward model (2305.20050, 2312.08935).

    Where a step's score is read, hard labels, and what counts behind the first error: data.step_mark, data.step_labels,
    data.after_error.
    """

    kind: Literal["process"] = "process"
    label_smoothing: float = 0.0


RewardLossSection = BradleyTerryLoss | PlackettLuceLoss | RegressionLoss | OutcomeLoss | ProcessLoss


@dataclass(frozen=True, kw_only=True)
class HeadSection:
    """The linear head that reads scores; it is trained whole, whatever the adapter."""

    members: int = 1
    """Heads of an ensemble, that share the model and differ by their start; their spread is reported."""
    classes: Literal[1, 2] = 1
    """2: outcome and process labels as two classes, wrong and right, the usual layout of published classifiers."""
    std: float | None = None
    """Deviation of its normal start; None: 1 / sqrt(width + 1) (2009.01325)."""
    lr: float | None = None
    """Its learning rate; None: optim.lr."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """`method: reward`: reward models, outcome and process."""

    method: Literal["reward"] = "reward"
    model: ModelSection = ModelSection()
    data: AnswerDataSection = AnswerDataSection()
    loss: RewardLossSection = BradleyTerryLoss()
    head: HeadSection = HeadSection()
    share_prompts: bool | None = None
    """One copy of a prompt for all its answers; None: wherever the attention can (everywhere but on TPU)."""
    adapter: AdapterSection = FullSection()
    optim: OptimSection = AdamWSection()
    mesh: MeshSection = MeshSection()
    train: TrainSection = TrainSection()
    run: RunSection = RunSection(name="reward")

    @property
    def objectives(self) -> tuple[str, ...]:
        """What is scored."""
        return self.data.objectives or ("reward",)

    @property
    def data_kind(self) -> Literal["pairs", "rankings", "unpaired", "scores", "steps"]:
        """What rows are read as."""
        loss = self.loss
        if isinstance(loss, BradleyTerryLoss):
            return loss.rows
        if isinstance(loss, OutcomeLoss):
            return "unpaired" if loss.rows == "labels" else "scores"
        kinds: dict[type, Literal["rankings", "scores", "steps"]]
        kinds = {PlackettLuceLoss: "rankings", RegressionLoss: "scores", ProcessLoss: "steps"}
        return kinds[type(loss)]
