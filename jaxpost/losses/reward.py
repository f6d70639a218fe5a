"""Losses of reward models: what a score should say of an answer, of an order of answers, or of a step.

A head reads scores off the model's hidden states (`models.heads`); r_i is answer i's, read after its last token. With
s the sigmoid, e the label smoothing and a group's answers ordered by rank:

| objective | loss | source |
|---|---|---|
| `bradley_terry` | -(1-e) log s(d) - e log s(-d) of each ordered pair, d = r_i - r_j - m g | 1909.08593 |
| `plackett_luce` | -log P(order), each place exp(r) / sum of exp(r) of those not yet placed; ties exact | |
| `squared_error` | (r - y)^2, of every objective whose label is known | 2311.09528 |
| `binary_cross_entropy` | -y log s(r) - (1 - y) log s(-r), y in [0, 1]: outcomes (2110.14168), steps (2305.20050) | |

g is the batch's strength of a group's order and m a factor: a margin by grade (2307.09288). The centring term
(r_i + r_j)^2 keeps scores near 0 (2312.09244). An ensemble's loss is the mean over its members' losses.

`ranking_loss` reads one score an answer, `label_loss` one wherever the batch has a mark. Every mean is a `Term` whose
weights come from the batch: a group counts 1 however many pairs it has, a mark its weight.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxpost.types import AnswerBatch, Hyper, Inputs, Model, Params, Term, Terms

Head = Callable[[Params, Float[Array, "*B D"]], Float[Array, "*B K"]]
"""(all params, hidden states) -> scores."""
RankObjective = Callable[[Float[Array, "B S"], AnswerBatch, Bool[Array, "B S"], Hyper], Term]
"""(one member's score of every answer, batch, which answers count, hyper) -> the loss of every group or pair."""
LabelObjective = Callable[[Float[Array, "B T M"], Float[Array, "B T M"], Hyper], Float[Array, "B T M"]]
"""(one member's scores, labels, hyper) -> losses."""


def hidden_of(model: Model, params: Params, batch: AnswerBatch) -> Float[Array, "B T D"]:
    """The model's final hidden states over a batch of answers."""
    inputs = Inputs(batch.tokens, batch.positions, batch.segment_ids, batch.prefix_ids)
    return model.forward(params["policy"], inputs).hidden


def last_tokens(batch: AnswerBatch) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Where each segment's score is read: its last mark, or its last token with weight; and which segments count.

    Example:
      >>> row = lambda *x: jnp.array([x])
      >>> batch = AnswerBatch(row(5, 6, 7, 8), row(0, 1, 0, 1), row(1, 1, 2, 2), row(0.0, 1.0, 1.0, 0.0), row(0)[0],
      ...                     row(1, 1), row(0, 1), row(1.0, 1.0))
      >>> [x.tolist() for x in last_tokens(batch)]
      [[[1, 2]], [[True, True]]]
    """
    on = (batch.weights if batch.marks is None else batch.marks) > 0
    ids = jnp.arange(1, batch.groups.shape[1] + 1)
    places = jnp.where(on, jnp.arange(on.shape[1]), -1)
    inside = batch.segment_ids[:, None, :] == ids[None, :, None]
    at = jnp.max(jnp.where(inside, places[:, None, :], -1), axis=-1)
    return jnp.maximum(at, 0), (at >= 0) & (batch.groups > 0)


def pair_weights(batch: AnswerBatch, present: Bool[Array, "B S"]) -> Float[Array, "B S S"]:
    """Weight of "answer i is better than answer j": pairs of a group whose ranks differ share 1 between them.

    Ranks of -1 (answers to other prompts) take part in no pair.
    """
    ranks = batch.ranks
    here = present & (ranks >= 0)
    same = (batch.groups[:, :, None] == batch.groups[:, None, :]) & here[:, :, None] & here[:, None, :]
    better = (same & (ranks[:, :, None] < ranks[:, None, :])).astype(jnp.float32)
    each = jnp.einsum("bij,bjk->bi", same.astype(jnp.float32), better)
    return better / jnp.maximum(each, 1.0)[:, :, None]


def bradley_terry(scores: Float[Array, "B S"], batch: AnswerBatch, present: Bool[Array, "B S"], hyper: Hyper) -> Term:
    """-(1-e) log s(d) - e log s(-d) of every pair, d = r_i - r_j - margin * strength (1909.08593, 2307.09288).

    Args:
      hyper: "margin", default 0; "label_smoothing" e, default 0 (0.5 would say nothing).
    """
    margin, smoothing = hyper.get("margin", 0.0), hyper.get("label_smoothing", 0.0)
    gap = scores[:, :, None] - scores[:, None, :] - margin * batch.strengths[:, :, None]
    value = (1.0 - smoothing) * jax.nn.softplus(-gap) + smoothing * jax.nn.softplus(gap)
    return Term(value, pair_weights(batch, present))


_LEFT, _RIGHT, _POINTS = -20.0, 5.0, 64
"""Range of the integration variable, and its points. The integrand is analytic and falls off doubly exponentially on
the right and as e^x on the left, so that the trapezoid rule's error is below 1e-8."""


def plackett_luce(scores: Float[Array, "B S"], batch: AnswerBatch, present: Bool[Array, "B S"], hyper: Hyper) -> Term:
    """-log P(order) of every group: places are filled one by one, each with probability exp(r) / sum of those left.

    A tie is an unknown order: P sums over all orders of the tied answers. With w = exp(r), tied answers A and all that
    rank below them B, they all come first with probability

      P(A before B) = integral_0^inf W_B exp(-W_B t) prod_{i in A} (1 - exp(-w_i t)) dt,   W_B = sum_{j in B} w_j

    (the exponential race: the winner is the smallest of independent exponentials with rates w). A pair's loss is
    Bradley-Terry's.
    """
    ranks, groups = batch.ranks, batch.groups
    here = present & (ranks >= 0)
    same = (groups[:, :, None] == groups[:, None, :]) & here[:, :, None] & here[:, None, :]
    below = same & (ranks[:, None, :] > ranks[:, :, None])
    tied = same & (ranks[:, None, :] == ranks[:, :, None])
    left = jnp.any(below, axis=-1)
    rest = jnp.where(left, _masked_logsumexp(scores[:, None, :], below), 0.0)
    alone = -jax.nn.softplus(rest - scores)
    count = lambda mask: jnp.maximum(jnp.sum(mask.astype(jnp.float32), axis=-1), 1.0)  # noqa: E731
    logp = jnp.where(count(tied) > 1, _all_before(scores, rest, tied), alone)
    place = jnp.where(left, logp, 0.0) / count(tied)  # each of n tied answers carries 1/n of their place
    total = jnp.einsum("bij,bj->bi", same.astype(jnp.float32), -place)
    ordered = jnp.any(same & (ranks[:, None, :] != ranks[:, :, None]), axis=-1)
    return Term(total, ordered.astype(jnp.float32) / count(same))


def _masked_logsumexp(x: Array, mask: Array) -> Array:
    top = jnp.max(jnp.where(mask, x, -jnp.inf), axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(jnp.where(mask, jnp.exp(jnp.where(mask, x - top, 0.0)), 0.0), axis=-1)
    return jnp.log(jnp.where(total > 0, total, 1.0)) + top[..., 0]


def _all_before(scores: Float[Array, "B S"], rest: Float[Array, "B S"], tied: Bool[Array, "B S S"]) -> Array:
    """log P(all tied before the rest): the integral over x = log(t W_B), by the trapezoid rule."""
    x = jnp.linspace(_LEFT, _RIGHT, _POINTS, dtype=jnp.float32)
    rate = scores[:, None, :] - rest[:, :, None]  # log w_j / W_B for every answer j tied with i
    exponent = jnp.exp(jnp.clip(rate[..., None] + x, -80.0, 80.0))
    finished = jnp.where(tied[..., None], jnp.log(-jnp.expm1(-exponent)), 0.0)
    weight = x - jnp.exp(x) + jnp.log(x[1] - x[0])
    return jax.scipy.special.logsumexp(weight + jnp.sum(finished, axis=2), axis=-1)


def ranking_loss(
    model: Model,
    head: Head,
    params: Params,
    frozen: Params,
    batch: AnswerBatch,
    key: PRNGKeyArray,
    hyper: Hyper,
    *,
    objective: RankObjective = bradley_terry,
    name: str = "bradley_terry",
    centred: bool = False,
    keep: bool = False,
) -> tuple[Terms, Terms]:
    """A loss on the order of the answers of each group, the mean over the head's outputs as members of an ensemble.

    Args:
      params: {"policy": the model's, and what the head reads}.
      hyper: the objective's; "centre", the weight of (r_i + r_j)^2.
      name: of the objective's term.
      centred: add the centring term (2312.09244).
      keep: add the metric OUTPUTS, what the head says of every answer, [B S K], not to be reduced.

    Returns:
      The term `name` and, where asked for, "centre". Metrics, means over pairs: "rewards/chosen", "rewards/rejected",
      "rewards/margin", "rewards/accuracy" (a tie counts half); of several members also "uncertainty", the deviation
      of their r_i - r_j.

    Example:
      >>> from jaxpost.types import Outputs
      >>> model = Model(None, (), None, lambda p, x: Outputs(x.tokens[..., None].astype(jnp.float32)), None, None)
      >>> row = lambda *x: jnp.array([x])
      >>> batch = AnswerBatch(row(3, 1), row(0, 0), row(1, 2), row(1.0, 1.0), row(0)[0], row(1, 1), row(0, 1),
      ...                     row(1.0, 1.0))
      >>> terms, metrics = ranking_loss(model, lambda p, h: h, {"policy": ()}, {}, batch, jax.random.key(0), {})
      >>> pair = float(terms["bradley_terry"].value[0, 0, 1])  # log(1 + exp(-(3 - 1)))
      >>> round(pair, 4), float(metrics["rewards/margin"].value[0, 0, 1])
      (0.1269, 2.0)
    """
    at, present = last_tokens(batch)
    hidden = jnp.take_along_axis(hidden_of(model, params, batch), at[:, :, None], axis=1)
    outputs = head(params, hidden)
    scores = jnp.moveaxis(outputs, -1, 0)
    each = jax.vmap(lambda r: objective(r, batch, present, hyper))(scores)
    terms = {name: Term(jnp.mean(each.value, axis=0), each.weight[0])}
    weights = pair_weights(batch, present)
    if centred:
        sums = (scores[:, :, :, None] + scores[:, :, None, :]) ** 2
        terms["centre"] = Term(jnp.mean(sums, axis=0), weights, hyper["centre"])
    gaps = scores[:, :, :, None] - scores[:, :, None, :]
    mean, gap = jnp.mean(scores, axis=0), jnp.mean(gaps, axis=0)
    watched = {
        "rewards/chosen": jnp.broadcast_to(mean[:, :, None], gap.shape),
        "rewards/rejected": jnp.broadcast_to(mean[:, None, :], gap.shape),
        "rewards/margin": gap,
        "rewards/accuracy": 0.5 + 0.5 * jnp.sign(gap),
    }
    if scores.shape[0] > 1:
        watched["uncertainty"] = jnp.std(gaps, axis=0)
    metrics = {name: Term(jax.lax.stop_gradient(x), weights) for name, x in watched.items()}
    return terms, metrics | (_kept(outputs) if keep else {})


OUTPUTS = "outputs"
"""Metric of an evaluation that judges the scores themselves."""


def _kept(outputs: Array) -> Terms:
    return {OUTPUTS: Term(jax.lax.stop_gradient(outputs), jnp.ones(()))}


def squared_error(scores: Float[Array, "B T M"], labels: Float[Array, "B T M"], hyper: Hyper) -> Float[Array, "B T M"]:
    """(r - y)^2: regression on grades (2311.09528 for several attributes)."""
    return (scores - labels) ** 2


def binary_cross_entropy(
    scores: Float[Array, "B T M"], labels: Float[Array, "B T M"], hyper: Hyper
) -> Float[Array, "B T M"]:
    """-y log s(r) - (1 - y) log s(-r); y is a class, or a probability from rollouts (2312.08935).

    Args:
      hyper: "label_smoothing" e draws y towards 1/2: (1 - e) y + e / 2.

    Example:
      >>> one = lambda x: jnp.full((1, 1, 1), x)
      >>> round(float(binary_cross_entropy(one(0.0), one(1.0), {})[0, 0, 0]), 4)  # log 2
      0.6931
    """
    smoothing = hyper.get("label_smoothing", 0.0)
    target = (1.0 - smoothing) * labels + 0.5 * smoothing
    return jax.nn.softplus(scores) - target * scores


def every_token(batch: AnswerBatch) -> tuple[Float[Array, "B T"], Float[Array, "B T *M"]]:
    """Marks and labels for a score after every token of an answer: its label everywhere, its weight shared out.

    A verifier trained so on outcomes learns a value at every token beside the one that is read (2110.14168).
    """
    if batch.marks is None or batch.labels is None:
        raise ValueError("this loss needs the batch's marks and labels")
    at, present = last_tokens(batch)
    table = lambda x: jnp.take_along_axis(x, at, axis=1)  # noqa: E731
    here = jnp.clip(batch.segment_ids - 1, 0, batch.groups.shape[1] - 1)
    spread = lambda x: jnp.take_along_axis(jnp.where(present, x, 0.0), here, axis=1)  # noqa: E731
    on = ((batch.weights > 0) & (batch.segment_ids > 0)).astype(jnp.float32)
    ids = jnp.arange(1, batch.groups.shape[1] + 1)
    length = jnp.einsum("bst,bt->bs", (batch.segment_ids[:, None, :] == ids[None, :, None]).astype(jnp.float32), on)
    marks = on * spread(table(batch.marks) / jnp.maximum(length, 1.0))
    if batch.labels.ndim == 2:
        return marks, spread(table(batch.labels))
    each = [spread(table(batch.labels[..., m])) for m in range(batch.labels.shape[-1])]
    return marks, jnp.stack(each, axis=-1)


def label_loss(
    model: Model,
    head: Head,
    params: Params,
    frozen: Params,
    batch: AnswerBatch,
    key: PRNGKeyArray,
    hyper: Hyper,
    *,
    objective: LabelObjective = binary_cross_entropy,
    name: str = "classification",
    members: int = 1,
    classes: int = 1,
    at: str = "marks",
    keep: bool = False,
) -> tuple[Terms, Terms]:
    """A loss on the scores read after marked tokens: of answers (ORM, regression) or of steps (PRM).

    Args:
      members: N; the head's N M outputs are N members' scores of M objectives (times `classes`).
      classes: 2 reads the difference of two outputs, the second the right one, as a two-class head has it.
      at: "marks", or "tokens": after every token of an answer (`every_token`).
      keep: add the metric OUTPUTS, what the head says after every token, [B T K], not to be reduced.

    Returns:
      The term `name`. Metrics, means over marks: "score", "label", "error" |p - y| with p the score (of
      classification its sigmoid), "accuracy" of classification alone (p and y on one side of 1/2), and of several
      members "uncertainty", the deviation of p.

    Raises:
      ValueError: the batch lacks marks or labels, or has other objectives than the head.
    """
    if batch.marks is None or batch.labels is None:
        raise ValueError("this loss needs the batch's marks and labels: answers with labels, scores or labelled steps")
    marks, labels = every_token(batch) if at == "tokens" else (batch.marks, batch.labels)
    labels = labels[..., None] if labels.ndim == 2 else labels
    outputs = head(params, hidden_of(model, params, batch))
    scores = split_outputs(outputs, members=members, classes=classes)
    if scores.shape[-1] != labels.shape[-1]:
        raise ValueError(f"the head scores {scores.shape[-1]} objectives, but the data has {labels.shape[-1]} labels")
    weights = jnp.where(jnp.isnan(labels), 0.0, marks[..., None])  # an objective without a label is unknown
    scores = jnp.where(weights[..., None, :] != 0, scores, 0.0)
    labels = jnp.where(weights != 0, labels, 0.0)
    value = jax.vmap(lambda r: objective(r, labels, hyper), in_axes=2)(scores)
    graded = name == "classification"
    said = jax.nn.sigmoid(scores) if graded else scores
    mean = jnp.mean(said, axis=2)
    watched = {"score": mean, "label": labels, "error": jnp.abs(mean - labels)}
    if graded:
        watched["accuracy"] = ((mean > 0.5) == (labels > 0.5)).astype(jnp.float32)
    if members > 1:
        watched["uncertainty"] = jnp.std(said, axis=2)
    metrics = {name: Term(jax.lax.stop_gradient(x), weights) for name, x in watched.items()}
    return {name: Term(jnp.mean(value, axis=0), weights)}, metrics | (_kept(outputs) if keep else {})


def split_outputs(scores: Float[Array, "*B K"], *, members: int = 1, classes: int = 1) -> Float[Array, "*B N M"]:
    """A head's outputs as scores of N members and M objectives; of two classes, the second minus the first.

    Example:
      >>> split_outputs(jnp.arange(8.0), members=2, classes=2).tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    if scores.shape[-1] % (members * classes):
        raise ValueError(f"{scores.shape[-1]} outputs cannot be {members} members' scores of {classes} classes")
    parts = scores.reshape(*scores.shape[:-1], members, -1, classes)
    return parts[..., 0] if classes == 1 else parts[..., 1] - parts[..., 0]
