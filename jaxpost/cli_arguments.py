"""The arguments of the `jaxpost` command. Imports nothing slow; what the commands do is in `jaxpost.cli`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpost import __version__, cli_help, cli_lab, cli_score, cli_search
from jaxpost.cli_search_export import add as add_export
from jaxpost.config_io import METHODS, hints


def split_flags(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and the settings among them (`--optim.lr 1e-6`) with their words.

    >>> split_flags(["train", "p.yaml", "--optim.lr", "1e-6", "--help"])
    (['train', 'p.yaml', '--help'], ['--optim.lr', '1e-6'])
    """
    names = {name for method in METHODS.values() for name in hints(method)}
    own: list[str] = []
    flags: list[str] = []
    target = own
    for arg in args:
        if arg.startswith("-") and not _is_number(arg):
            name = arg[2:].partition("=")[0].replace("-", "_")
            target = flags if arg.startswith("--") and ("." in name or name in names) else own
        target.append(arg)
    return own, flags


def _is_number(arg: str) -> bool:
    try:
        float(arg)
    except ValueError:
        return False
    return True


def parser() -> argparse.ArgumentParser:
    """The commands and their own arguments."""
    top = argparse.ArgumentParser(
        prog="jaxpost",
        description=cli_help.MAIN,
        epilog=cli_help.MAIN_EPILOG + "\n--debug, or JAXPOST_DEBUG=1, shows an error's traceback.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"jaxpost {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    train = _command(commands, "train", "train a model", cli_help.TRAIN, flags=True, add_help=False)
    train.add_argument("preset", nargs="?", metavar="PRESET", help="a YAML file, e.g. configs/sft/chitchat.yaml")
    train.add_argument("-h", "--help", action="store_true", help="with a PRESET: every flag and its value")

    generate = _command(commands, "generate", "answer prompts", cli_help.GENERATE)
    generate.add_argument("model", metavar="MODEL", help="folder, hub id, smollm2-135m-instruct; - if none")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="none: one a line from standard input")
    generate.add_argument("--file", type=Path, metavar="FILE", help="one prompt a line, or JSONL (prompt, messages)")
    generate.add_argument("--out", type=Path, metavar="FILE", help="JSONL of answers; what it holds is not made again")
    generate.add_argument("--rows", type=int, default=32, metavar="N", help="answers written together (default: 32)")
    _sampling(generate, "256", "0, the default: the best token")
    generate.add_argument("--raw", action="store_true", help="no chat format: continue the text as it stands")
    generate.add_argument("--json", action="store_true", help="one JSON object a line")
    generate.add_argument(
        "--speculate", type=int, default=0, metavar="K", help="guess K tokens from the text itself: faster, same answer"
    )
    _thinking(generate)
    _server(generate)
    _shape(generate)

    chat = _command(commands, "chat", "talk with a model", cli_help.CHAT)
    chat.add_argument("model", metavar="MODEL", help="folder, hub id or smollm2-135m-instruct")
    _sampling(chat, "512", "default: 0.7; 0 is the best token")
    _thinking(chat)

    convert = _command(commands, "convert", "write a model as a Hugging Face folder", cli_help.CONVERT)
    convert.add_argument("source", metavar="SOURCE", help=".gguf file, folder, hub id or adapter folder")
    convert.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")

    _looking(commands)

    report = _command(commands, "report", "a run as one page to look at", cli_help.REPORT)
    report.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="a run's folder; several are compared")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in RUN, of several: here")

    add_export(commands)
    cli_score.add(commands)
    cli_lab.add(commands)
    cli_search.add(commands)

    env = _command(commands, "env", "versions and devices", cli_help.ENV)
    env.add_argument("--json", action="store_true", help="as JSON")
    return top


def _looking(commands: Any) -> None:
    """The commands that look before anything is computed."""
    data = commands.add_parser("data", help="look at training data", description="Look at training data.")
    data_commands = data.add_subparsers(metavar="COMMAND", required=True)
    inspect = _command(data_commands, "inspect", "rows, masks, lengths", cli_help.INSPECT, flags=True)
    inspect.add_argument("preset", metavar="PRESET", help="a YAML file")
    inspect.add_argument("--rows", type=int, default=3, metavar="N", help="rows to print (default: 3)")
    inspect.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: auto")

    config = commands.add_parser("config", help="look at presets", description="Look at presets.")
    config_commands = config.add_subparsers(metavar="COMMAND", required=True)
    show = _command(config_commands, "show", "every setting", cli_help.SHOW, flags=True)
    show.add_argument("preset", metavar="PRESET", help="a YAML file")
    compare = _command(config_commands, "diff", "what differs", cli_help.DIFF, flags=True)
    compare.add_argument("first", metavar="PRESET", help="a YAML file")
    compare.add_argument("second", metavar="OTHER", help="a YAML file")


def _sampling(made: argparse.ArgumentParser, longest: str, temperature: str) -> None:
    made.add_argument("--max-tokens", type=int, metavar="N", help=f"longest answer (default: {longest})")
    made.add_argument("--temperature", type=float, metavar="T", help=temperature)
    made.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="top_p=0.9, n=4, stop=END ...")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling noise (default: 0)")
    made.add_argument("--system", metavar="TEXT", help="a system turn ('': none, not even the template's)")


def _thinking(made: argparse.ArgumentParser) -> None:
    made.add_argument("--think-min", type=int, metavar="N", help="fewest tokens between <think> and </think>")
    made.add_argument("--think-max", type=int, metavar="N", help="most tokens there; then </think> is written")
    made.add_argument("--waits", type=int, metavar="N", help='"Wait" in the place of N ends before --think-min')


def _shape(made: argparse.ArgumentParser) -> None:
    shape = made.add_mutually_exclusive_group()
    shape.add_argument("--regex", metavar="PATTERN", help="every answer matches this regular expression")
    shape.add_argument("--choice", action="append", metavar="TEXT", help="every answer is one of these (repeat it)")
    shape.add_argument("--schema", type=Path, metavar="FILE", help="every answer is JSON of this JSON schema")


def _server(made: argparse.ArgumentParser) -> None:
    made.add_argument("--server", metavar="URL", help="an OpenAI-compatible server answers; MODEL scores its tokens")
    made.add_argument("--server-model", metavar="NAME", help="as the server calls it (default: the one that it serves)")
    made.add_argument("--policy-version", type=int, metavar="N", help="of the server's weights, for the rows")


def parse(args: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments. Prompts may also follow options, which argparse alone would not take."""
    options, rest = parser().parse_known_args(args)
    if rest and hasattr(options, "prompts") and not any(word.startswith("-") for word in rest):
        options.prompts += rest
    elif rest:
        parser().error(f"unrecognized arguments: {' '.join(rest)} (see jaxpost {options.command} --help)")
    return options


def _command(
    commands: Any,
    name: str,
    summary: str,
    description: str,
    *,
    flags: bool = False,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    made = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=getattr(cli_help, f"{name.upper()}_EPILOG"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=add_help,
    )
    made.set_defaults(command=name, takes_flags=flags, print_help=made.print_help)
    return made
