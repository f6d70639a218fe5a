"""A `search` section -> the method that it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxpost.config_search_methods import (
    DVTS,
    BestOfN,
    Greedy,
    Rebase,
    Samples,
    SearchMethodSection,
    SelfConsistency,
    StepBeam,
)
from jaxpost.search.best_of_n import best_of_n
from jaxpost.search.contract import Method
from jaxpost.search.dvts import dvts
from jaxpost.search.rebase import rebase
from jaxpost.search.sampling import greedy, sample
from jaxpost.search.self_consistency import self_consistency
from jaxpost.search.step_beam import step_beam
from jaxpost.search.tree import Ledger, Node, Problem

METHODS: dict[type, Callable[..., Any]] = {
    Greedy: greedy,
    Samples: sample,
    BestOfN: best_of_n,
    SelfConsistency: self_consistency,
    StepBeam: step_beam,
    DVTS: dvts,
    Rebase: rebase,
}
"""What each section names; a section has the function's own parameters."""


def make_method(section: SearchMethodSection) -> Method:
    """The method with its parameters.

    Raises:
      ValueError: parameters that contradict each other, in the method's own words.
    """
    given = {field.name: getattr(section, field.name) for field in dataclasses.fields(section) if field.name != "kind"}
    method = partial(METHODS[type(section)], **given)
    probe = method(Problem(0, "probe", Node(0, None, (0,), ""), Ledger(0), str.strip))
    try:
        next(probe)  # methods look at their parameters before they ask for anything
    except StopIteration:
        pass
    except ValueError as error:
        raise ValueError(f"search: {error}") from None
    finally:
        probe.close()
    return method
