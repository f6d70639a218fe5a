"""How samples are drawn in the online loop, and against whom; see `config_rl`. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ReferenceOpponent:
    """The policy that the run started from draws some of each group's samples: XPO's second answer (2405.21046)."""

    kind: Literal["reference"] = "reference"
    samples: int = 1
    """Of each group's `rollout.samples`."""


@dataclass(frozen=True, kw_only=True)
class MixtureOpponent:
    """The geometric mixture pi^(1 - w) ref^w, normalised at every token, draws them: Nash-MD's (2312.00886)."""

    kind: Literal["mixture"] = "mixture"
    samples: int = 1
    weight: float = 0.125
    """w: the reference's share."""


@dataclass(frozen=True, kw_only=True)
class GivenOpponent:
    """The answer that stands beside the problem: SPIN's human answer (2401.01335), with `advantage.kind: self_play`."""

    kind: Literal["given"] = "given"
    samples: int = 1
    """There is one."""
    key: str = "completion"
    """Of the problem's row: a text."""


OpponentSection = ReferenceOpponent | MixtureOpponent | GivenOpponent


@dataclass(frozen=True, kw_only=True)
class RolloutSection:
    """How the policy's samples are drawn."""

    prompts: int = 8
    """Prompts per step, each a group of samples."""
    samples: int = 8
    """Samples per prompt, G."""
    max_tokens: int = 256
    min_tokens: int = 0
    """No end before so many tokens. The learner's policy knows nothing of it, so ratios of these tokens are biased."""
    temperature: float = 1.0
    """The policy is softmax(logits / temperature), while sampling and in the loss."""
    stop: tuple[str, ...] = ()
    rows: int = 64
    """Most samples that decode together."""
    cache_tokens: int | None = None
    """Room of the key-value cache; None: enough for `rows` of the longest."""
    prefill_tokens: int = 1024
    """Prompt tokens that are read in one pass."""
    max_refills: int = 0
    """Dynamic sampling (2503.14476): how often a step may sample more prompts until all its groups are informative."""
    refill_by: str | None = None
    """Reward column whose spread decides whether dynamic sampling keeps a group (DAPO: accuracy); None: the reward."""
    uninformative: Literal["drop", "count"] = "drop"
    """Groups whose rewards are all equal, in methods that compare within groups: out of the loss's mean, as DAPO has
    it, or part of it with an advantage of 0, as GRPO's formula has it (KL and entropy terms then act on them too). With
    `kl.where: sample` they differ by their KL, and none is left out."""
    overlap: Literal[0, 1] = 0
    """1: the next step's samples are drawn before this step's update, while its rewards are computed (one step off)."""
    opponent: OpponentSection | None = None
    """Who draws some of each group's samples in the policy's place, which is only compared with them."""
    tensor: int | None = None
    """Devices that split each layer while sampling; None: the mesh of training, its weights by reference."""
