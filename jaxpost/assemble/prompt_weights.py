"""BCO's weights of undesirable answers by their prompts: what makes two sets of prompts look like one (2404.04656).

Where desirable and undesirable answers come from different prompts, a classifier of answers learns the difference of
prompts. With f = 1 for prompts of desirable answers, an undesirable answer to x counts P(f = 1 | x) / P(f = 0 | x)
times. P is a logistic regression on what the model says of a prompt: its last hidden state there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

import jax
import numpy as np

from jaxpost.assemble.model import Pretrained
from jaxpost.config_preference_losses import BCOLoss
from jaxpost.data.answer_rows import AnswerSource
from jaxpost.data.answers import AnswerDataset
from jaxpost.generate.scoring import Scorer
from jaxpost.types import Params

FITTED = 2048
"""Most prompts, evenly spread over the data, that the regression is fitted on."""


def logistic_regression(features: np.ndarray, labels: np.ndarray, *, ridge: float = 1.0) -> np.ndarray:
    """Coefficients [D + 1], the last the intercept, by Newton's method:

      argmin_w sum_i b_i log(1 + exp(-s_i (w x_i + w_0))) + ridge |w|^2 / 2,   s_i = +-1,

    with b_i = N / (2 N_side), so that both sides weigh alike and P(1 | x) / P(0 | x) is a ratio of densities of x.

    Args:
      features: [N, D]. labels: [N], true or false, both at least once.

    Example:
      >>> w = logistic_regression(np.array([[-1.0], [0.0], [0.0], [1.0]]), np.array([0, 0, 1, 1]))
      >>> bool(w[0] > 0), abs(round(float(w[1]), 6))
      (True, 0.0)
    """
    x = np.concatenate([np.asarray(features, np.float64), np.ones((len(features), 1))], axis=1)
    y = np.asarray(labels, bool)
    balance = np.where(y, len(y) / (2.0 * max(y.sum(), 1)), len(y) / (2.0 * max((~y).sum(), 1)))
    penalty = np.full(x.shape[1], ridge)
    penalty[-1] = 1e-9
    w = np.zeros(x.shape[1])
    loss = lambda w: float(balance @ np.logaddexp(0.0, -np.where(y, 1, -1) * (x @ w)) + penalty @ w**2 / 2)  # noqa: E731
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ w, -500, 500)))
        gradient = x.T @ (balance * (p - y)) + penalty * w
        curvature = (x * (balance * p * (1 - p))[:, None]).T @ x + np.diag(penalty)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while loss(w - size * step) > loss(w) and size > 1e-6:
            size /= 2
        w = w - size * step
        if np.abs(size * step).max() < 1e-9:
            break
    return w


def density_ratios(features: np.ndarray, coefficients: np.ndarray, *, least: float, most: float) -> np.ndarray:
    """P(1 | x) / P(0 | x) = exp(w x + w_0) of every row, within bounds, float32 [N].

    >>> density_ratios(np.array([[0.0], [9.0]]), np.array([1.0, 0.0]), least=0.5, most=10.0).tolist()
    [1.0, 10.0]
    """
    logits = np.asarray(features, np.float64) @ coefficients[:-1] + coefficients[-1]
    return np.exp(np.clip(logits, np.log(least), np.log(most))).astype(np.float32)


def with_prompt_weights(
    section: BCOLoss, pretrained: Pretrained, params: Params, sources: Mapping[str, AnswerSource], *, tokens: int
) -> dict[str, AnswerSource]:
    """Sources whose undesirable answers have the ratio as their strength, fitted on the source "train".

    Args:
      params: as the model reads them.
      tokens: most of a batch.

    Raises:
      ValueError: the training data has answers of one side alone.
    """
    identity = lambda params, hidden: hidden  # noqa: E731
    scorer = Scorer(pretrained.model, identity, mesh=pretrained.mesh, tokens=tokens, pad_id=pretrained.tokenizer.pad_id)
    known: dict[bytes, np.ndarray] = {}

    def features(dataset: AnswerDataset, numbers: np.ndarray) -> np.ndarray:
        prompts = [dataset.group(int(i)).prompt for i in numbers]
        new = {p.tobytes(): p for p in prompts if p.tobytes() not in known}
        said = scorer({"policy": params}, list(new.values()), [[len(p) - 1] for p in new.values()])
        known.update(zip(new, (x[0] for x in said), strict=True))
        return np.stack([known[p.tobytes()] for p in prompts])

    train = sources["train"].dataset
    desirable = _desirable(train)
    if desirable.all() or not desirable.any():
        raise ValueError(
            "losses: prompt_weights compares prompts of desirable and of undesirable answers, but the training data "
            "has one of them alone; set prompt_weights to none"
        )
    chosen = np.unique(np.linspace(0, len(train) - 1, min(FITTED, len(train))).astype(np.int64))
    if len(set(desirable[chosen].tolist())) == 1:
        chosen = np.arange(len(train))
    fitted = features(train, chosen)
    mean, scale = fitted.mean(axis=0), fitted.std(axis=0) + 1e-6
    coefficients = logistic_regression((fitted - mean) / scale, desirable[chosen])

    def weighted(source: AnswerSource) -> AnswerSource:
        dataset = source.dataset
        bad = np.flatnonzero(~_desirable(dataset))
        strengths = dataset.strengths.copy()
        if bad.size:
            found = (features(dataset, bad) - mean) / scale
            strengths[bad] = density_ratios(
                found, coefficients, least=section.least_prompt_weight, most=section.most_prompt_weight
            )
        return replace(source, dataset=replace(dataset, strengths=strengths))

    weights = {name: weighted(source) for name, source in sources.items()}
    if jax.process_index() == 0:
        _tell(weights["train"].dataset)
    return weights


def _desirable(dataset: AnswerDataset) -> np.ndarray:
    """Of every group of one answer, whether it is desirable."""
    return np.array([dataset.group(i).answers[0].rank == 0 for i in range(len(dataset))])


def _tell(dataset: AnswerDataset) -> None:
    bad = dataset.strengths[~_desirable(dataset)]
    print(
        f"weights of undesirable answers by their prompts: mean {bad.mean():.3f}, from {bad.min():.3f} to "
        f"{bad.max():.3f}",
        file=sys.stderr,
    )
