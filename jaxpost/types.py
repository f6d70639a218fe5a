"""Every contract of jaxpost, in one place: arrays with shapes, and functions over them.

A post-training method is a handful of pure functions over these containers. All containers that cross
a `jax.jit` boundary are NamedTuples of arrays, so `jax.tree.map`, sharding, donation and checkpoints
treat them alike.

Letters used in shapes, here and everywhere: B rows, T tokens of a row, D model width, V vocabulary,
L layers of a stack, N query heads, K key/value heads, H head width, F feed-forward width, S cache slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

Params = Any
"""A pytree of arrays: nested dicts whose leaves are arrays or weight leaves that `ops.linear` multiplies."""

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
"""Gives an activation its sharding by logical axis names; the identity off a mesh."""


class Inputs(NamedTuple):
    """What a model reads. Padding has segment id 0; packed examples count from 1 within a row."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    """Position of each token within its own segment (RoPE and causality use it); ascending along the row."""
    segment_ids: Int[Array, "B T"]
    prefix_ids: Int[Array, "B T"] | None = None
    """The segment, earlier in the row, that this token's segment continues and may read: samples share one prompt.
    0: none."""


class Outputs(NamedTuple):
    """What a model returns: final normed hidden states, the advanced cache, auxiliary statistics."""

    hidden: Float[Array, "B T D"]
    cache: Any = None
    aux: Mapping[str, Array] = {}


class ParamSpec(NamedTuple):
    """One row of a model's parameter table: all that anybody needs to know of a parameter.

    Shapes of per-layer parameters lead with the stack's repeats (logical axis "layers").
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable[[PRNGKeyArray, tuple[int, ...], Any], Array]


class Model(NamedTuple):
    """Pure functions of one architecture, made once by `models.build_model(config)`."""

    config: Any
    table: tuple[ParamSpec, ...]
    init: Callable[..., Params]
    """init(key, dtype=float32) -> Params."""
    forward: Callable[..., Outputs]
    """forward(params, inputs, cache=None) -> Outputs."""
    unembed: Callable[[Params, Array], Array]
    """unembed(params, hidden[... D]) -> logits[... V] in float32; losses call it on chunks of tokens."""
    init_cache: Callable[..., Any]
    """init_cache(batch, capacity, dtype) -> an empty cache for `forward`."""


class TokenBatch(NamedTuple):
    """Packed or padded rows for supervised training.

    `weights[b, t]` is the loss weight of token t as a *target*: it is predicted from position t - 1, and
    only where both lie in the same segment. 0 means "read, not trained".
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    row_ids: Int[Array, " B"]
    """Global identity of each row; noise keys are folded by it, so slots and microbatches do not matter."""


class RolloutBatch(NamedTuple):
    """Packed or padded rows of the policy's own samples, with what is known of every token before the step.

    Like `weights`, every field of [B T] floats belongs to token t as a *target*, the action chosen at position t - 1.
    Where `weights` is 0 (prompts, an environment's turns, padding, unscored samples) their contents do not count.
    All log-probabilities are of softmax(logits / temperature).
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    """One segment per sample: sequence-level ratios and means run over it."""
    weights: Float[Array, "B T"]
    row_ids: Int[Array, " B"]
    advantages: Float[Array, "B T"]
    old_logprobs: Float[Array, "B T"] | None = None
    """The learner's, before the first of several steps on these samples. None: the current ones, so ratios are 1."""
    sampler_logprobs: Float[Array, "B T"] | None = None
    """What the sampler drew with; needed by an importance correction."""
    ref_logprobs: Float[Array, "B T"] | None = None
    """Of the reference policy; needed by a KL term."""
    old_values: Float[Array, "B T"] | None = None
    """The critic's value of the state in which the token was chosen, when its advantage was computed."""
    returns: Float[Array, "B T"] | None = None
    """What the critic should have said."""
    prefix_ids: Int[Array, "B T"] | None = None
    """As in `Inputs`: the samples of a prompt stand behind one copy of it."""
    opponent: Float[Array, "B T"] | None = None
    """1 on the samples that an opponent drew, 0 on the policy's own."""


class AnswerBatch(NamedTuple):
    """Packed or padded rows of given answers with what is known of each: pairs, rankings, labels, labelled steps.

    An answer is one segment. The answers of a group (a pair, a ranking, a single labelled answer) stand in one row,
    behind one copy of their prompt (`prefix_ids`; the prompt is then a segment of its own) or each behind its own.
    Tables [B S] have a column for each segment: column s belongs to segment id s + 1. A group that is padding or left
    out has no columns.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    """1 on an answer's tokens as targets, 0 on prompts and padding."""
    row_ids: Int[Array, " B"]
    groups: Int[Array, "B S"]
    """The group of a segment, counted from 1 within the row; 0: the segment is no answer (a shared prompt, padding)."""
    ranks: Int[Array, "B S"]
    """Place in the group, 0 the best, equal numbers for ties; of unpaired answers 0 desirable, 1 undesirable; -1: an
    answer to another prompt, which only a batch's KL baseline reads (KTO)."""
    strengths: Float[Array, "B S"]
    """How much the group's order is worth: a margin by grade, or 1; the same in all columns of a group."""
    marks: Float[Array, "B T"] | None = None
    """Weight of a score read after this token: the last of an answer, or of each step."""
    labels: Float[Array, "B T *M"] | None = None
    """What the score of a marked token should say: 0 or 1, a probability, or a grade; of several objectives [B, T, M],
    NaN where one is not known."""
    ref_logprobs: Float[Array, "B T"] | None = None
    """Of the reference policy, per token as a target."""
    prefix_ids: Int[Array, "B T"] | None = None
    """As in `Inputs`."""
    from_reference: Float[Array, "B S"] | None = None
    """1 where the reference policy drew the answer, 0 elsewhere; read by exploration terms (XPO)."""


class Term(NamedTuple):
    """An unreduced mean: its value is sum(value * weight) / sum(weight), and 0 where all weights are 0.

    `weight` comes from the batch, never from params: the total weight is taken over the whole batch (all
    microbatches, devices, hosts) before the first microbatch is differentiated.
    """

    value: Shaped[Array, "..."]
    weight: Shaped[Array, "..."]
    coef: float | Array = 1.0


Terms = dict[str, Term]
Hyper = Mapping[str, Array | float]
"""Traced scalars (beta, temperature, smoothing ...): changing them never recompiles."""


@runtime_checkable
class LossFn(Protocol):
    """A method's mathematics: `total = sum over terms of coef * mean(term)`.

    Written f(model, params, frozen, batch, key, hyper, ...) and bound with `functools.partial(f, model)`.
    `params` is a dict of networks ("policy", "value" ...), all of it differentiated; `frozen` holds the
    base, teacher or reference. The second dict of Terms are metrics: reduced alike, not differentiated.
    """

    def __call__(
        self, params: Params, frozen: Params, batch: Any, key: PRNGKeyArray, hyper: Hyper
    ) -> tuple[Terms, Terms]: ...


class Coupled(NamedTuple):
    """A loss that couples the rows of a batch: a sort over all answers, a baseline that is a mean over the batch.

    It equals the `LossFn` outer(stats(...)) on the whole batch; in two parts it is exact over any number of
    microbatches too. The step computes `stats` of every microbatch without gradient, differentiates `outer` by them,
    and takes what comes back through one microbatch after another.
    """

    stats: Callable[[Params, Params, Any, PRNGKeyArray, Hyper], Any]
    """stats(params, frozen, batch, key, hyper) -> a pytree of arrays that lead with B, each row's from that row."""
    outer: Callable[[Any, Hyper, Any], tuple[Terms, Terms, Any]]
    """outer(stats, hyper, memory) -> (terms, metrics, memory)."""
    memory: Any = ()
    """What `outer` remembers from step to step (a running mean), before the first; () where it remembers nothing."""


class TrainState(NamedTuple):
    """All that training changes; arrays only, so one checkpoint call saves it."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    extra: Any
    """Method state beside the optimiser's: the guard's statistics, an exponential moving average ..."""


@runtime_checkable
class TrainStep(Protocol):
    """step(state, frozen, batch, key, hyper) -> (state, metrics). Not jitted: the loop jits and donates."""

    def __call__(
        self, state: TrainState, frozen: Params, batch: Any, key: PRNGKeyArray, hyper: Hyper
    ) -> tuple[TrainState, dict[str, Array]]: ...
