"""What the values of a preference configuration must satisfy together. Imports no jax."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from jaxpost.config import LoRASection
from jaxpost.config_check import above, at_least, supervised
from jaxpost.config_io import ConfigError
from jaxpost.config_preference import (
    CachedReference,
    LiveReference,
    NoReference,
    PreferenceConfig,
    RefreshedReference,
)
from jaxpost.config_preference_losses import (
    AlphaPOLoss,
    AOTUnpairedLoss,
    APOZeroUnpairedLoss,
    BCOLoss,
    ComparedLoss,
    CPOLoss,
    EXOLoss,
    KTOLoss,
    NLLLoss,
    ORPOLoss,
    PreferenceLossSection,
    SimPOLoss,
    XPOLoss,
)

UNPAIRED = (KTOLoss, BCOLoss, APOZeroUnpairedLoss)
"""They judge single answers."""
EITHER = (AOTUnpairedLoss, NLLLoss)
"""They read single answers, or the answers of pairs."""
REFERENCE_FREE = (ORPOLoss, SimPOLoss, AlphaPOLoss, CPOLoss, NLLLoss, XPOLoss)


def data_kind(losses: Sequence[PreferenceLossSection]) -> Literal["pairs", "unpaired"]:
    """What rows the losses need.

    >>> data_kind((KTOLoss(),)), data_kind((SimPOLoss(), NLLLoss())), data_kind((AOTUnpairedLoss(),))
    ('unpaired', 'pairs', 'unpaired')
    """
    if any(not isinstance(loss, UNPAIRED + EITHER) for loss in losses):
        return "pairs"
    return "unpaired" if any(isinstance(loss, (*UNPAIRED, AOTUnpairedLoss)) for loss in losses) else "pairs"


def needs_reference(losses: Sequence[PreferenceLossSection]) -> bool:
    """Whether some loss reads the reference's log-probabilities."""
    return any(not isinstance(loss, REFERENCE_FREE) for loss in losses)


def needs_mismatched(losses: Sequence[PreferenceLossSection]) -> bool:
    """Whether some loss reads answers to other prompts, for a batch's KL."""
    return any(isinstance(loss, KTOLoss) for loss in losses)


def check_preference(config: PreferenceConfig) -> PreferenceConfig:
    """The configuration itself, if a run could follow it.

    Raises:
      ConfigError: all that cannot be, a line each, with the key and what to do.
    """
    problems = [*loss_problems("losses", config.losses), *_reference(config), *_data(config), *supervised(config)]
    problems += [*at_least("chunk_tokens", config.chunk_tokens, 1)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def loss_problems(key: str, losses: Sequence[PreferenceLossSection], *, opponent: bool = False) -> Iterator[str]:
    """Problems of a list of losses; `opponent`: the reference draws one answer of each pair."""
    if not losses:
        yield f"{key} is empty; say which, such as --{key} '[{{kind: dpo, beta: 0.1}}]'"
    kinds = [loss.kind for loss in losses]
    for kind in dict.fromkeys(kind for kind in kinds if kinds.count(kind) > 1):
        yield f"{key} holds {kind} {kinds.count(kind)} times; each kind may stand once, with a weight"
    unpaired = [loss.kind for loss in losses if isinstance(loss, UNPAIRED)]
    paired = [loss.kind for loss in losses if not isinstance(loss, UNPAIRED + EITHER)]
    if unpaired and paired:
        yield (
            f"{key} mixes {', '.join(unpaired)}, which judges single answers, with {', '.join(paired)}, which "
            "compares two: take one sort (apo_zero and bco_pair are the paired forms of apo_zero_unpaired and bco)"
        )
    for i, loss in enumerate(losses):
        if isinstance(loss, XPOLoss) and not opponent:
            yield (
                f"{key}.{i}: xpo explores with answers that the reference draws, which these are not; leave it out, or "
                "take method rl with --rollout.opponent '{kind: reference}'"
            )
        yield from _loss(f"{key}.{i}", loss)


def _loss(key: str, loss: PreferenceLossSection) -> Iterator[str]:
    yield from at_least(f"{key}.weight", loss.weight, 0)
    for name in ("beta", "tau", "desirable_weight", "undesirable_weight", "odds_weight"):
        yield from above(f"{key}.{name}", getattr(loss, name, None), 0)
    for name in ("gamma", "margin", "nll_coef"):
        yield from at_least(f"{key}.{name}", getattr(loss, name, None), 0)
    smoothing = getattr(loss, "label_smoothing", None)
    if smoothing is not None and not 0 <= smoothing < 0.5:
        yield f"{key}.label_smoothing is {smoothing:g}; the share of wrong labels is at least 0 and below 0.5"
    if isinstance(loss, EXOLoss) and smoothing == 0:
        yield f"{key}.label_smoothing is 0, at which exo's divergence is infinite; the paper's is 0.001"
    if isinstance(loss, BCOLoss) and not 0 < loss.least_prompt_weight <= loss.most_prompt_weight:
        yield (
            f"{key}.least_prompt_weight {loss.least_prompt_weight:g} must be above 0 and at most most_prompt_weight "
            f"{loss.most_prompt_weight:g}"
        )
    if isinstance(loss, ComparedLoss) and loss.divergence != "alpha" and loss.alpha != type(loss)().alpha:
        yield f"{key}.alpha is read with {key}.divergence alpha, which is {loss.divergence}; set it, or leave alpha out"
    if isinstance(loss, BCOLoss) and loss.prompt_weights == "none":
        for name in ("least_prompt_weight", "most_prompt_weight"):
            if getattr(loss, name) != getattr(BCOLoss(), name):
                yield f"{key}.{name} is read with {key}.prompt_weights density_ratio; set that, or leave it out"
    for name in ("ld_alpha", "shift_decay"):
        value = getattr(loss, name, None)
        if value is not None and not 0 <= value <= 1:
            yield f"{key}.{name} is {value:g}; it must be from 0 to 1"


def _reference(config: PreferenceConfig) -> Iterator[str]:
    section, needed = config.reference, needs_reference(config.losses)
    kinds = ", ".join(loss.kind for loss in config.losses)
    if isinstance(section, NoReference):
        if needed:
            yield f"losses ({kinds}) compare with a reference, but reference.kind is none; take cached or live"
        return
    if config.losses and not needed:
        yield f"losses ({kinds}) read no reference; set reference.kind none"
    if isinstance(section, CachedReference):
        yield from at_least("reference.batch_size", section.batch_size, 1)
    if isinstance(section, (CachedReference, LiveReference)) and section.path == "":
        yield "reference.path is empty; name a model, or leave it out for the trained one before its first step"
    if isinstance(section, RefreshedReference):
        yield from at_least("reference.every", section.every, 1)
        if not 0 < section.mix <= 1:
            yield f"reference.mix is {section.mix:g}; the share of the policy is above 0 and at most 1"
        if isinstance(config.adapter, LoRASection) and section.mix < 1:
            yield (
                "reference.mix below 1 would mix the factors of adapters and not their products; set it to 1 (a hard "
                "update with a longer reference.every), or train without adapter.kind lora"
            )


def _data(config: PreferenceConfig) -> Iterator[str]:
    if config.data.mask != DEFAULT_MASK and config.data.mask != "completion":
        yield f"data.mask is {config.data.mask}; only answers are judged, so leave it out"
    if config.data.objectives:
        yield "data.objectives is for reward models of several scores (method: reward); leave it out"
    yield from at_least("data.max_length", config.data.max_length, 2)


DEFAULT_MASK = "assistant"
