"""A `search` section -> the method that it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jaxpost import config_search_methods as basic
from jaxpost import config_search_trees as trees
from jaxpost.config_search_trees import Allocate, MeasuringSection, Metacognition, SearchMethodSection
from jaxpost.search import actions, allocate, game24
from jaxpost.search.best_of_n import best_of_n
from jaxpost.search.contract import Method, Search
from jaxpost.search.debate import debate
from jaxpost.search.difficulty import Measuring
from jaxpost.search.dvts import dvts
from jaxpost.search.forcing import budget_forcing
from jaxpost.search.mcts import mcts
from jaxpost.search.metacognition import metacognition
from jaxpost.search.oreo import oreo
from jaxpost.search.rebase import rebase
from jaxpost.search.refine import self_refine
from jaxpost.search.sampling import greedy, sample
from jaxpost.search.self_consistency import self_consistency
from jaxpost.search.step_beam import step_beam
from jaxpost.search.token_beam import token_beam
from jaxpost.search.token_mcts import token_mcts
from jaxpost.search.tree import Ledger, Node, Problem
from jaxpost.search.tree_of_thoughts import listed, tree_of_thoughts

METHODS: Mapping[type, Callable[..., Search]] = {
    basic.Greedy: greedy,
    basic.Samples: sample,
    basic.TokenBeam: token_beam,
    basic.BestOfN: best_of_n,
    basic.SelfConsistency: self_consistency,
    basic.StepBeam: step_beam,
    basic.DVTS: dvts,
    basic.Rebase: rebase,
    basic.Oreo: oreo,
    basic.BudgetForcing: budget_forcing,
    basic.SelfRefine: self_refine,
    basic.Debate: debate,
    trees.TreeOfThoughts: tree_of_thoughts,
    trees.MCTS: mcts,
    trees.TokenMCTS: token_mcts,
    trees.RAP: actions.rap,
    trees.RStar: actions.rstar,
    trees.Allocate: allocate.plain,
    trees.Metacognition: metacognition,
}
"""What each section names; a section has the function's own parameters. Where its default is None, that stands for the
function's own default."""

VALUES: Mapping[str, Mapping[str, Any]] = {
    "read_proposals": {"listed": listed, "game24": game24.proposals},
    "early_stopping": {"no": False, "yes": True, "never": "never"},
}
"""Parameters whose values are words in a preset."""

INDEPENDENT = ("sample", "best_of_n", "self_consistency")
"""Kinds whose candidates are independent samples, so that pass@k can be said of them."""


def make_method(section: SearchMethodSection) -> Method:
    """The method with its parameters.

    Raises:
      ValueError: parameters that contradict each other, in the method's own words.
    """
    return _checked(_bound(section))


def _checked(method: Method) -> Method:
    """Methods look at their parameters before they ask for anything."""
    probe = method(Problem(0, "probe", Node(0, None, (0,), ""), Ledger(0), str.strip))
    try:
        next(probe)
    except StopIteration:
        pass
    except ValueError as error:
        raise ValueError(f"search: {error}") from None
    finally:
        probe.close()
    return method


def _bound(section: Any) -> Method:
    given = _given(section)
    if isinstance(section, Allocate):
        beam, tree = given.pop("beam"), given.pop("tree")
        given["greedy"] = _checked(_bound(section.greedy))
        given["beam"] = lambda problem, width: step_beam(problem, width=width * section.beam.factor, **_given(beam))
        given["tree"] = lambda problem, depth: mcts(problem, max_depth=depth, **_given(tree))
        given["measuring"] = _measuring(section.measuring)
        _checked(lambda problem: given["beam"](problem, section.width))
        _checked(lambda problem: given["tree"](problem, section.depth))
    if isinstance(section, Metacognition):
        given |= {"cheap": _checked(_bound(section.cheap)), "dear": _checked(_bound(section.dear))}
    return partial(METHODS[type(section)], **given)


def _measuring(section: MeasuringSection) -> Measuring:
    return Measuring(**_given(section))


def _given(section: Any) -> dict[str, Any]:
    """A section's values as arguments; a None that nobody chose is the function's own default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.name != "kind" and not (value is None and field.default is None):
            found[field.name] = VALUES[field.name][value] if field.name in VALUES else value
    return found
