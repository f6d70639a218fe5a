"""The `jaxpost search` and `jaxpost search-curve` commands. Imports nothing slow before it computes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpost.config_check_search import check_search
from jaxpost.config_flags import apply_flags, flags_help
from jaxpost.config_io import ConfigError, load
from jaxpost.config_search import SearchConfig

OK, FAILED = 0, 1

SEARCH = """\
Get more out of a model at test time: draw, rank, vote, search trees with a verifier, within a budget of tokens. A
preset names the model, the method, the verifier and the budget; any key of it is a flag. The run's folder (run.dir)
holds results.jsonl, the trees and report.html; the same command run again goes on where it stopped.
"""

SEARCH_EPILOG = """\
examples:
  jaxpost search configs/search/best_of_n.yaml --prompts prompts.jsonl
  jaxpost search configs/search/step_beam.yaml --prompts prompts.txt --search.width 8 --budget 4000 --run.name beam
  jaxpost search configs/search/self_consistency.yaml --search.n 32 --sampling.temperature 1.0
  jaxpost search configs/search/best_of_n.yaml --search.kind self_consistency --run.name vote
  jaxpost search configs/search/mcts.yaml --help          every flag, its meaning and its value in that preset

FILE has one prompt a line, or JSONL rows with prompt or messages; an `answer` in a row says what is right, so that
accuracy is printed with intervals. Exit code 1: some prompts failed (their rows say why, the others have answers).
"""

CURVE = """\
Accuracy against tokens spent: every preset at every budget and seed, on the same prompts, as one table, curve.jsonl and
a page with the curves and their 95% intervals. What is there already is not searched again.
"""

CURVE_EPILOG = """\
examples:
  jaxpost search-curve configs/search/greedy.yaml configs/search/self_consistency.yaml --budgets 64 256 1024
  jaxpost search-curve configs/search/*.yaml --budgets 256 1024 --seeds 3 --count 50 --out runs/curve

Settings (--section.key VALUE, as of `jaxpost search`) apply to every preset that has them.
"""


def add(commands: Any) -> None:
    """Adds the commands to a parser."""
    made = _command(commands, "search", "more from a model at test time", SEARCH, SEARCH_EPILOG)
    made.add_argument("preset", nargs="?", metavar="PRESET", help="a YAML file, e.g. configs/search/best_of_n.yaml")
    made.add_argument("-h", "--help", action="store_true", help="with a PRESET: every flag and its value")
    curve = _command(commands, "search-curve", "accuracy against tokens", CURVE, CURVE_EPILOG, add_help=True)
    curve.add_argument("presets", nargs="+", metavar="PRESET", help="YAML files of `method: search`")
    curve.add_argument(
        "--budgets", nargs="+", type=int, metavar="N", help="tokens a prompt (default: the presets' own)"
    )
    curve.add_argument("--seeds", type=int, default=1, metavar="N", help="0 .. N-1 (default: 1)")
    curve.add_argument(
        "--out", type=Path, default=Path("runs/search-curve"), metavar="DIR", help="default: %(default)s"
    )


def _command(commands: Any, name: str, summary: str, about: str, examples: str, *, add_help: bool = False) -> Any:
    made = commands.add_parser(
        name,
        help=summary,
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=add_help,
    )
    made.set_defaults(command=name, takes_flags=True, print_help=made.print_help)
    return made


def read(preset: str, flags: Sequence[str]) -> SearchConfig:
    """A preset of `method: search` with flags applied.

    Raises:
      ConfigError: another method's preset, or what does not fit.
    """
    config = load(preset)
    if not isinstance(config, SearchConfig):
        raise ConfigError(f"{preset}: is a preset of method {config.method}, not search; `jaxpost train` runs it")
    return apply_flags(config, prompt_flags(flags))


def prompt_flags(flags: Sequence[str]) -> list[str]:
    """`--prompts FILE` as the flags that it stands for.

    >>> prompt_flags(["--prompts", "a.txt", "--budget", "9"])
    ['--prompts.kind', 'plain', '--prompts.path', 'a.txt', '--budget', '9']
    """
    out, rest = [], list(flags)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.partition("=")
        if name == "--prompts" and (equals or rest):
            value = value if equals else rest.pop(0)
            whole = value.lstrip().startswith("{")
            out += ["--prompts", value] if whole else ["--prompts.kind", "plain", "--prompts.path", value]
        else:
            out.append(flag)
    return out


def run_search(options: argparse.Namespace, flags: list[str]) -> int:
    """`jaxpost search`."""
    if options.preset is None:
        if options.help:
            options.print_help()
            return OK
        raise ConfigError("search needs a preset, before any flag: jaxpost search configs/search/best_of_n.yaml")
    config = read(options.preset, flags)
    if options.help:
        print(flags_help(config, f"jaxpost search {options.preset}", SEARCH + "\n" + SEARCH_EPILOG))
        return OK
    check_search(config)

    from jaxpost.assemble.search import search
    from jaxpost.assemble.train import writes

    result = search(config, command=["jaxpost", "search", options.preset, *flags], progress=sys.stderr)
    if writes():
        from jaxpost.report.search import write_search
        from jaxpost.report.text import clean

        for line in result.told:
            print(clean(line))
        for fault in result.faults[:3]:
            print(f"not known whether right: {clean(fault, 500)}", file=sys.stderr)
        print(f"Answers, trees and tokens as a page: {write_search(result.folder)}")
    return FAILED if result.failed else OK


def run_curve(options: argparse.Namespace, flags: list[str]) -> int:
    """`jaxpost search-curve`."""
    configs = {preset: check_search(read(preset, flags)) for preset in options.presets}

    from jaxpost.assemble.search_curve import run_curve as run
    from jaxpost.report.search_curve import write_curve

    curve = run(configs, budgets=options.budgets, seeds=options.seeds, out=options.out, progress=sys.stderr)
    print(curve.table)
    print(f"The curves: {write_curve(options.out)}")
    return FAILED if curve.failed else OK


COMMANDS = {"search": run_search, "search-curve": run_curve}
