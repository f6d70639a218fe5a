"""The `jaxpost score` command: its arguments, and what it prints. Imports nothing slow before it computes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

OK, FAILED = 0, 1

ABOUT = """\
Score answers with a reward model: a run's export, any AutoModelForSequenceClassification or
AutoModelForTokenClassification folder, an adapter folder with a head, or a hub id. FILE has rows with prompt and
completion, messages, chosen and rejected, completions, or steps (.jsonl, .jsonl.gz, .json, .parquet, a hub dataset).
Labelled rows also give a verdict: accuracy with its 95% interval, by subset, calibration, length bias.
"""

EXAMPLES = """\
examples:
  jaxpost score runs/hh/export answers.jsonl --out scores.jsonl
  jaxpost score runs/hh/export pairs.jsonl.gz --limit 500
  jaxpost score runs/a/export runs/b/export runs/c/export answers.jsonl --members mean_std --penalty 1.0
  jaxpost score runs/prm/export solutions.jsonl --steps prod --out scores.jsonl
  jaxpost score Skywork/Skywork-Reward-V2-Qwen3-0.6B answers.jsonl

Interrupted, the same command with --out goes on where it stopped. A row of --out has "scores" (one an answer),
"uncertainty" of ensembles, "steps" of process models, or "error" where an answer could not be scored.
"""


def add(commands: Any) -> None:
    """Adds `score` to the commands of a parser."""
    made = commands.add_parser(
        "score",
        help="score answers with a reward model",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("models", nargs="+", metavar="MODEL", help="folder or hub id; several are an ensemble")
    made.add_argument("file", metavar="FILE", help="rows with answers")
    made.add_argument("--out", type=Path, metavar="FILE", help="JSONL of scores; what it holds is not scored again")
    made.add_argument(
        "--members",
        choices=("mean", "min", "mean_std"),
        default="mean",
        help="how an ensemble's scores become one: mean, least, or mean - penalty * deviation (default: mean)",
    )
    made.add_argument("--penalty", type=float, default=1.0, metavar="K", help="of mean_std (default: 1)")
    made.add_argument(
        "--steps",
        choices=("min", "last", "prod", "mean"),
        default="min",
        help="how a process model's steps become one score (default: min)",
    )
    made.add_argument("--objectives", type=float, nargs="+", default=(), metavar="W", help="weights of objectives")
    made.add_argument("--limit", type=int, metavar="N", help="only the first rows")
    made.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first rows")
    made.add_argument("--convert", default="auto", metavar="NAME", help="whose rows they are (default: recognised)")
    made.add_argument(
        "--kind",
        choices=("pairs", "rankings", "unpaired", "scores", "steps"),
        help="what rows of several uses are read as (default: pairs where they can be)",
    )
    made.add_argument(
        "--on-bad-row",
        choices=("error", "skip"),
        default="error",
        help="a row that cannot be read ends the command, or has an error as its line (default: error)",
    )
    made.add_argument("--tokens", type=int, default=16_384, metavar="N", help="tokens of a batch (default: 16384)")
    made.set_defaults(command="score", takes_flags=False, print_help=made.print_help)


def run_score(options: argparse.Namespace, flags: list[str]) -> int:
    from jaxpost.assemble.reward_scores import Reduce
    from jaxpost.assemble.score import Verdict, score
    from jaxpost.config import SourceSection
    from jaxpost.config_io import hints, read_value

    convert = read_value(options.convert, hints(SourceSection)["convert"], key="--convert", source="jaxpost score")
    source = SourceSection(path=options.file, limit=options.limit, skip=options.skip, convert=convert)
    verdict = Verdict()
    rows = score(
        options.models,
        source,
        kind=options.kind,
        reduce=Reduce(options.members, options.penalty, options.steps, tuple(options.objectives)),
        out=options.out,
        tokens=options.tokens,
        on_bad_row=options.on_bad_row,
        verdict=verdict,
        progress=sys.stderr,
    )
    for row in rows:
        if options.out is None:
            print(json.dumps(row, ensure_ascii=False), flush=True)
    for line in told(verdict.numbers()):
        print(line, file=sys.stderr)
    if options.out is not None:
        print(f"wrote {options.out}", file=sys.stderr)
    if verdict.failed:
        print(f"{verdict.failed} of {verdict.rows} rows could not be scored; their lines say why", file=sys.stderr)
    return FAILED if verdict.failed else OK


def told(numbers: dict[str, float]) -> list[str]:
    """A line for every accuracy with its interval, then the other numbers, with theirs where they have one.

    >>> told({"accuracy": 0.75, "low": 0.5, "high": 0.9, "items": 12.0, "calibration_error": 0.125})
    ['accuracy 75.0% [50.0, 90.0] of 12', 'calibration_error 0.125']
    >>> told({"area_under_curve": 0.7, "area_under_curve_low": 0.61, "area_under_curve_high": 0.78})
    ['area_under_curve 0.7 [0.61, 0.78]']
    """
    lines, rest = [], []
    for key, value in numbers.items():
        head, _, last = key.rpartition("/")
        head = f"{head}/" if head else ""
        if last == "accuracy" and f"{head}low" in numbers:
            low, high, items = (numbers[head + part] for part in ("low", "high", "items"))
            lines.append(f"{head}accuracy {100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}] of {int(items)}")
        elif last in ("accuracy", "low", "high", "items") or "reliability/" in key or _is_bound(key, numbers):
            continue
        elif f"{key}_low" in numbers and f"{key}_high" in numbers:
            rest.append(f"{key} {value:.4g} [{numbers[f'{key}_low']:.4g}, {numbers[f'{key}_high']:.4g}]")
        else:
            rest.append(f"{key} {value:.4g}")
    return lines + rest


def _is_bound(key: str, numbers: dict[str, float]) -> bool:
    return any(key.endswith(end) and key.removesuffix(end) in numbers for end in ("_low", "_high"))


COMMANDS = {"score": run_score}
