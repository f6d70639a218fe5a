"""The lab's outcome and process reward models: trained on its own labelled answers, and asked as verifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxpost.assemble.reward_scores import RewardModel, load_reward_model
from jaxpost.assemble.search_rewards import reward_verifier
from jaxpost.assemble.train import train
from jaxpost.config import (
    AdamWSection,
    AnswerDataSection,
    ModelSection,
    RunSection,
    ScheduleSection,
    SourceSection,
    TrainSection,
)
from jaxpost.config_reward import HeadSection, OutcomeLoss, ProcessLoss, RewardConfig
from jaxpost.eval.verifiers import report
from jaxpost.recipes.lab.model import read_rows
from jaxpost.recipes.lab.search.samples import SEPARATOR
from jaxpost.search.checks import logic
from jaxpost.search.compose import Composed
from jaxpost.search.contract import Verifier
from jaxpost.search.verifiers import Logic
from jaxpost.search.width import signal_to_noise, widest

Kind = Literal["orm", "prm"]
COMPOSED = "logic x orm"
KINDS: tuple[Kind, ...] = ("orm", "prm")


def scorer_config(
    kind: Kind, model: Path, files: Mapping[str, Path], folder: Path, *, epochs: float = 2.0
) -> RewardConfig:
    """`method: reward` on the lab's labelled answers, from the lab's model."""
    rows = "outcomes" if kind == "orm" else "steps"
    return RewardConfig(
        model=ModelSection(path=str(model)),
        data=AnswerDataSection(
            train=(SourceSection(path=str(files[rows])),),
            eval=(SourceSection(path=str(files[f"{rows}_held"])),),
            seq_len=128,
            step_separator=SEPARATOR,
        ),
        loss=OutcomeLoss() if kind == "orm" else ProcessLoss(),
        head=HeadSection(lr=1e-3),
        optim=AdamWSection(lr=3e-4, b2=0.95, schedule=ScheduleSection(kind="cosine", warmup=0.05, final=0.1)),
        train=TrainSection(
            batch_size=16, epochs=epochs, eval_every=1000, save_every=200, keep_checkpoints=1, log_every=20
        ),
        run=RunSection(dir=str(folder), name=kind),
    )


def make_scorer(kind: Kind, model: Path, files: Mapping[str, Path], folder: Path, say: Callable[[str], None]) -> Path:
    """The trained reward model's folder; trained if it is not there, going on where that stopped.

    Raises:
      KeyboardInterrupt: a signal stopped the training; the same command goes on.
    """
    export = folder / kind / "export"
    if not (export / "config.json").is_file():
        say(f"training the {'outcome' if kind == 'orm' else 'process'} reward model")
        result = train(scorer_config(kind, model, files, folder / kind), command=("jaxpost", "lab", "search"))
        if result.stopped:
            raise KeyboardInterrupt(result.stopped)
    return export


def probability(model: RewardModel, prompts: Sequence[Any], answers: Sequence[str]) -> tuple[list[float], list[int]]:
    """P(right) after the whole text, and the tokens that were read; NaN of an empty text."""
    known = [i for i, answer in enumerate(answers) if answer.strip(SEPARATOR + " \n")]
    encoded = [model.encode(prompts[i], answers[i]) for i in known]
    scores, tokens = [float("nan")] * len(answers), [0] * len(answers)
    for i, text, found in zip(known, encoded, model.scores(encoded), strict=True):
        scores[i], tokens[i] = float(found[-1].mean()), len(text.tokens)
    return scores, tokens


def verifiers(models: Mapping[str, RewardModel]) -> dict[str, Verifier]:
    """The scorers as verifiers of searches, and the outcome model times the share of equations that hold."""
    found = {kind: reward_verifier(model, how="last") for kind, model in models.items()}
    return {**found, COMPOSED: Composed({"logic": Logic(), "orm": found["orm"]})}


def load(path: Path) -> RewardModel:
    """A trained scorer."""
    return load_reward_model(str(path), tokens=4096)


def examine(models: Mapping[str, RewardModel], held: Path, *, most: int = 1500) -> tuple[str, dict[str, Any]]:
    """The calibration and false-accept report on held-out labelled answers, and the scorers' signal-to-noise ratios."""
    rows = read_rows(held)[:most]
    prompts, answers = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    right = np.array([row["label"] for row in rows])
    scores = {name: np.array(probability(model, prompts, answers)[0]) for name, model in models.items()}
    scores["logic"] = np.array([logic(answer) for answer in answers])
    scores[COMPOSED] = scores["logic"] * scores["orm"]
    ratios = {name: signal_to_noise(values, right) for name, values in scores.items()}
    text = report(scores, right)
    lines = [f"- {name}: {ratio:.2f}, widest beam {widest(ratio)}" for name, ratio in ratios.items()]
    return text + "\n\nSignal-to-noise ratio of each, and the beam that it is worth:\n" + "\n".join(lines), ratios
