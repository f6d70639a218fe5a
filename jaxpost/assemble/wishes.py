"""What each prompt is answered by: the command's sampling parameters and shape, or its row's own in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpost.generate.grammar import Constraint
from jaxpost.generate.params import SamplingParams

_SHAPE = "structured_outputs"
"""vLLM's name of a request's grammar."""
_KINDS = ("regex", "choice", "json")


@dataclass(frozen=True)
class Wishes:
    """By prompt; where a row's own cannot be met, the command's stand and `faults` says why."""

    sampling: tuple[SamplingParams, ...]
    shape: Constraint | None
    """The command's."""
    shapes: tuple[Constraint | None, ...]
    faults: Mapping[int, str]

    def own_shapes(self) -> dict[int, Constraint]:
        """Those of rows, by number of the prompt."""
        return {i: shape for i, shape in enumerate(self.shapes) if shape is not None and shape is not self.shape}


def read_wishes(
    command: Mapping[str, Any], own: Sequence[Any] | None, prompts: int, shape: Mapping[str, Any] | None = None
) -> Wishes:
    """Each prompt's sampling parameters and shape: its own in the place of the command's; greedy if nothing is said.

    Args:
      own: of each prompt, names and values; `structured_outputs` is vLLM's {"regex" or "choice" or "json": ...}.
      shape: `grammar.Constraint`'s regex, choice or json.

    Raises:
      ValueError: unknown or contradictory ones of the command.

    Example:
      >>> found = read_wishes({"max_tokens": 9}, [{}, {"min_tokens": 10}, {"structured_outputs": {"regex": "a"}}], 3)
      >>> found.faults
      {1: '"sampling": min_tokens is 10, more than max_tokens, 9: lower it'}
      >>> found.own_shapes()
      {2: Constraint(regex='a', choice=None, json=None)}
    """
    wish = SamplingParams.from_mapping({"temperature": 0.0} | dict(command))
    held = Constraint(**shape) if shape else None
    if own is not None and len(own) != prompts:
        raise ValueError(f"{prompts} prompts with {len(own)} sets of parameters of their own: give one a prompt")
    sampling, shapes, faults = [wish] * prompts, [held] * prompts, {}
    for number, mapping in enumerate(own or ()):
        try:
            if not isinstance(mapping, Mapping):
                raise ValueError(f"it is {mapping!r}; write names and values in braces")
            kept = wish.updated({name: value for name, value in mapping.items() if name != _SHAPE})
            if mapping.get(_SHAPE) is not None:
                shapes[number] = _shape(mapping[_SHAPE])
            sampling[number] = kept
        except ValueError as error:
            faults[number] = f'"sampling": {error}'
    return Wishes(tuple(sampling), held, tuple(shapes), faults)


def _shape(said: Any) -> Constraint:
    if not isinstance(said, Mapping) or (odd := [name for name in said if name not in _KINDS]):
        told = f"{_SHAPE} has no {odd[0]!r}" if isinstance(said, Mapping) else f"{_SHAPE} is {said!r}"
        raise ValueError(f"{told}; write one of {', '.join(_KINDS)} and its value in braces")
    return Constraint(**said)
