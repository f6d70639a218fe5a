"""Preference losses put together: one forward pass, then any number of losses of what each answer sums up to.

A loss is a `Piece`, a function of the batch's `Answers`; several are mixed with weights (DPO + NLL). Both sides of all
pairs go through the model at once, and only answers' tokens through its head. The reference's log-probabilities come
with the batch or from a frozen network.

Pieces that couple rows make the whole a `types.Coupled` loss: `measure` is its `stats`, the pieces its `outer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpost.losses.kl import k3
from jaxpost.losses.policy import hidden_states
from jaxpost.losses.preference.pairs import Answers, AnswerStats, Sides, answers_of, of_pairs, sides
from jaxpost.losses.supervised import next_tokens
from jaxpost.metrics.terms import divide
from jaxpost.ops import platform
from jaxpost.ops.logprobs import TokenStats, token_stats
from jaxpost.types import AnswerBatch, Coupled, Hyper, LossFn, Model, Params, Term, Terms

PairLoss = Callable[[Sides, Hyper], Float[Array, "B P"]]
"""Each pair's loss; every pair counts alike."""
RewardFn = Callable[[AnswerStats, Hyper], Float[Array, "*S"]]
"""The reward that a loss takes the policy for, of each answer; only metrics read it."""
Memory = dict[str, Array]


class Needs(NamedTuple):
    """What a loss reads of answers beside log pi and length; the rest is not computed."""

    reference: bool = True
    shared: bool = False
    likeness: bool = False


class Piece(NamedTuple):
    """One loss of a mixture. Its scalars are those of `hyper` that begin with its name: "dpo/beta" is its "beta"."""

    name: str
    term: Callable[[Answers, Hyper], Term]
    reward: RewardFn
    needs: Needs = Needs()
    paired: bool = True
    """Whether it compares the answers of a group."""
    couples: bool = False
    """Whether an answer's loss depends on other rows."""
    remember: Callable[[Answers, Hyper, Memory], Memory] | None = None
    """(answers, hyper, memory) -> the new memory, without gradient (running means); `term` finds it in its hyper."""
    memory: Memory = {}  # noqa: RUF012
    """Before the first step."""


def each_pair(loss: PairLoss) -> Callable[[Answers, Hyper], Term]:
    """The mean over pairs."""

    def term(answers: Answers, hyper: Hyper) -> Term:
        pairs = sides(answers)
        return Term(loss(pairs, hyper), pairs.weight)

    return term


def preference(
    model: Model,
    *,
    pieces: Sequence[Piece],
    live_reference: bool = False,
    chunk_tokens: int | None = None,
) -> LossFn | Coupled:
    """sum_i hyper["<name_i>/weight"] * the mean of piece i, all of one forward pass over an `AnswerBatch`.

    Args:
      pieces: the losses; each finds its scalars in hyper under "<name>/", its weight (default 1) among them.
      live_reference: the reference's log-probabilities are computed in the step, without gradient, from
        frozen["reference"] or, where there is none, frozen["base"] (the base without its adapter); otherwise the batch
        brings them.
      chunk_tokens: tokens whose logits exist at one time, over all devices; None: one device's, by the platform.

    Returns:
      A `LossFn`, or a `Coupled` one where a piece couples rows. Its terms have the pieces' names. Metrics: see `watch`.

    Raises:
      ValueError: two pieces have one name; when called: the batch lacks reference log-probabilities.
    """
    names = [piece.name for piece in pieces]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a preference objective needs losses, each by a name of its own; got {names}")
    needs = Needs(*(any(flags) for flags in zip(*(piece.needs for piece in pieces), strict=True)))
    stats = partial(measure, model, needs=needs, live_reference=live_reference, chunk_tokens=chunk_tokens)
    outer = partial(combine, pieces)
    memory = {piece.name: dict(piece.memory) for piece in pieces if piece.remember}
    if any(piece.couples for piece in pieces):
        return Coupled(stats, outer, memory)

    def loss(
        params: Params, frozen: Params, batch: AnswerBatch, key: PRNGKeyArray, hyper: Hyper
    ) -> tuple[Terms, Terms]:
        return outer(stats(params, frozen, batch, key, hyper), hyper, memory)[:2]

    return loss


def measure(
    model: Model,
    params: Params,
    frozen: Params,
    batch: AnswerBatch,
    key: PRNGKeyArray,
    hyper: Hyper,
    *,
    needs: Needs = Needs(),  # noqa: B008 - immutable
    live_reference: bool = False,
    chunk_tokens: int | None = None,
) -> Answers:
    """Sums over the tokens of each answer, of the policy and of its reference."""
    targets, weights = next_tokens(batch)
    scan = partial(_token_stats, model, batch=batch, targets=targets, weights=weights, chunk_tokens=chunk_tokens)
    now = scan(params["policy"], with_collision=needs.likeness)
    ref = None
    if needs.reference and live_reference:
        ref = jax.lax.stop_gradient(scan(frozen["reference"] if "reference" in frozen else frozen["base"]).logprob)
    elif needs.reference:
        if batch.ref_logprobs is None:
            raise ValueError("this loss needs the batch's ref_logprobs, which were not computed")
        ref = jnp.roll(batch.ref_logprobs, -1, axis=1)
    kl = None if ref is None else jax.lax.stop_gradient(k3(jnp.where(weights != 0, now.logprob - ref, 0.0)))
    likeness = None if now.collision is None else jax.lax.stop_gradient(now.logprob - now.collision)
    return answers_of(batch, weights, now.logprob, ref, likeness=likeness, kl=kl, shared=needs.shared)


def _token_stats(
    model: Model,
    policy: Params,
    *,
    batch: AnswerBatch,
    targets: Array,
    weights: Array,
    chunk_tokens: int | None,
    with_collision: bool = False,
) -> TokenStats:
    chunk_tokens = platform.choices().chunk_tokens if chunk_tokens is None else chunk_tokens
    hidden = hidden_states(model, policy, batch)
    how: dict[str, Any] = {"chunk_tokens": chunk_tokens, "with_collision": with_collision, "weights": weights}
    return token_stats(model.unembed, policy, hidden, targets, **how)


def combine(
    pieces: Sequence[Piece], answers: Answers, hyper: Hyper, memory: dict[str, Memory]
) -> tuple[Terms, Terms, dict[str, Memory]]:
    """All pieces' terms and the metrics, of the answers of a whole batch or, where nothing couples rows, of a part."""
    terms: Terms = {}
    new: dict[str, Memory] = {}
    for piece in pieces:
        own = _own(hyper, piece)
        if piece.remember is not None:
            new[piece.name] = piece.remember(answers, own, memory[piece.name])
            own |= new[piece.name]
        term = piece.term(answers, own)
        terms[piece.name] = term._replace(coef=term.coef * own.get("weight", 1.0))
    rewards = pieces[0].reward(answers.stats, _own(hyper, pieces[0]))
    return terms, watch(answers, rewards, paired=any(p.paired for p in pieces)), new


def _own(hyper: Hyper, piece: Piece) -> dict[str, Any]:
    """The piece's scalars, by their short names."""
    head = f"{piece.name}/"
    return {name.removeprefix(head): x for name, x in hyper.items() if name.startswith(head)}


def watch(answers: Answers, rewards: Float[Array, "B S"], *, paired: bool) -> Terms:
    """What users look for, without gradient.

    Means over the answers of each side: "rewards/chosen", "rewards/rejected" (what the first loss takes the policy
    for), "logprobs/chosen", "logprobs/rejected" (log pi of whole answers, nats), "tokens/chosen", "tokens/rejected".
    Over pairs: "rewards/margin", and "rewards/accuracy", the share of pairs with a positive margin (a margin of 0
    counts half). With a reference "logratios/chosen", "logratios/rejected" (log pi / pi_ref of whole answers) and "kl",
    per token: k3 of the log ratios, an estimate of the distance only as far as the answers are the policy's own.
    """
    stats = jax.lax.stop_gradient(answers.stats)
    rewards = jax.lax.stop_gradient(rewards)
    valid, pairs = answers.valid, sides(answers._replace(stats=stats))
    metrics: Terms = {}
    for name, side in (("chosen", valid & (answers.ranks == 0)), ("rejected", valid & (answers.ranks > 0))):
        weight = side.astype(jnp.float32)
        metrics[f"rewards/{name}"] = Term(rewards, weight)
        metrics[f"logprobs/{name}"] = Term(stats.logprob, weight)
        metrics[f"tokens/{name}"] = Term(stats.length, weight)
        if stats.ref_logprob is not None:
            metrics[f"logratios/{name}"] = Term(stats.logprob - stats.ref_logprob, weight)
    if paired:
        chosen, rejected = of_pairs(rewards, answers)
        metrics["rewards/margin"] = Term(chosen - rejected, pairs.weight)
        metrics["rewards/accuracy"] = Term(0.5 * (1.0 + jnp.sign(chosen - rejected)), pairs.weight)
    if stats.kl is not None:
        weight = jnp.where(valid, stats.length, 0.0)
        metrics["kl"] = Term(divide(stats.kl, stats.length), weight)
    return metrics
