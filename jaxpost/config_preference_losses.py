"""Which preference loss, or mixture of them: one section per loss; see `config`. Imports no jax.

`loss:` takes a list, each entry with a `weight`: `[{kind: dpo, beta: 0.1}, {kind: nll, weight: 0.2}]`. Numbers of a
section (all but text and switches) are traced: another value never recompiles. Formulas: `losses.preference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]


@dataclass(frozen=True, kw_only=True)
class _Common:
    weight: float = 1.0
    """Share in a mixture of losses."""


@dataclass(frozen=True, kw_only=True)
class ReferencedLoss(_Common):
    """What losses relative to a reference share."""

    beta: float = 0.1
    """How strongly the policy is held to its reference."""


@dataclass(frozen=True, kw_only=True)
class ComparedLoss(ReferencedLoss):
    """What losses of the difference of both sides' log ratios share."""

    divergence: Divergence = "reverse_kl"
    """Distance to the reference (f-DPO, 2309.16240)."""
    alpha: float = 0.5
    """Read with `divergence: alpha`: 0 is the reverse, 1 the forward KL."""


@dataclass(frozen=True, kw_only=True)
class _Logistic(ComparedLoss):
    label_smoothing: float = 0.0
    """Share of labels that are taken to be wrong (conservative DPO)."""
    margin: float = 0.0
    """Times a pair's strength: by how much the chosen answer's reward has to exceed the other's (2402.10571)."""


@dataclass(frozen=True, kw_only=True)
class DPOLoss(_Logistic):
    """-log s(beta D) (2305.18290)."""

    kind: Literal["dpo"] = "dpo"


@dataclass(frozen=True, kw_only=True)
class DPONormLoss(_Logistic):
    """DPO of log ratios per token, as Tulu 3 trains (2411.15124)."""

    kind: Literal["dpo_norm"] = "dpo_norm"
    beta: float = 5.0


@dataclass(frozen=True, kw_only=True)
class LDDPOLoss(_Logistic):
    """DPO that counts the tokens beyond the shorter answer's length less (2409.06411)."""

    kind: Literal["ld_dpo"] = "ld_dpo"
    ld_alpha: float = 0.5
    """How much they count: 0 nothing, 1 as in DPO."""


@dataclass(frozen=True, kw_only=True)
class WPOLoss(_Logistic):
    """DPO of pairs weighted by how much they look like the policy's own answers (2406.11827)."""

    kind: Literal["wpo"] = "wpo"


@dataclass(frozen=True, kw_only=True)
class RobustLoss(ComparedLoss):
    """DPO that is unbiased when a known share of labels is flipped (2403.00409)."""

    kind: Literal["robust"] = "robust"
    label_smoothing: float = 0.1
    """That share, below 0.5."""


@dataclass(frozen=True, kw_only=True)
class HingeLoss(ComparedLoss):
    """max(0, 1 - beta D) (2309.06657)."""

    kind: Literal["hinge"] = "hinge"


@dataclass(frozen=True, kw_only=True)
class IPOLoss(ComparedLoss):
    """(D per token - 1 / (2 beta))^2 (2310.12036)."""

    kind: Literal["ipo"] = "ipo"


@dataclass(frozen=True, kw_only=True)
class IPOSumLoss(ComparedLoss):
    """(D - 1 / (2 beta))^2: IPO with sums over tokens (2310.12036)."""

    kind: Literal["ipo_sum"] = "ipo_sum"


@dataclass(frozen=True, kw_only=True)
class EXOLoss(ComparedLoss):
    """KL of the policy's preference from the smoothed label (2402.00856)."""

    kind: Literal["exo"] = "exo"
    label_smoothing: float = 1e-3
    """Above 0: at 0 the KL is infinite."""


@dataclass(frozen=True, kw_only=True)
class NCALoss(ReferencedLoss):
    """Noise-contrastive alignment (2402.05369)."""

    kind: Literal["nca"] = "nca"
    beta: float = 0.01


@dataclass(frozen=True, kw_only=True)
class BCOPairLoss(ReferencedLoss):
    """A classifier of both sides, without a reward shift (2404.04656)."""

    kind: Literal["bco_pair"] = "bco_pair"


@dataclass(frozen=True, kw_only=True)
class SPPOLoss(ReferencedLoss):
    """Self-play preference optimisation with certain wins (2405.00675); its eta is 1 / beta."""

    kind: Literal["sppo"] = "sppo"
    beta: float = 0.001


@dataclass(frozen=True, kw_only=True)
class APOZeroLoss(ReferencedLoss):
    """Chosen up, rejected down (2408.06266)."""

    kind: Literal["apo_zero"] = "apo_zero"


@dataclass(frozen=True, kw_only=True)
class APODownLoss(ReferencedLoss):
    """Both down, rejected more (2408.06266)."""

    kind: Literal["apo_down"] = "apo_down"


@dataclass(frozen=True, kw_only=True)
class DiscoPOPLoss(ComparedLoss):
    """Logistic and exponential loss, mixed by the margin (2406.08414)."""

    kind: Literal["discopop"] = "discopop"
    beta: float = 0.05
    tau: float = 0.05


@dataclass(frozen=True, kw_only=True)
class AOTLoss(ReferencedLoss):
    """Sorted margins of the policy against those of the reference (2406.05882)."""

    kind: Literal["aot"] = "aot"
    label_smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AOTUnpairedLoss(ReferencedLoss):
    """Sorted rewards of chosen answers against those of rejected ones (2406.05882)."""

    kind: Literal["aot_unpaired"] = "aot_unpaired"
    label_smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Unpaired(ReferencedLoss):
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class KTOLoss(_Unpaired):
    """Gains and losses against the batch's KL (2402.01306)."""

    kind: Literal["kto"] = "kto"


@dataclass(frozen=True, kw_only=True)
class BCOLoss(_Unpaired):
    """A classifier of single answers with a reward shift (2404.04656)."""

    kind: Literal["bco"] = "bco"
    shift_decay: float = 0.9
    """How much of the shift's running mean stays at each step; 0: each batch has its own shift."""
    prompt_weights: Literal["none", "density_ratio"] = "none"
    """density_ratio: undesirable answers count P(desirable | prompt) / P(undesirable | prompt) times, for data whose
    two sides come from different prompts (the paper's underlying distribution matching)."""
    least_prompt_weight: float = 0.5
    most_prompt_weight: float = 10.0


@dataclass(frozen=True, kw_only=True)
class APOZeroUnpairedLoss(_Unpaired):
    """APO-zero of single answers (2408.06266)."""

    kind: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"


@dataclass(frozen=True, kw_only=True)
class ORPOLoss(_Common):
    """Negative log-likelihood and odds ratio (2403.07691)."""

    kind: Literal["orpo"] = "orpo"
    odds_weight: float = 0.1
    """The paper's lambda."""


@dataclass(frozen=True, kw_only=True)
class SimPOLoss(_Common):
    """Log-likelihoods per token with a margin (2405.14734)."""

    kind: Literal["simpo"] = "simpo"
    beta: float = 2.0
    gamma: float = 1.0
    """The margin between the rewards (not divided by beta)."""
    label_smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AlphaPOLoss(_Common):
    """SimPO with a reward of another shape (2501.03884)."""

    kind: Literal["alphapo"] = "alphapo"
    beta: float = 2.5
    gamma: float = 0.25
    alpha: float = 0.25
    """Of either sign; 0 is SimPO."""
    label_smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CPOLoss(_Common):
    """Log-likelihoods of whole answers, and the chosen one's likelihood (2401.08417)."""

    kind: Literal["cpo"] = "cpo"
    beta: float = 0.1
    nll_coef: float = 1.0
    label_smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class NLLLoss(_Common):
    """-log pi of chosen answers; RPO is `dpo` and this (2404.19733)."""

    kind: Literal["nll"] = "nll"
    mean: Literal["answer", "token", "sum"] = "answer"
    """What counts alike: each answer's mean over its tokens, each token of the batch, or each answer's sum."""


@dataclass(frozen=True, kw_only=True)
class XPOLoss(_Common):
    """log pi of answers that the reference drew: explores beside `dpo`, the weight being its alpha (2405.21046)."""

    kind: Literal["xpo"] = "xpo"
    weight: float = 1e-5


PreferenceLossSection = (
    DPOLoss
    | DPONormLoss
    | LDDPOLoss
    | WPOLoss
    | RobustLoss
    | HingeLoss
    | IPOLoss
    | IPOSumLoss
    | EXOLoss
    | NCALoss
    | BCOPairLoss
    | SPPOLoss
    | APOZeroLoss
    | APODownLoss
    | DiscoPOPLoss
    | AOTLoss
    | AOTUnpairedLoss
    | KTOLoss
    | BCOLoss
    | APOZeroUnpairedLoss
    | ORPOLoss
    | SimPOLoss
    | AlphaPOLoss
    | CPOLoss
    | NLLLoss
    | XPOLoss
)
