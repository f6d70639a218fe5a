"""What a reward model's numbers mean and how its texts are written: kept with the exported model.

In a model folder it stands in config.json under `task_specific_params`, in an adapter folder in score_head.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from jaxpost.config import AnswerDataSection
from jaxpost.config_reward import OutcomeLoss, ProcessLoss, RewardConfig

KEY = "jaxpost"


@dataclass(frozen=True, kw_only=True)
class Readout:
    """How a head's outputs become scores of answers or steps."""

    members: int = 1
    objectives: tuple[str, ...] = ("reward",)
    classes: int = 1
    probability: bool = False
    """Scores are probabilities: the sigmoid of the output (of two classes, of their difference)."""
    steps: bool = False
    """Every step has a score, not only the whole answer."""
    mask: Literal["assistant", "completion"] = "assistant"
    """assistant: plain texts are shown as chat turns; completion: as they stand."""
    system_prompt: str | None = None
    step_separator: str = "\n"
    step_mark: Literal["separator", "last"] = "separator"

    @property
    def outputs(self) -> int:
        return self.members * len(self.objectives) * self.classes

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for every output."""
        names = [n for o in self.objectives for n in ((f"{o} wrong", f"{o} right") if self.classes == 2 else (o,))]
        if self.members == 1:
            return tuple(names)
        return tuple(f"{name} {member}" for member in range(self.members) for name in names)

    def read(self, outputs: np.ndarray) -> np.ndarray:
        """A head's outputs [n, K] as scores [n, members, objectives], float64.

        >>> Readout(classes=2, probability=True).read(np.zeros((1, 2))).tolist()
        [[[0.5]]]
        """
        parts = outputs.astype(np.float64).reshape(len(outputs), self.members, -1, self.classes)
        scores = parts[..., 0] if self.classes == 1 else parts[..., 1] - parts[..., 0]
        return 1.0 / (1.0 + np.exp(-np.clip(scores, -500.0, 500.0))) if self.probability else scores

    def section(self, seq_len: int) -> AnswerDataSection:
        """A data section that writes texts as this model has learned them."""
        return AnswerDataSection(
            seq_len=seq_len,
            mask=self.mask,
            system_prompt=self.system_prompt,
            step_separator=self.step_separator,
            step_mark=self.step_mark,
            on_long_row="error",
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def readout_of(config: RewardConfig) -> Readout:
    """What a training run's model will say."""
    head, data = config.head, config.data
    return Readout(
        members=head.members,
        objectives=config.objectives,
        classes=head.classes,
        probability=isinstance(config.loss, (OutcomeLoss, ProcessLoss)),
        steps=isinstance(config.loss, ProcessLoss),
        mask="completion" if data.mask == "completion" else "assistant",
        system_prompt=data.system_prompt,
        step_separator=data.step_separator,
        step_mark=data.step_mark,
    )


def stored_readout(given: Mapping[str, Any] | None, labels: Sequence[str], *, tokens: bool, where: str) -> Readout:
    """The readout of an exported model; of one made elsewhere, what its layout says.

    A classifier of two labels gives the probability of the second; other heads one number per label.

    Raises:
      ValueError: it does not fit the head; names the file.
    """
    if given is None:
        two = len(labels) == 2
        return Readout(
            objectives=("reward",) if two or len(labels) == 1 else tuple(labels),
            classes=2 if two else 1,
            probability=two or tokens,
            steps=tokens,
        )
    known = {f.name for f in fields(Readout)}
    odd = sorted(set(given) - known)
    if odd:
        raise ValueError(f"{where} has the unknown entry {odd[0]!r}; it was written by another version")
    entries: dict[str, Any] = {**given, "objectives": tuple(given.get("objectives", ("reward",)))}
    found = Readout(**entries)
    if found.outputs != len(labels):
        raise ValueError(f"{where} describes {found.outputs} outputs, but the head has {len(labels)}")
    return found
