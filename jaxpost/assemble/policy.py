"""Sections of a reinforcement-learning preset -> its loss, critic and what must be known of samples before a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxpost.adapters.bind import bind
from jaxpost.assemble.credit import ESTIMATORS
from jaxpost.assemble.model import Pretrained
from jaxpost.assemble.preference_losses import make_preference_loss, preference_hyper
from jaxpost.assemble.training import Network, head_network
from jaxpost.config_check_preference import needs_reference
from jaxpost.config_policy_losses import (
    CISPOLoss,
    GMPOLoss,
    GSPOLoss,
    OnlinePreferenceLoss,
    PolicyLossSection,
    PPOLoss,
    SAPOLoss,
)
from jaxpost.config_rl import (
    CorrectionSection,
    GAEAdvantage,
    KLSection,
    RLConfig,
    SelfPlay,
    TruncatedCorrection,
)
from jaxpost.config_rollout import MixtureOpponent, ReferenceOpponent
from jaxpost.losses import aggregate, correction, kl, rescore, surrogates, value
from jaxpost.losses.policy import hidden_states, joined, policy_gradient
from jaxpost.losses.preference.online import of_samples
from jaxpost.losses.rescore import RescoreFn
from jaxpost.models import heads
from jaxpost.models.table import axes_tree
from jaxpost.ops import platform
from jaxpost.types import Coupled, Hyper, LossFn, Model, Params, RolloutBatch

LEVELS = {
    "token": correction.token_weights,
    "sequence": correction.sequence_weights,
    "sequence_mean": correction.mean_sequence_weights,
}
SURROGATES = {
    "ppo": surrogates.ppo,
    "gspo": surrogates.gspo,
    "gmpo": surrogates.gmpo,
    "sapo": surrogates.sapo,
    "reinforce": surrogates.reinforce,
}


def make_policy_loss(config: RLConfig, model: Model, mesh: Mesh) -> LossFn | Coupled:
    """Surrogate, aggregate, KL, correction and critic as configured, of one batch of samples."""
    section = config.loss
    if isinstance(section, OnlinePreferenceLoss):
        pairs = make_preference_loss(section.losses, model, mesh, chunk_tokens=section.chunk_tokens)
        return of_samples(pairs, groups=config.rollout.prompts)
    mean = make_aggregate(section, config.answer_tokens)
    has_critic = isinstance(config.advantage, GAEAdvantage)
    loss = partial(
        policy_gradient,
        model,
        surrogate=_surrogate(section),
        aggregate=mean,
        kl=_kl(config.kl) if config.kl.coef > 0 and config.kl.where == "loss" else None,
        correction=None if config.correction is None else _correction(config.correction),
        value_head=_head if has_critic and config.critic.network == "head" else None,
        chunk_tokens=_chunk_tokens(section, mesh),
    )
    if has_critic and config.critic.network == "separate":
        return joined(loss, partial(value.value_loss, separate_values(model), aggregate=mean))
    return loss


def _chunk_tokens(section: PolicyLossSection, mesh: Mesh) -> int:
    """Over all devices that hold rows."""
    each = platform.choices().chunk_tokens if section.chunk_tokens is None else section.chunk_tokens
    return each * math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "seq"))


def _surrogate(section: PolicyLossSection) -> surrogates.SurrogateFn:
    if isinstance(section, CISPOLoss):
        return surrogates.cispo if section.sides == "upper" else surrogates.cispo_two_sided
    return SURROGATES[section.kind]


def make_aggregate(section: PolicyLossSection, max_tokens: int) -> aggregate.Aggregate:
    """Which tokens share a mean."""
    if section.aggregate == "constant_mean":
        return aggregate.constant_mean(section.divisor or max_tokens)
    return {"token_mean": aggregate.token_mean, "sequence_mean": aggregate.sequence_mean}[section.aggregate]


def measure_of(section: PolicyLossSection) -> Callable[[np.ndarray], float]:
    """Loss weights [N, T] -> what the aggregate divides by: tokens, or samples."""
    if section.aggregate == "token_mean":
        return lambda weights: float(np.sum(weights))
    return lambda weights: float(np.sum(np.any(weights != 0, axis=1)))


def _kl(section: KLSection) -> kl.KL:
    make = {"plain": kl.plain, "corrected": kl.corrected}[section.gradient]
    return make(ESTIMATORS[section.estimator or "k3"])


def _correction(section: CorrectionSection) -> correction.Correction:
    level = LEVELS[section.level]
    if isinstance(section, TruncatedCorrection):
        return correction.truncated(level, cap=section.cap)
    return correction.masked(level, low=section.low, high=section.high)


def loss_hyper(config: RLConfig) -> dict[str, float]:
    """The loss's traced scalars."""
    section = config.loss
    hyper: dict[str, float] = {"temperature": config.rollout.temperature}
    if isinstance(section, (PPOLoss, GSPOLoss)):
        hyper |= {"clip_low": section.clip_low, "clip_high": section.clip_high}
        hyper |= {} if section.dual_clip is None else {"dual_clip": section.dual_clip}
    if isinstance(section, SAPOLoss):
        hyper |= {"tau_positive": section.tau_positive, "tau_negative": section.tau_negative}
    if isinstance(section, (CISPOLoss, GMPOLoss)):
        hyper |= {"clip_low": section.clip_low, "clip_high": section.clip_high}
    if isinstance(section, OnlinePreferenceLoss):
        hyper |= preference_hyper(section.losses)
    if config.kl.coef > 0:
        hyper["kl_coef"] = config.kl.coef
    if section.entropy_coef:
        hyper["entropy_coef"] = section.entropy_coef
    if isinstance(config.advantage, GAEAdvantage):
        hyper["value_coef"] = config.critic.coef
        hyper |= {} if config.critic.clip is None else {"value_clip": config.critic.clip}
    return hyper


def _head(params: Params, hidden: Array) -> Array:
    """Values of hidden states [B, T, D], in float32."""
    return heads.score(params["value"], hidden)[..., 0]


def separate_values(model: Model) -> value.ValueFn:
    """The values of a critic that is a network of its own, params["critic"] with params["value"] as its head."""

    def values(params: Params, batch: RolloutBatch) -> Array:
        return _head(params, hidden_states(model, params["critic"], batch))

    return values


def head_values(model: Model, policy_of: Callable[[Params, Params], Params], frozen: Params) -> value.ValueFn:
    """The values of a head on the policy."""
    return lambda params, batch: _head(params, hidden_states(model, policy_of(params, frozen), batch))


def critic_networks(config: RLConfig, pretrained: Pretrained) -> Mapping[str, Network]:
    """What a critic adds to what is trained: a head that starts at 0, and a copy of the policy to put it on."""
    if not isinstance(config.advantage, GAEAdvantage):
        return {}
    networks = {"value": head_network(heads.head_table(pretrained.config.width, bias=True, std=0.0))}
    if config.critic.network == "separate":
        networks["critic"] = Network(pretrained.abstract, axes_tree(pretrained.model.table), pretrained.load)
    return networks


def make_rescore(
    config: RLConfig, model: Model, mesh: Mesh, policy_of: Callable[[Params, Params], Params], needs_old: bool
) -> tuple[RescoreFn, ...]:
    """What must be known of samples before a step: only what the loss or the advantage reads."""
    functions: list[RescoreFn] = []
    hyper_of = lambda hyper: {"temperature": hyper["temperature"]}  # noqa: E731
    chunk_tokens = _chunk_tokens(config.loss, mesh)
    logprobs = partial(rescore.logprobs, model, chunk_tokens=chunk_tokens)
    if config.loss.top_entropy < 1:
        both = partial(rescore.logprobs_and_entropy, model, chunk_tokens=chunk_tokens)
        kept = ("logprobs", "entropy") if needs_old else ("entropy",)

        def uncertainty(params: Params, frozen: Params, batch: RolloutBatch, hyper: Hyper) -> dict[str, Array]:
            said = both(policy_of(params, frozen), batch, hyper_of(hyper))
            return {name: said[name] for name in kept}

        functions.append(uncertainty)
    elif needs_old:
        functions.append(
            lambda params, frozen, batch, hyper: {
                "logprobs": logprobs(policy_of(params, frozen), batch, hyper_of(hyper))
            }
        )
    if reads_reference(config):
        previous = isinstance(config.advantage, SelfPlay)
        functions.append(
            lambda params, frozen, batch, hyper: {
                "reference": logprobs(
                    policy_of(params, frozen) if previous else reference_of(frozen), batch, hyper_of(hyper)
                )
            }
        )
    if isinstance(config.advantage, GAEAdvantage):
        if config.critic.network == "separate":
            of: Any = lambda frozen: separate_values(model)  # noqa: E731
        else:
            of = lambda frozen: head_values(model, policy_of, frozen)  # noqa: E731
        functions.append(lambda params, frozen, batch, hyper: {"values": rescore.values(of(frozen), params, batch)})
    return tuple(functions)


def reads_reference(config: RLConfig) -> bool:
    """Whether a reference's log-probabilities are read: the policy's that the run started from, or with `self_play`
    its own before the step."""
    by_loss = isinstance(config.loss, OnlinePreferenceLoss) and needs_reference(config.loss.losses)
    return config.kl.coef > 0 or by_loss


def keeps_reference(config: RLConfig) -> bool:
    """Whether the policy that the run started from is needed: to be read, or to draw samples."""
    drawn = isinstance(config.rollout.opponent, (ReferenceOpponent, MixtureOpponent))
    return drawn or (reads_reference(config) and not isinstance(config.advantage, SelfPlay))


def reference_of(frozen: Params) -> Params:
    """The policy that the run started from: kept beside, or the base under an adapter, new or as it was loaded."""
    if "start" in frozen:
        return bind(frozen["base"], frozen["start"], frozen["scales"])
    return frozen["reference"] if "reference" in frozen else frozen["base"]
