"""The `jaxpost search-export` command. Imports nothing slow before it computes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ABOUT = """\
Turn the trees of a run of `jaxpost search` into training rows: good answers (sft), better and worse answers (pairs),
steps labelled by the share of right answers below them (steps), or the next steps weighted by visits (actions).
"""

EPILOG = """\
examples:
  jaxpost search-export runs/beam --kind steps --out steps.jsonl
  jaxpost search-export runs/best_of_n --kind sft --most 2 --out good.jsonl
  jaxpost search-export runs/beam --kind pairs --where siblings --out pairs.jsonl

configs/prm/search_trees.yaml trains a process reward model on steps, configs/sft/ and configs/dpo/ take the others.
Where the run knew which answers are right, that decides; else the verifier's scores do. Texts in which the policy
spelled control tokens of its tokenizer are left out.
"""

OPTIONS = {
    "sft": ("most", "least"),
    "pairs": ("where", "gap"),
    "steps": ("separator", "labels", "least"),
    "actions": ("temperature", "least"),
}
"""Which options are of which kind."""


def add(commands: Any) -> None:
    """Adds the command to a parser."""
    made = commands.add_parser(
        "search-export",
        help="training rows from search trees",
        description=ABOUT,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("folder", type=Path, metavar="RUN", help="folder of a run of `jaxpost search`")
    made.add_argument("--kind", choices=tuple(OPTIONS), required=True, help="what rows")
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL")
    made.add_argument("--most", type=int, metavar="N", help="sft: answers of a prompt (default: 1)")
    least = "least worth (sft: 0.5), answers below a step (steps: 1), visits of a node's children (actions: 2)"
    made.add_argument("--least", type=float, metavar="X", help=least)
    made.add_argument("--where", choices=("answers", "siblings"), help="pairs: of whole prompts or at every fork")
    made.add_argument("--gap", type=float, metavar="X", help="pairs: values must differ by more (default: 0)")
    made.add_argument("--separator", metavar="TEXT", help="steps: what ends a step (default: the run's own)")
    made.add_argument("--labels", choices=("soft", "hard"), help="steps: shares, or 1 where any is right")
    made.add_argument("--temperature", type=float, metavar="T", help="actions: visits ** (1 / T) (default: 1)")
    made.set_defaults(command="search-export", takes_flags=False, print_help=made.print_help)


def run(options: argparse.Namespace, flags: list[str]) -> int:
    """`jaxpost search-export`."""
    from jaxpost.search.export import export, read_run

    given = {name: value for name in ("most", "least", "where", "gap", "separator", "labels", "temperature")
             if (value := getattr(options, name)) is not None}  # fmt: skip
    if unused := sorted(given.keys() - OPTIONS[options.kind]):
        raise ValueError(f"--{unused[0]} says nothing of rows of kind {options.kind}; it takes --"
                         + ", --".join(OPTIONS[options.kind]))  # fmt: skip
    if options.kind in ("steps", "actions") and "least" in given:
        given["least"] = int(given["least"])
    config = _config(options.folder)
    own = config.get("search", {}).get("separator")
    if options.kind == "steps" and own is not None:
        given.setdefault("separator", own)
    count = export(read_run(options.folder), options.kind, options.out, leave_out=_spells(config), **given)
    print(f"{count} rows of kind {options.kind}: {options.out}")
    return 0


def _config(folder: Path) -> Mapping[str, Any]:
    """The run's configuration; nothing where it kept none."""
    import yaml

    path = folder / "config.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def _spells(config: Mapping[str, Any]) -> Any:
    """Whether a text spells a control token of the run's tokenizer."""
    if (model := config.get("model", {}).get("path")) is None:
        return None
    from jaxpost.text.tokenizer import load_tokenizer
    from jaxpost.weights.resolve import resolve_model

    return load_tokenizer(resolve_model(model, config["model"].get("revision"))).holds_special


COMMANDS = {"search-export": run}
