"""Preference-loss sections -> one loss function and its traced scalars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial

from jax.sharding import Mesh

from jaxpost.assemble.training import chunk_tokens_of
from jaxpost.config_preference_losses import ComparedLoss, PreferenceLossSection
from jaxpost.losses.preference import divergences, reference_free, referenced, shapes, transport, unpaired
from jaxpost.losses.preference.objective import Needs, Piece, each_pair, preference
from jaxpost.types import Coupled, LossFn, Model

DIVERGENCES = {
    "reverse_kl": divergences.reverse_kl,
    "forward_kl": divergences.forward_kl,
    "jensen_shannon": divergences.jensen_shannon,
    "alpha": divergences.alpha_divergence,
}
FREE = Needs(reference=False)


def _pair(loss: Callable, reward: Callable = shapes.implicit_reward, needs: Needs = Needs()) -> Callable:  # noqa: B008
    def piece(section: PreferenceLossSection) -> Piece:
        chosen = {"divergence": DIVERGENCES[section.divergence]} if isinstance(section, ComparedLoss) else {}
        return Piece(section.kind, each_pair(partial(loss, **chosen)), reward, needs)

    return piece


def _batch(loss: Callable, *, paired: bool = False) -> Callable:
    return lambda section: Piece(section.kind, loss, shapes.implicit_reward, paired=paired, couples=True)


PIECES: dict[str, Callable[..., Piece]] = {
    "dpo": _pair(referenced.dpo),
    "dpo_norm": _pair(referenced.dpo_norm, shapes.implicit_reward_per_token),
    "ld_dpo": _pair(referenced.ld_dpo, referenced.desensitised_reward, Needs(shared=True)),
    "wpo": _pair(referenced.wpo, needs=Needs(likeness=True)),
    "robust": _pair(referenced.robust),
    "hinge": _pair(referenced.hinge),
    "ipo": _pair(referenced.ipo, shapes.implicit_reward_per_token),
    "ipo_sum": _pair(referenced.ipo_sum),
    "exo": _pair(referenced.exo),
    "nca": _pair(referenced.nca),
    "bco_pair": _pair(referenced.bco_pair),
    "sppo": _pair(referenced.sppo),
    "apo_zero": _pair(referenced.apo_zero),
    "apo_down": _pair(referenced.apo_down),
    "discopop": _pair(referenced.discopop),
    "aot": _batch(transport.aot, paired=True),
    "aot_unpaired": _batch(transport.aot_unpaired),
    "kto": _batch(unpaired.kto),
    "bco": lambda section: Piece(
        section.kind,
        unpaired.bco,
        shapes.implicit_reward,
        paired=False,
        couples=True,
        remember=unpaired.remember_shift,
        memory=unpaired.no_shift(),
    ),
    "apo_zero_unpaired": lambda section: Piece(
        section.kind, unpaired.apo_zero_unpaired, shapes.implicit_reward, paired=False
    ),
    "orpo": _pair(reference_free.orpo, shapes.likelihood_per_token, FREE),
    "simpo": _pair(reference_free.simpo, shapes.likelihood_per_token, FREE),
    "alphapo": _pair(reference_free.alphapo, reference_free.power_likelihood, FREE),
    "cpo": _pair(reference_free.cpo, shapes.likelihood, FREE),
    "nll": lambda section: Piece(
        section.kind,
        partial(reference_free.nll, mean=section.mean),
        shapes.likelihood_per_token,
        FREE,
        paired=False,
    ),
    "xpo": lambda section: Piece(section.kind, reference_free.xpo, shapes.likelihood, FREE),
}


def make_preference_loss(
    sections: Sequence[PreferenceLossSection],
    model: Model,
    mesh: Mesh | None = None,
    *,
    live_reference: bool = False,
    chunk_tokens: int | None = None,
) -> LossFn | Coupled:
    """The mixture of losses that sections name; see `losses.preference.objective.preference`.

    Args:
      live_reference: compute the reference's log-probabilities in the step; else batches bring them, if it is needed.
      chunk_tokens: per device; None: by the platform.

    Raises:
      ValueError: no section, or two of one kind.
    """
    pieces = [PIECES[section.kind](section) for section in sections]
    return preference(
        model, pieces=pieces, live_reference=live_reference, chunk_tokens=chunk_tokens_of(chunk_tokens, mesh)
    )


def preference_hyper(sections: Sequence[PreferenceLossSection]) -> dict[str, float]:
    """The traced scalars of the losses: every number of every section, under "<kind>/<name>".

    Example:
      >>> from jaxpost.config_preference_losses import NLLLoss
      >>> preference_hyper([NLLLoss(weight=0.2)])
      {'nll/weight': 0.2}
    """
    return {
        f"{section.kind}/{field.name}": value
        for section in sections
        for field in fields(section)
        if isinstance(value := getattr(section, field.name), int | float)
    }


def reads_reference(sections: Sequence[PreferenceLossSection]) -> bool:
    """Whether any of the losses reads a reference's log-probabilities."""
    return any(PIECES[section.kind](section).needs.reference for section in sections)


def reads_mismatched(sections: Sequence[PreferenceLossSection]) -> bool:
    """Whether any of the losses reads answers to other prompts (KTO's baseline)."""
    return any(section.kind == "kto" for section in sections)
