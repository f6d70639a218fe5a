"""Policy gradients: what to differentiate on the policy's own samples.

`policy_gradient` runs the model, takes each token's loss from a surrogate (`losses.surrogates`) and adds what is common
to all: which tokens share a mean (`losses.aggregate`), a KL term (`losses.kl`), an entropy bonus, a correction between
sampler and learner (`losses.correction`), the metrics.

Methods are combinations: GRPO is `ppo` with group advantages, `sequence_mean` and `plain(k3)`; Dr.GRPO has
`constant_mean`, undivided advantages and no KL; DAPO `token_mean` and clip_high above clip_low (clip-higher); LUSPO
(2602.05261) is `gspo` with `constant_mean(1)`, so that a sample counts by its length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxpost.losses.aggregate import Aggregate, token_mean
from jaxpost.losses.correction import Correction
from jaxpost.losses.kl import KL, k3
from jaxpost.losses.supervised import next_tokens
from jaxpost.losses.surrogates import PER_TOKEN, Surrogate, SurrogateFn, Tokens, ppo, ratio
from jaxpost.losses.value import value_loss
from jaxpost.ops import platform
from jaxpost.ops.logprobs import TokenStats, Unembed, stats_of_logits, token_stats, weighted_sum
from jaxpost.types import AnswerBatch, Hyper, Inputs, LossFn, Model, Params, RolloutBatch, Term, Terms

ValueHead = Callable[[Params, Float[Array, "B T D"]], Float[Array, "B T"]]
"""(all params, hidden states) -> the value after reading the tokens up to and including each position."""


def policy_gradient(
    model: Model,
    params: Params,
    frozen: Params,
    batch: RolloutBatch,
    key: PRNGKeyArray,
    hyper: Hyper,
    *,
    surrogate: SurrogateFn = ppo,
    aggregate: Aggregate = token_mean,
    kl: KL | None = None,
    correction: Correction | None = None,
    value_head: ValueHead | None = None,
    watch_entropy: bool = True,
    chunk_tokens: int | None = None,
) -> tuple[Terms, Terms]:
    """surrogate * importance weight + kl_coef KL - entropy_coef H, each the aggregate's mean over the batch.

    Args:
      params: {"policy": the model's parameters}.
      hyper: the surrogate's; "kl_coef" with a KL term; "entropy_coef" turns the entropy bonus on; "temperature" T
        makes the policy softmax(logits / T), as it has to be where the samples were drawn with T (default 1).
      surrogate, aggregate: one of `losses.surrogates`; which tokens share a mean.
      kl: penalty on the distance from `batch.ref_logprobs`.
      correction: importance weights of the surrogate, between `batch.sampler_logprobs` and the old policy.
      value_head: the critic as a head on the policy's hidden states; adds the term and metrics of `losses.value`.
      watch_entropy: report the entropy though there is no bonus.
      chunk_tokens: tokens whose logits exist at one time, over all devices; None: one device's, by the platform.
    Returns:
      Terms "policy", "kl_penalty" and "entropy_bonus", where asked for; `_watch`'s metrics, and "entropy" in nats.
    Raises:
      ValueError: the batch lacks log-probabilities that the KL or the correction needs.
    """
    targets, weights = next_tokens(batch)
    hidden, segments = hidden_states(model, params["policy"], batch), batch.segment_ids
    bonus = "entropy_coef" in hyper
    advantages, old, ref, sampler = _following(batch, weights)
    given = {"advantages": advantages, "weights": weights, "segments": segments}
    corrected = partial(_corrected, correction, sampler, weights, segments)
    read = _Reading(model, params["policy"], hidden, targets, hyper, given, old, corrected)
    # Where a token's loss is its own and nothing else is differentiated, the head's gradient needs no second pass.
    alone = surrogate in PER_TOKEN and kl is None and not bonus and (old is not None or correction is None)
    how: dict[str, Any] = {"with_entropy": watch_entropy or bonus, "chunk_tokens": chunk_tokens}
    found = (_summed if alone else _stored)(read, surrogate, aggregate, **how)
    term, logprobs, entropy, loss, old, factor = found
    terms, still = {"policy": term}, jax.lax.stop_gradient(logprobs)
    metrics = _watch(still, old, ref, sampler, factor, loss, weights)
    if kl is not None:
        penalty = aggregate(kl(logprobs, _needed(ref, "ref_logprobs"), old), weights, segments)
        terms["kl_penalty"] = penalty._replace(coef=hyper["kl_coef"])
    metrics |= {} if entropy is None else {"entropy": Term(entropy, weights)}
    if bonus and entropy is not None:
        terms["entropy_bonus"] = aggregate(entropy, weights, segments)._replace(coef=-hyper["entropy_coef"])
    if value_head is None:
        return terms, metrics
    more = value_loss(lambda *_: value_head(params, hidden), params, frozen, batch, key, hyper, aggregate=aggregate)
    return terms | more[0], metrics | more[1]


def _following(batch: RolloutBatch, weights: Array) -> tuple[Array, Array | None, Array | None, Array | None]:
    """Advantages, and the old policy's, the reference's and the sampler's log-probabilities, of the next token."""
    following = lambda x: jnp.where(weights != 0, jnp.roll(x, -1, axis=1), 0.0)  # noqa: E731
    known = (batch.old_logprobs, batch.ref_logprobs, batch.sampler_logprobs)
    old, ref, sampler = (None if x is None else following(x) for x in known)
    return following(batch.advantages), old, ref, sampler


def _corrected(
    correction: Correction | None, sampler: Array | None, weights: Array, segments: Array, old: Array
) -> Array | None:
    """Importance weights between sampler and old policy, None without a correction."""
    if correction is None:
        return None
    return jax.lax.stop_gradient(correction(old - _needed(sampler, "sampler_logprobs"), weights, segments))


class _Reading(NamedTuple):
    """What the policy's term is made from."""

    model: Model
    policy: Params
    hidden: Float[Array, "B T D"]
    targets: Int[Array, "B T"]
    hyper: Hyper
    given: dict[str, Array]
    """Of every token: what the surrogate reads beside log-probabilities."""
    old: Float[Array, "B T"] | None
    """None: the policy that is trained."""
    corrected: Callable[[Array], Array | None]
    """The old policy's log-probabilities -> importance weights, None without a correction."""


class _Found(NamedTuple):
    """The policy's term, and what it says of every token."""

    term: Term
    logprobs: Float[Array, "B T"]
    entropy: Float[Array, "B T"] | None
    loss: Surrogate
    old: Float[Array, "B T"]
    factor: Float[Array, "B T"] | None


def _summed(
    read: _Reading, surrogate: SurrogateFn, aggregate: Aggregate, *, with_entropy: bool, chunk_tokens: int | None
) -> _Found:
    """The policy's term in one element; log pi, entropy and surrogate of every token without gradient."""
    # A mean is linear: what it makes of ones multiplies every token's own loss.
    weights, hyper = read.given["weights"], read.hyper
    mean = aggregate(jnp.ones_like(weights), weights, read.given["segments"])
    factor = None if read.old is None else read.corrected(read.old)
    times = mean.value if factor is None else factor * mean.value

    def per_token(logits: Array, each: tuple[Array, Array, Array | None, dict[str, Array]]) -> tuple[Array, Any]:
        targets, times, old, given = each
        stats = stats_of_logits(logits, targets, with_entropy=with_entropy)
        old = jax.lax.stop_gradient(stats.logprob) if old is None else old
        loss = surrogate(Tokens(stats.logprob, old, **given), hyper)
        return times * loss.value, (stats.logprob, stats.entropy, loss)

    unembed, tree = _head(read.model, read.policy, hyper)
    each, chunk_tokens = (read.targets, times, read.old, read.given), _chunk(chunk_tokens)
    total, aux = weighted_sum(unembed, tree, read.hidden, mean.weight, each, per_token, chunk_tokens=chunk_tokens)
    weight = jnp.sum(mean.weight)
    aux = jax.tree.map(lambda x: jnp.where(weights != 0, x, jnp.zeros((), x.dtype)), aux)
    logprobs, entropy, loss = jax.lax.stop_gradient(aux)
    term = Term(total / jnp.where(weight == 0, 1.0, weight), weight)
    return _Found(term, logprobs, entropy, loss, logprobs if read.old is None else read.old, factor)


def _stored(
    read: _Reading, surrogate: SurrogateFn, aggregate: Aggregate, *, with_entropy: bool, chunk_tokens: int | None
) -> _Found:
    """The policy's term by token; log pi and entropy with gradient."""
    weights = read.given["weights"]
    how: dict[str, Any] = {"weights": weights, "with_entropy": with_entropy, "chunk_tokens": chunk_tokens}
    stats = stats_of(read.model, read.policy, read.hidden, read.targets, read.hyper, **how)
    logprobs = jnp.where(weights != 0, stats.logprob, 0.0)
    old = jax.lax.stop_gradient(logprobs) if read.old is None else read.old
    loss, factor = surrogate(Tokens(logprobs, old, **read.given), read.hyper), read.corrected(old)
    value = loss.value if factor is None else factor * loss.value
    return _Found(aggregate(value, weights, read.given["segments"]), logprobs, stats.entropy, loss, old, factor)


def _needed(x: Array | None, name: str) -> Array:
    if x is None:
        raise ValueError(f"this loss needs the batch's {name}, which were not computed")
    return x


def hidden_states(model: Model, policy: Params, batch: RolloutBatch | AnswerBatch) -> Float[Array, "B T D"]:
    """The model's final hidden states over a batch of answers."""
    return model.forward(policy, Inputs(batch.tokens, batch.positions, batch.segment_ids, batch.prefix_ids)).hidden


def stats_of(
    model: Model,
    policy: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    hyper: Hyper,
    *,
    weights: Float[Array, "B T"],
    with_entropy: bool,
    chunk_tokens: int | None,
) -> TokenStats:
    """log pi of every target, and the entropy, of softmax(logits / T); 0 where the weight is 0."""
    unembed, tree = _head(model, policy, hyper)
    how: dict[str, Any] = {"chunk_tokens": _chunk(chunk_tokens), "with_entropy": with_entropy, "weights": weights}
    return token_stats(unembed, tree, hidden, targets, **how)


def _chunk(chunk_tokens: int | None) -> int:
    return platform.choices().chunk_tokens if chunk_tokens is None else chunk_tokens


def _head(model: Model, policy: Params, hyper: Hyper) -> tuple[Unembed, Any]:
    """The head of softmax(logits / T), and what it reads."""
    if "temperature" not in hyper:
        return model.unembed, policy
    # The temperature travels with the parameters: the chunked head must see every array that it reads.
    return lambda p, h: model.unembed(p[0], h) / p[1], (policy, jnp.asarray(hyper["temperature"]))


def _watch(
    now: Array,
    old: Array,
    ref: Array | None,
    sampler: Array | None,
    factor: Array | None,
    loss: Surrogate,
    weights: Array,
) -> Terms:
    """Means over tokens, without gradient.

    "ratio" rho and "ratio_squared" (`correction.effective_sample_size` takes both); "old_kl" rho - 1 - log rho;
    "clip_low", "clip_high" and "clip_fraction", where the ratio was held; "kl" from the reference (k3);
    "sampler_gap" |log pi_old - log mu|; "sampler_weight" and "sampler_weight_squared" of a correction.
    """
    rho = ratio(now - old)
    values = {"ratio": rho, "ratio_squared": rho**2, "old_kl": k3(old - now)}
    held = {"clip_low": loss.low, "clip_high": loss.high, "clip_fraction": loss.low | loss.high}
    values |= {name: x.astype(jnp.float32) for name, x in held.items()}
    if ref is not None:
        values["kl"] = k3(now - ref)
    if sampler is not None:
        values["sampler_gap"] = jnp.abs(old - sampler)
    if factor is not None:
        values |= {"sampler_weight": factor, "sampler_weight_squared": factor**2}
    return {name: Term(jax.lax.stop_gradient(x), weights) for name, x in values.items()}


def joined(*losses: LossFn) -> LossFn:
    """The sum of several losses on one batch: a policy's and its critic's, trained in one step.

    Raises:
      ValueError: two of them have a term or a metric of the same name.
    """

    def loss(params: Params, frozen: Params, batch: Any, key: PRNGKeyArray, hyper: Hyper) -> tuple[Terms, Terms]:
        terms: Terms = {}
        metrics: Terms = {}
        for one in losses:
            for out, new in zip((terms, metrics), one(params, frozen, batch, key, hyper), strict=True):
                if clash := out.keys() & new.keys():
                    raise ValueError(f"two of the joined losses report {sorted(clash)}")
                out |= new
        return terms, metrics

    return loss
