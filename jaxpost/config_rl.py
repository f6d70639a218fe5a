"""What a reinforcement-learning run can be told; see `config`. Imports no jax.

An algorithm is a choice in each of `advantage`, `loss`, `kl`, `correction` and `critic`; there is no trainer per name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpost.config import (
    AdamWSection,
    AdapterSection,
    FullSection,
    GuardSection,
    MeshSection,
    ModelSection,
    OptimSection,
    RunSection,
    SourceSection,
)
from jaxpost.config_env import EnvSection
from jaxpost.config_policy_losses import PolicyLossSection, PPOLoss
from jaxpost.config_rewards import RewardSection
from jaxpost.config_rollout import RolloutSection
from jaxpost.config_watch import WatchSection


@dataclass(frozen=True, kw_only=True)
class AskedPrompts:
    template: str = "{prompt}"
    """What the user turn says; {prompt} is the problem."""
    system_prompt: str | None = None
    """None: as the chat template does it. "": no system turn, not even the template's own."""
    chat: bool = True
    """Ask in the model's chat format; otherwise the text stands as it is."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class FilePrompts(AskedPrompts):
    """Problems from files: rows with a `prompt` (text or messages); rewards read the other columns."""

    kind: Literal["files"] = "files"
    sources: tuple[SourceSection, ...] = ()
    max_tokens: int | None = None
    """Longer prompts are left out, and counted."""


@dataclass(frozen=True, kw_only=True)
class ArithmeticPrompts(AskedPrompts):
    """Endless a + b, a - b, a * b; a share of the unordered pairs of operands is held out."""

    kind: Literal["arithmetic"] = "arithmetic"
    low: int = 1
    high: int = 50
    operations: str = "+-"
    split: Literal["all", "train", "test"] = "train"
    held_out: float = 0.1
    negative: bool = True
    """Whether a - b may be below 0; if not, the larger operand comes first."""


@dataclass(frozen=True, kw_only=True)
class Game24Prompts(AskedPrompts):
    """Endless solvable games of 24."""

    kind: Literal["game24"] = "game24"
    high: int = 13


@dataclass(frozen=True, kw_only=True)
class CountdownPrompts(AskedPrompts):
    """Endless solvable countdown problems."""

    kind: Literal["countdown"] = "countdown"
    count: int = 4
    largest: int = 50
    low: int = 10
    high: int = 100


@dataclass(frozen=True, kw_only=True)
class GymPrompts(AskedPrompts):
    """Endless problems of a task of the package reasoning-gym, for the reward `gym`: problem i is its seed + i, so an
    evaluation needs a seed that training never comes to."""

    kind: Literal["gym"] = "gym"
    task: str = "chain_sum"


PromptsSection = FilePrompts | ArithmeticPrompts | Game24Prompts | CountdownPrompts | GymPrompts


@dataclass(frozen=True, kw_only=True)
class GRPOAdvantage:
    """(r - mean of the group) / deviation (2402.03300; Dr.GRPO: scale none)."""

    kind: Literal["grpo"] = "grpo"
    scale: Literal["group", "batch", "none"] = "group"
    eps: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class ProcessAdvantage:
    """GRPO with rewards per step of the answer: normalised over the group, then summed over what follows."""

    kind: Literal["grpo_process"] = "grpo_process"
    scale: Literal["group", "batch", "none"] = "group"
    eps: float = 1e-4
    separator: str = "\n"
    """Text that ends a step; each step is scored as if the answer ended there."""


@dataclass(frozen=True, kw_only=True)
class RLOOAdvantage:
    """r - mean of the group's other samples (2402.14740)."""

    kind: Literal["rloo"] = "rloo"


@dataclass(frozen=True, kw_only=True)
class OPOAdvantage:
    """r - mean of the group, each sample weighted by its length: the baseline of least variance where the squared norm
    of a sample's gradient grows with its length (2505.23585)."""

    kind: Literal["opo"] = "opo"


@dataclass(frozen=True, kw_only=True)
class GDPOAdvantage:
    """Several rewards, each normalised in its group, and their weighted sum over the batch (2601.05242)."""

    kind: Literal["gdpo"] = "gdpo"
    columns: tuple[str, ...] = ()
    """Names of the reward's columns that are compared, each by itself; at least two."""
    weights: tuple[float, ...] = ()
    """Of the normalised columns; empty: 1 each."""
    eps: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class ReinforceAdvantage:
    """r - baseline."""

    kind: Literal["reinforce"] = "reinforce"
    baseline: Literal["none", "batch_mean", "running_mean"] = "running_mean"
    """running_mean: of the rewards of earlier steps, which keeps the estimate unbiased."""
    decay: float = 0.9
    """How much less an earlier step weighs in the running mean than the next one; 1: all alike."""


@dataclass(frozen=True, kw_only=True)
class ReMaxAdvantage:
    """r - reward of the prompt's greedy answer (2310.10505)."""

    kind: Literal["remax"] = "remax"


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlusAdvantage:
    """Reward with KL in it, returns per token, whitened over the batch (2501.03262)."""

    kind: Literal["reinforce_plus_plus"] = "reinforce_plus_plus"
    group_baseline: bool = False
    """Subtract the group's mean first: its baseline variant."""


@dataclass(frozen=True, kw_only=True)
class GAEAdvantage:
    """Generalised advantage estimation with a critic (1506.02438)."""

    kind: Literal["gae"] = "gae"
    discount: float = 1.0
    trace: float = 0.95
    whiten: bool = True


@dataclass(frozen=True, kw_only=True)
class BestWorst:
    """The best and the worst sample of each group become a pair; for `loss.kind: preference`."""

    kind: Literal["best_worst"] = "best_worst"


@dataclass(frozen=True, kw_only=True)
class SelfPlay:
    """The given answer is chosen and the policy's own rejected, whatever rewards say, and the reference is the policy
    before the step: SPIN (2401.01335), a step being its iteration; with `rollout.opponent.kind: given` and
    `loss.kind: preference`."""

    kind: Literal["self_play"] = "self_play"


@dataclass(frozen=True, kw_only=True)
class NashAdvantage:
    """P(y beats y') - 1/2 over the opponent's samples y' of the same prompt: Nash-MD (2312.00886); with
    `rollout.opponent.kind: mixture`, and `kl.where: reward` for its regularisation."""

    kind: Literal["nash"] = "nash"
    preference: Literal["order", "logistic"] = "order"
    """P from two rewards: 1, 1/2 or 0 by their order, or s((r - r') / scale), as Bradley-Terry models mean them."""
    scale: float = 1.0
    """Read with `preference: logistic`."""


_ByRewards = GRPOAdvantage | RLOOAdvantage | OPOAdvantage | GDPOAdvantage | ReinforceAdvantage | ReMaxAdvantage
_ByPairs = BestWorst | SelfPlay | NashAdvantage
AdvantageSection = _ByRewards | _ByPairs | ProcessAdvantage | ReinforcePlusPlusAdvantage | GAEAdvantage
GROUP_RELATIVE = (GRPOAdvantage, RLOOAdvantage, OPOAdvantage, GDPOAdvantage, BestWorst)
"""A group of equal rewards teaches them nothing."""


@dataclass(frozen=True, kw_only=True)
class KLSection:
    """Distance from the policy that the run started from."""

    coef: float = 0.0
    """0: no reference policy is kept or computed."""
    where: Literal["loss", "reward", "sample"] = "loss"
    """A term of the loss; in the tokens' rewards; or in a sample's, before samples are compared (RLOO, 2402.14740)."""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """None: k3 in the loss, k1 elsewhere, the one whose gradient is the KL's there."""
    gradient: Literal["plain", "corrected"] = "plain"
    """In the loss: differentiate the estimate as it stands, or so that the gradient is the KL's."""
    target: float | None = None
    """KL per token that the coefficient is adapted to (1909.08593); None: it stays."""
    horizon: int = 10_000
    """Samples over which it adapts."""


@dataclass(frozen=True, kw_only=True)
class TruncatedCorrection:
    """Importance weights between sampler and learner, cut at `cap`."""

    kind: Literal["truncated"] = "truncated"
    level: Literal["token", "sequence", "sequence_mean"] = "token"
    cap: float = 2.0


@dataclass(frozen=True, kw_only=True)
class MaskedCorrection:
    """Importance weights between sampler and learner, 0 outside of low .. high."""

    kind: Literal["masked"] = "masked"
    level: Literal["token", "sequence", "sequence_mean"] = "token"
    low: float = 0.5
    high: float = 2.0


CorrectionSection = TruncatedCorrection | MaskedCorrection


@dataclass(frozen=True, kw_only=True)
class CriticSection:
    """The value function of `advantage.kind: gae`."""

    network: Literal["head", "separate"] = "head"
    """A head on the policy's last hidden states, or a network of its own that starts as a copy of the policy."""
    coef: float = 0.5
    """Of its squared error."""
    clip: float | None = 0.2
    """How far a value may move from the old one within a step's updates; None: freely."""
    lr: float | None = None
    """Learning rate of the critic (the head, and its own network); None: optim.lr."""


@dataclass(frozen=True, kw_only=True)
class LearnerSection:
    """How a step's samples become updates."""

    epochs: int = 1
    """Passes over the samples."""
    minibatches: int = 1
    """Updates per pass; groups are dealt to them at random."""
    old_logprobs: Literal["learner", "sampler"] = "learner"
    """Whose log-probabilities ratios start from, where a step has several updates or samples are one step old: the
    learner's, in one more forward pass, or the sampler's."""
    row_tokens: int | None = None
    """Length of a packed row; None: the room of one whole group, or of one sample where prompts are not shared."""
    microbatch_rows: int = 1
    """Rows per device that are differentiated at one time; rows without anything to learn cost nothing."""
    share_prompts: bool | None = None
    """Compute a prompt once for all its samples; None: where the attention kernel can (not splash)."""


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """Held-out problems, answered and scored; may differ from the reward, and should."""

    name: str = "held_out"
    prompts: PromptsSection = ArithmeticPrompts(split="test", seed=1)
    items: int = 256
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int | None = None
    """None: as in the rollout."""
    reward: RewardSection | None = None
    """None: the run's."""
    threshold: float = 1.0
    """An answer with at least this score is right."""
    pass_at: tuple[int, ...] = (1,)
    """pass@k by the unbiased estimator (2107.03374); at most `samples`."""
    vote: bool = False
    """Also report the accuracy of the answer that most of an item's samples agree on."""
    when: Literal["always", "ends"] = "always"
    """At every evaluation, or before the first and after the last step only."""


@dataclass(frozen=True, kw_only=True)
class OnlineSection:
    """The online loop. A step draws samples, scores them, and learns from them."""

    steps: int = 100
    samples: int | None = None
    """The run also ends when so many samples were drawn, those thrown away included; None: by `steps` alone."""
    eval_every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    save_every: int = 20
    keep_checkpoints: int = 2
    log_every: int = 1
    sample_every: int = 1
    """Steps between those whose samples are written to samples.jsonl."""
    guard: GuardSection = GuardSection()
    watch: WatchSection = WatchSection()


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """`method: rl`: reinforcement learning on the policy's own samples."""

    method: Literal["rl"] = "rl"
    model: ModelSection = ModelSection()
    prompts: PromptsSection = ArithmeticPrompts()
    rollout: RolloutSection = RolloutSection()
    env: EnvSection | None = None
    reward: RewardSection = RewardSection()
    advantage: AdvantageSection = GRPOAdvantage()
    loss: PolicyLossSection = PPOLoss()
    kl: KLSection = KLSection()
    correction: CorrectionSection | None = None
    critic: CriticSection = CriticSection()
    learner: LearnerSection = LearnerSection()
    adapter: AdapterSection = FullSection()
    optim: OptimSection = AdamWSection()
    mesh: MeshSection = MeshSection()
    evals: tuple[EvalSection, ...] = ()
    train: OnlineSection = OnlineSection()
    run: RunSection = RunSection(name="rl")

    @property
    def answer_tokens(self) -> int:
        """Most tokens of an answer, all its turns together."""
        return self.rollout.max_tokens if self.env is None else self.env.max_tokens
