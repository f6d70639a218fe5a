"""What a policy gradient's loss can be told; see `config_rl`. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpost.config_preference_losses import DPOLoss, PreferenceLossSection

Aggregation = Literal["token_mean", "sequence_mean", "constant_mean"]


@dataclass(frozen=True, kw_only=True)
class _LossCommon:
    aggregate: Aggregation = "token_mean"
    """Which tokens share a mean: the batch's (DAPO), each sample's (GRPO), or divided by a constant (Dr.GRPO)."""
    divisor: int | None = None
    """The constant of constant_mean; None: the limit of an answer, rollout.max_tokens or env.max_tokens."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    truncated: Literal["keep", "mask", "unscore"] = "keep"
    """Samples cut off by the limit: rewarded as they are; kept in the statistics, not trained; or left out of both."""
    top_entropy: float = 1.0
    """Share of a step's tokens, those where the policy was least certain, that its advantages act on (2506.01939)."""
    chunk_tokens: int | None = None
    """Tokens per device whose logits exist at one time; None: by the platform."""


@dataclass(frozen=True, kw_only=True)
class PPOLoss(_LossCommon):
    """Clipped ratio (1707.06347)."""

    kind: Literal["ppo"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    """Most that a ratio counts where the advantage is negative (two-sided clip); None: no limit."""


@dataclass(frozen=True, kw_only=True)
class GSPOLoss(_LossCommon):
    """Clipped ratio of whole samples (2507.18071)."""

    kind: Literal["gspo"] = "gspo"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    dual_clip: float | None = None


@dataclass(frozen=True, kw_only=True)
class GMPOLoss(_LossCommon):
    """Geometric mean of a sample's held token ratios (2507.20673)."""

    kind: Literal["gmpo"] = "gmpo"
    clip_low: float = 0.4
    """Bounds of log rho: rho stays within exp(-clip_low) .. exp(clip_high)."""
    clip_high: float = 0.4


@dataclass(frozen=True, kw_only=True)
class SAPOLoss(_LossCommon):
    """A soft gate on the ratio in place of a clip (2511.20347)."""

    kind: Literal["sapo"] = "sapo"
    tau_positive: float = 1.0
    """How fast a token whose ratio has moved loses its gradient, where the advantage is positive; or else:"""
    tau_negative: float = 1.05


@dataclass(frozen=True, kw_only=True)
class CISPOLoss(_LossCommon):
    """Held importance weight on log pi, so no token loses its gradient (2506.13585)."""

    kind: Literal["cispo"] = "cispo"
    sides: Literal["upper", "both"] = "upper"
    """Which bounds hold the weight: the upper alone, as the paper trains, or both, as its formula says."""
    clip_low: float = 1.0
    """Read with `sides: both`."""
    clip_high: float = 4.0


@dataclass(frozen=True, kw_only=True)
class ReinforceLoss(_LossCommon):
    """-A log pi."""

    kind: Literal["reinforce"] = "reinforce"


@dataclass(frozen=True, kw_only=True)
class OnlinePreferenceLoss(_LossCommon):
    """Preference losses of the pairs that `advantage.kind: best_worst` makes: online DPO (2402.04792) and its kin; or
    `self_play`: SPIN."""

    kind: Literal["preference"] = "preference"
    losses: tuple[PreferenceLossSection, ...] = (DPOLoss(),)
    """As in `method: preference`."""


_ByRatio = PPOLoss | GSPOLoss | GMPOLoss | SAPOLoss | CISPOLoss
PolicyLossSection = _ByRatio | ReinforceLoss | OnlinePreferenceLoss
