"""Two policies sampled as one: their geometric mixture, as a model that the engine runs like any other.

The mixture's layers are both models' layers, so their keys and values lie in one paged cache, and its hidden states are
both models' side by side.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpost.models.pages import PagedCache, Pools
from jaxpost.types import Inputs, Model, Outputs, Params


def geometric_mixture(model: Model, weight: float) -> Model:
    """p(y_t | y_<t) proportional to first(y_t)^(1 - w) second(y_t)^w, by softmax((1 - w) z_first + w z_second).

    Its params are `mixed(first, second)`. It can be sampled from and scored; it is not trained, and it has no
    parameter table (a mesh other than the parameters' is no place for it).

    Args:
      model: the architecture of both.
      weight: w, from 0 to 1.

    Raises:
      ValueError: a weight that is no share.

    Nash-MD samples its opponent so (2312.00886, section 7).
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"the second policy's weight is {weight:g}; a share is from 0 to 1")
    count, width = len(model.config.stacks), model.config.width

    def forward(params: Params, inputs: Inputs, cache: PagedCache | None = None) -> Outputs:
        first, second = parts(params)
        caches: list[PagedCache | None] = [None, None]
        if cache is not None:
            keys, values = cache.pools
            caches = [
                cache.replace(pools=Pools(keys[part], values[part])) for part in (slice(count), slice(count, None))
            ]
        outputs = [model.forward(p, inputs, c) for p, c in zip((first, second), caches, strict=True)]
        hidden = jnp.concatenate([out.hidden for out in outputs], axis=-1)
        if cache is None:
            return Outputs(hidden)
        pools = [out.cache.pools for out in outputs]
        joined = Pools(pools[0].keys + pools[1].keys, pools[0].values + pools[1].values)
        return Outputs(hidden, cache.replace(pools=joined))

    def unembed(params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        first, second = parts(params)
        return (1 - weight) * model.unembed(first, hidden[..., :width]) + weight * model.unembed(
            second, hidden[..., width:]
        )

    def parts(params: Params) -> tuple[Params, Params]:
        stacks = params["stacks"]
        of = lambda name, start: {  # noqa: E731
            **params[name], "stacks": {str(s): stacks[str(start + s)] for s in range(count)}
        }  # fmt: skip
        return of("first", 0), of("second", count)

    config = replace(model.config, stacks=model.config.stacks * 2)
    return model._replace(config=config, table=(), forward=forward, unembed=unembed)


def mixed(first: Params, second: Params) -> Params:
    """Both models' parameters, by reference: all layers together, as the engine lays them out, the rest apart.

    Example:
      >>> one = {"embed": 1, "stacks": {"0": "layers"}}
      >>> mixed(one, {"embed": 2, "stacks": {"0": "others"}})
      {'stacks': {'0': 'layers', '1': 'others'}, 'first': {'embed': 1}, 'second': {'embed': 2}}
    """
    count = len(first["stacks"])
    stacks = {**first["stacks"], **{str(count + int(s)): layers for s, layers in second["stacks"].items()}}
    rest = lambda params: {name: part for name, part in params.items() if name != "stacks"}  # noqa: E731
    return {"stacks": stacks, "first": rest(first), "second": rest(second)}
