"""The `jaxpost lab` commands: their arguments, and what they print. Imports nothing slow before it computes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

TRAIN = """\
Make the lab: a model of 3.4M parameters, trained from scratch on generated arithmetic (minutes on two cores), kept in
the user's cache and made only once. Prints where it is and what it can do, by task.
"""

TRAIN_EPILOG = """\
examples:
  jaxpost lab train
  jaxpost lab train --seed 1
"""

COMPARE = """\
Run methods of reinforcement learning on the lab's model, each with the same number of samples and the same seeds, and
print a table with 95% intervals over the seeds. A method is grpo, dr_grpo, dapo, rloo, reinforce_plus_plus or ppo, or
any preset of `method: rl`, of which the method is kept and model, problems, batch and optimiser are the lab's.
Interrupted, the same command goes on with what is missing; more seeds add to those that are there.
"""

COMPARE_EPILOG = """\
examples:
  jaxpost lab compare grpo dr_grpo rloo --seeds 5 --samples 4096
  jaxpost lab compare grpo configs/grpo/gspo.yaml --seeds 8 --out runs/gspo
  jaxpost lab compare grpo ppo --lr 3e-4 --learner.minibatches 4

Settings (--section.key VALUE, as of `jaxpost train`) apply to every method.
"""

PREFER = """\
Train the lab's model with preference losses, each on the same pairs of its own right and wrong answers and for as many
updates, over several seeds; print accuracy on unseen problems with 95% intervals over the seeds, and what became of
unseen pairs. A METHOD is a kind of loss (dpo, ipo, kto ...), several joined by + (dpo+nll), sft, or any preset of
`method: preference`, of which losses and reference are kept and model, pairs, batch and optimiser are the lab's.
Interrupted, the same command goes on with what is missing; more seeds or methods add to what is there.
"""

PREFER_EPILOG = """\
examples:
  jaxpost lab prefer
  jaxpost lab prefer sft dpo simpo --seeds 3 --pairs 640
  jaxpost lab prefer dpo configs/dpo/local_tr_dpo.yaml --rates 1e-4 --out runs/tr_dpo

Of several --rates each method has the one that is best on a seed and on problems that are not reported.
"""

SEARCH = """\
Search at test time on the lab's model, each method at several budgets of generated + verifier tokens: label the model's
own answers to training problems, train an outcome and a process reward model on them, report how far these can be
trusted, fit the allocation of a fixed total on other training problems, and draw accuracy against tokens on held-out
problems over seeds. Writes table.md, points.json, curve.svg and verifiers.md. Interrupted, the same command goes on
with what is missing; more methods, budgets or seeds add to what is there.
"""

SEARCH_EPILOG = """\
examples:
  jaxpost lab search
  jaxpost lab search "greedy" "best of N" "fitted allocation" --seeds 2 --items 60 --budgets 64 256
"""


def add(commands: Any) -> None:
    """Adds `lab train`, `lab compare`, `lab prefer` and `lab search` to the commands of a parser."""
    lab = commands.add_parser(
        "lab",
        help="compare methods on a small model",
        description="Compare methods on a small model made from scratch.",
    )
    parts = lab.add_subparsers(metavar="COMMAND", required=True)
    train = _command(parts, "train", "make the model", TRAIN, TRAIN_EPILOG)
    train.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and problems (default: 0)")
    compare = _command(parts, "compare", "methods, seeds, a table", COMPARE, COMPARE_EPILOG, flags=True)
    compare.add_argument("methods", nargs="+", metavar="METHOD", help="a name or a preset; the first is compared with")
    compare.add_argument("--seeds", type=int, default=5, metavar="N", help="0 .. N-1 (default: 5)")
    compare.add_argument("--samples", type=int, default=2048, metavar="N", help="each run draws (default: 2048)")
    compare.add_argument("--lr", type=float, default=1e-4, metavar="X", help="learning rate (default: 1e-4)")
    compare.add_argument("--out", type=Path, default=Path("runs/lab"), metavar="DIR", help="default: runs/lab")
    prefer = _command(parts, "prefer", "preference losses on equal pairs, seeds, a table", PREFER, PREFER_EPILOG)
    prefer.add_argument("methods", nargs="*", metavar="METHOD", help="the first is compared with (default: ten)")
    prefer.add_argument("--seeds", type=int, default=5, metavar="N", help="0 .. N-1 (default: 5)")
    prefer.add_argument("--pairs", type=int, default=320, metavar="N", help="of a seed (default: 320)")
    prefer.add_argument("--epochs", type=int, default=1, metavar="N", help="passes over them (default: 1)")
    prefer.add_argument("--batch", type=int, default=16, metavar="N", help="pairs of an update (default: 16)")
    prefer.add_argument("--answers", type=int, default=8, metavar="N", help="drawn for a problem (default: 8)")
    prefer.add_argument(
        "--rates", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4], metavar="X", help="one: the same for all methods"
    )
    prefer.add_argument("--out", type=Path, default=Path("runs/lab-prefer"), metavar="DIR")
    search = _command(parts, "search", "accuracy against tokens of every search", SEARCH, SEARCH_EPILOG)
    search.add_argument(
        "methods", nargs="*", metavar="METHOD", help="by name (default: all, and the fitted allocation)"
    )
    search.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128, 256], metavar="N", help="of a problem")
    search.add_argument("--seeds", type=int, default=5, metavar="N", help="0 .. N-1, of the noise (default: 5)")
    search.add_argument("--items", type=int, default=100, metavar="N", help="held-out problems (default: 100)")
    search.add_argument("--labelled", type=int, default=1500, metavar="N", help="training problems (default: 1500)")
    search.add_argument("--fitted", type=int, default=60, metavar="N", help="problems of the allocator (default: 60)")
    search.add_argument("--out", type=Path, default=Path("runs/lab-search"), metavar="DIR")


def _command(parts: Any, name: str, summary: str, about: str, examples: str, *, flags: bool = False) -> Any:
    made = parts.add_parser(
        name,
        help=summary,
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.set_defaults(command=f"lab {name}", takes_flags=flags, print_help=made.print_help)
    return made


def run_train(options: argparse.Namespace, flags: list[str]) -> int:
    """`jaxpost lab train`."""
    from jaxpost.recipes import lab

    print(lab.describe(lab.make_lab(lab.Recipe(seed=options.seed))))
    return 0


def run_compare(options: argparse.Namespace, flags: list[str]) -> int:
    """`jaxpost lab compare`."""
    from jaxpost.recipes import lab

    budget = lab.Budget(samples=options.samples, lr=options.lr)
    print(lab.compare(options.methods, seeds=options.seeds, budget=budget, folder=options.out, flags=flags))
    return 0


def run_prefer(options: argparse.Namespace, flags: list[str]) -> int:
    """`jaxpost lab prefer`."""
    from jaxpost.recipes.lab.prefer import METHODS, Plan, prefer

    plan = Plan(
        pairs=options.pairs,
        epochs=options.epochs,
        batch=options.batch,
        answers=options.answers,
        rates=tuple(sorted(set(options.rates))),
    )
    print(prefer(options.methods or METHODS, seeds=options.seeds, plan=plan, folder=options.out))
    return 0


def run_search(options: argparse.Namespace, flags: list[str]) -> int:
    """`jaxpost lab search`."""
    from jaxpost.recipes.lab.search import Plan, search_lab

    plan = Plan(
        budgets=tuple(sorted(set(options.budgets))),
        seeds=options.seeds,
        items=options.items,
        labelled=options.labelled,
        fitted=options.fitted,
    )
    print(search_lab(options.methods, plan=plan, folder=options.out))
    return 0


COMMANDS = {"lab train": run_train, "lab compare": run_compare, "lab prefer": run_prefer, "lab search": run_search}
