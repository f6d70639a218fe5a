"""`method: preference`: what a run on pairs, rankings or labelled answers can be told. Imports no jax."""

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
from jaxpost.config_preference_losses import DPOLoss, PreferenceLossSection
from jaxpost.config_watch import PreferenceWatchSection


@dataclass(frozen=True, kw_only=True)
class CachedReference:
    """The policy before the first step: its log-probabilities are computed once, in one pass before training, and kept
    beside the tokenised data. Training then costs no more than without a reference."""

    kind: Literal["cached"] = "cached"
    path: str | None = None
    """Another model with the same tokenizer as the reference; None: the trained one before its first step."""
    batch_size: int | None = None
    """Packed rows that are computed together; None: train.batch_size / train.microbatches."""


@dataclass(frozen=True, kw_only=True)
class LiveReference:
    """The same, computed in every step: by the base without its adapter, or by a second copy of the weights."""

    kind: Literal["live"] = "live"
    path: str | None = None
    """As in `cached`."""


@dataclass(frozen=True, kw_only=True)
class NoReference:
    """For losses that compare an answer with nothing but other answers (SimPO, ORPO, CPO)."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class RefreshedReference:
    """A reference that follows the policy (TR-DPO, 2404.09656): a second copy of what is trained, moved to
    mix theta + (1 - mix) theta_ref."""

    kind: Literal["refreshed"] = "refreshed"
    every: int = 512
    """Applied updates between two refreshes (tau)."""
    mix: float = 1.0
    """Share of the policy in the new reference (alpha): 1 replaces it, the hard update."""


ReferenceSection = CachedReference | LiveReference | NoReference | RefreshedReference


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """`method: preference`: the DPO family and KTO."""

    method: Literal["preference"] = "preference"
    model: ModelSection = ModelSection()
    data: AnswerDataSection = AnswerDataSection()
    losses: tuple[PreferenceLossSection, ...] = (DPOLoss(),)
    """Added up, each times its weight."""
    reference: ReferenceSection = CachedReference()
    special_tokens: Literal["count", "leave_out"] = "count"
    """Whether special tokens of answers, such as the end of a turn, count in the losses; Llama 3 leaves them out."""
    share_prompts: bool | None = None
    """One copy of a prompt for all its answers; None: wherever the attention can (everywhere but on TPU)."""
    chunk_tokens: int | None = None
    """Tokens per device whose logits exist at one time; None: by the platform."""
    adapter: AdapterSection = FullSection()
    optim: OptimSection = AdamWSection(lr=5e-7)
    mesh: MeshSection = MeshSection()
    train: TrainSection = TrainSection()
    watch: PreferenceWatchSection = PreferenceWatchSection()
    run: RunSection = RunSection(name="preference")
