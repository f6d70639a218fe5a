"""Every method of `jaxpost.search` with what a budget of tokens makes of its hyper-parameters, for the lab's answers.

Budgets are enforced by the driver: numbers of samples are large, and the budget ends them. Widths and simulations grow
with the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from jaxpost.recipes.lab.model import LONGEST
from jaxpost.recipes.lab.search.samples import SEPARATOR
from jaxpost.search.actions import PIECES, rap, rstar
from jaxpost.search.allocate import plain
from jaxpost.search.best_of_n import best_of_n
from jaxpost.search.contract import Method
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
from jaxpost.search.tree_of_thoughts import tree_of_thoughts

MANY = 64
"""Samples that no budget of the lab reaches."""
STEP = 16
"""Tokens of a step; the longest one has 11."""
MEASURING = Measuring(
    probes=3, max_tokens=LONGEST, surprising=0.7, weights={"length": 0.0, "domain": 0.0, "ambiguity": 0.0}
)
"""The lab's prompts are alike but for their numbers: agreement and surprise alone say something."""


class Tried(NamedTuple):
    """A method at one budget, and which scorer is its verifier."""

    method: Method
    scorer: Literal["orm", "prm", "logic x orm", "none"] = "none"


def widths(budget: int) -> dict[str, int]:
    """Width and factor of a beam of steps that a budget pays: a beam draws and has read about 50 tokens.

    >>> widths(64), widths(256)
    ({'width': 1, 'factor': 1}, {'width': 4, 'factor': 2})
    """
    width = max(1, budget // 64)
    return {"width": width - width % 2 if width > 1 else 1, "factor": min(2, width)}


def steps_of(**more: Any) -> dict[str, Any]:
    """What all searches by steps share."""
    return {"separator": SEPARATOR, "max_steps": 6, "max_tokens": STEP, **more}


def table(budget: int, *, snr: float | None = None) -> dict[str, Tried]:
    """Name -> method at this budget.

    Args:
      snr: the process reward model's signal-to-noise ratio, which caps the plain policy's beam.
    """
    out = {name: make(budget) for name, make in MAKERS.items()}
    out["plain policy"] = Tried(_plain(budget, snr), "prm")
    out["metacognition"] = Tried(
        partial(
            metacognition,
            cheap=partial(greedy, max_tokens=LONGEST),
            dear=partial(self_consistency, n=MANY, max_tokens=LONGEST, weights="score"),
            signal="entropy",
            threshold=0.15,
        ),
        "orm",
    )
    return out


def _plain(budget: int, snr: float | None) -> Method:
    return partial(
        plain,
        greedy=partial(greedy, max_tokens=LONGEST),
        beam=lambda problem, width: step_beam(problem, width=width, factor=1, **steps_of()),
        tree=lambda problem, depth: mcts(problem, simulations=_simulations(budget), **_tree_of(max_depth=depth)),
        measuring=MEASURING,
        snr=snr,
    )


def _simulations(budget: int) -> int:
    """Of step trees: each draws about two steps and has one scored."""
    return max(2, budget // 32)


def _tree_of(**more: Any) -> dict[str, Any]:
    tokens = {"step_tokens": STEP, "answer_tokens": LONGEST}
    return {"branch": 3, "separator": SEPARATOR, **tokens, **more}


def _token_tree(budget: int, rule: Literal["gumbel", "puct"]) -> Tried:
    """Valued by the policy's own log-probabilities: a verdict for each token would be the whole budget."""
    return Tried(
        partial(
            token_mcts,
            rule=rule,
            value="logprob",
            simulations=max(2, budget // 32),
            best=4,
            considered=4,
            search_tokens=16,
            answer_tokens=LONGEST,
        )
    )


def _answers(function: Callable[..., Any], scorer: Any = "none", **how: Any) -> Callable[[int], Tried]:
    return lambda budget: Tried(partial(function, max_tokens=LONGEST, **how), scorer)


def _steps(function: Callable[..., Any], **how: Any) -> Callable[[int], Tried]:
    return lambda budget: Tried(partial(function, **steps_of(**widths(budget), **how)), "prm")


MAKERS: dict[str, Callable[[int], Tried]] = {
    "greedy": _answers(greedy),
    "sampling": _answers(sample, n=1),
    "token beam": lambda budget: Tried(partial(token_beam, beams=max(1, budget // 24), max_tokens=LONGEST)),
    "best of N": _answers(best_of_n, "orm", n=MANY),
    "best of N, weighted": _answers(best_of_n, "orm", n=MANY, choose="weighted"),
    "best of N, logic x ORM": _answers(best_of_n, "logic x orm", n=MANY),
    "best of N, PRM": _answers(best_of_n, "prm", n=MANY, aggregate="min"),
    "majority": _answers(self_consistency, n=MANY),
    "majority, early stop": lambda budget: Tried(
        partial(self_consistency, n=max(1, budget // 16), max_tokens=LONGEST, early_stop=True)
    ),
    "weighted by score": _answers(self_consistency, "orm", n=MANY, weights="score"),
    "weighted by confidence": _answers(self_consistency, n=MANY, weights="confidence"),
    "confidence-filtered": _answers(
        self_consistency, n=MANY, weights="confidence", measure="lowest", window=8, keep=0.5
    ),
    "step beam": _steps(step_beam),
    "lookahead": _steps(step_beam, lookahead=1),
    "DVTS": _steps(dvts),
    "REBASE": lambda budget: Tried(partial(rebase, **steps_of(width=widths(budget)["width"])), "prm"),
    "OREO": lambda budget: Tried(
        partial(oreo, beams=max(1, budget // 128), expand=2, likelihood=0.1, **steps_of()), "prm"
    ),
    "tree of thoughts, breadth": lambda budget: Tried(
        partial(tree_of_thoughts, evaluator="verifier", keep=max(1, budget // 128), depth=2, **_tree_of()), "prm"
    ),
    "tree of thoughts, depth": lambda budget: Tried(
        partial(tree_of_thoughts, order="depth", evaluator="verifier", threshold=0.3, depth=2, **_tree_of()), "prm"
    ),
    "MCTS, PUCT": lambda budget: Tried(
        partial(mcts, simulations=_simulations(budget), leaves=2, max_depth=5, **_tree_of()), "prm"
    ),
    "MCTS, UCT and rollouts": lambda budget: Tried(
        partial(
            mcts, simulations=_simulations(budget), rule="uct", value="rollout", rollouts=1, max_depth=5, **_tree_of()
        ),
        "orm",
    ),
    "MCTS without a verifier": lambda budget: Tried(
        partial(mcts, simulations=_simulations(budget), value="agreement", rollouts=1, max_depth=5, **_tree_of())
    ),
    "token MCTS, Gumbel": lambda budget: _token_tree(budget, "gumbel"),
    "token MCTS, PUCT": lambda budget: _token_tree(budget, "puct"),
    "RAP": lambda budget: Tried(
        partial(
            rap,
            simulations=_simulations(budget),
            branch=2,
            answers=2,
            question_piece="",
            answer_piece="",
            final="",
            useful_prompt="{problem}",
            useful_words=("1", "0"),
            separator=SEPARATOR,
            step_tokens=STEP,
            answer_tokens=LONGEST,
        )
    ),
    "rStar": lambda budget: Tried(
        partial(
            rstar,
            simulations=_simulations(budget),
            actions=("step", "rest"),
            pieces=dict.fromkeys(PIECES, ""),
            separator=SEPARATOR,
            step_tokens=STEP,
            answer_tokens=LONGEST,
        )
    ),
    "self-refine": lambda budget: Tried(
        partial(
            self_refine,
            rounds=3,
            answer_tokens=LONGEST,
            feedback_tokens=LONGEST,
            feedback_prompt="{problem}={answer}",
            refine_prompt="{problem}",
        )
    ),
    "debate": lambda budget: Tried(
        partial(debate, agents=3, rounds=2, answer_tokens=LONGEST, prompt="{problem}\n{own}\n{others}")
    ),
    "budget forcing": lambda budget: Tried(
        partial(budget_forcing, marker="|", wait=SEPARATOR, max_thinking=max(8, budget // 2), max_tokens=LONGEST)
    ),
}
"""Name -> the method of a budget."""
