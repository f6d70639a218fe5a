"""The `jaxpost` command: arguments, messages, exit codes. What is done is in `jaxpost.assemble`.

Only a command that computes imports jax, so `--help`, `config` and every complaint about arguments are immediate.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jaxpost import cli_help, cli_lab, cli_score, cli_search, disk, host_memory
from jaxpost.cli_arguments import parse, parser, split_flags
from jaxpost.cli_search_export import COMMANDS as EXPORT_COMMANDS
from jaxpost.config_check_rl import check_config
from jaxpost.config_flags import apply_flags, flags_help
from jaxpost.config_io import ConfigError, diff, dump, load, plain_value
from jaxpost.text.console import as_line, visible, writable

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      argv: the arguments after the program's name; None: the process's.

    Returns:
      The exit code: 0 done, 1 the run failed, 2 something that the user gave is wrong, 128 + n for signal n.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = bool(os.environ.get("JAXPOST_DEBUG"))
    if "--debug" in args:
        args.remove("--debug")
        debug = True
    try:
        own, flags = split_flags(args)
        options = parse(own)
        if flags and not options.takes_flags:
            parser().error(f"{options.command} takes no settings, but got {flags[0]}")
        options.own_process = argv is None
        code = COMMANDS[options.command](options, flags)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("jaxpost: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if debug:
            traceback.print_exc()
        return complain(error, debug=debug)


def complain(error: Exception, *, debug: bool) -> int:
    """Say what went wrong in the error's own words; the exit code."""
    usage = is_usage(error)
    ours = usage or type(error).__module__.startswith("jaxpost.")
    text = str(error) if ours else disk.told(error) if disk.is_full(error) else f"{type(error).__name__}: {error}"
    print(f"jaxpost: {'error' if usage else 'failed'}: {text}", file=sys.stderr)
    if not usage and not debug:
        print("(--debug shows where)", file=sys.stderr)
    return USAGE if usage else FAILED


def is_usage(error: Exception) -> bool:
    """Whether the user can mend it: a missing file, or a value that jaxpost itself turned down.

    A ValueError from inside another library is a fault of ours, not the user's. One of a class of ours counts wherever
    it comes up: from a worker process, multiprocessing raises it.
    """
    if type(error).__name__ in USAGE_ERRORS or isinstance(error, FILE_ERRORS):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    ours = "jaxpost" in (raised_in.partition(".")[0], type(error).__module__.partition(".")[0])
    return isinstance(error, ValueError) and ours


FILE_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
USAGE_ERRORS = ("RunFolderError",)
"""By name, because their modules are too slow to import before they are needed."""


def run_train(options: argparse.Namespace, flags: list[str]) -> int:
    if options.preset is None:
        if options.help:
            options.print_help()
            return OK
        raise ConfigError(
            "train needs a preset, before any flag: jaxpost train configs/sft/chitchat.yaml --train.steps 50"
        )
    config = apply_flags(load(options.preset), flags)
    if options.help:
        print(flags_help(config, f"jaxpost train {options.preset}", cli_help.TRAIN + "\n" + cli_help.TRAIN_EPILOG))
        return OK
    if options.own_process:
        host_memory.restart(keep=config.method == "rl")
    check_config(config)

    from jaxpost import assemble

    result = assemble.train(config, command=["jaxpost", "train", options.preset, *flags])
    if assemble.writes():
        from jaxpost.report import write_report

        print(f"The run as a page, with its curves and samples: {write_report(result.folder)}")
    return result.exit_code


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """Sampling parameters by name: what --max-tokens, --temperature and --set say."""
    found = _given(max_tokens=options.max_tokens, temperature=options.temperature)
    for assignment in options.set:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write NAME=VALUE, as in --set top_p=0.9")
        name, said = name.strip(), plain_value(value)
        if name in found and found[name] != said:
            raise ConfigError(f"{name} is said twice, as {found[name]!r} and as {said!r}: keep one")
        found[name] = said
    return found


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def run_generate(options: argparse.Namespace, flags: list[str]) -> int:
    if options.server is None and (options.model == "-" or options.server_model or options.policy_version is not None):
        raise ConfigError("MODEL -, --server-model and --policy-version need --server URL")
    sampling = sampling_of(options)
    prompts: list[Any] = list(options.prompts)
    if options.file is None and not prompts and not sys.stdin.isatty():
        _take_any_bytes()
        prompts = [prompt for prompt in sys.stdin.read().split("\n") if prompt.strip()]
    if options.file is not None and not options.file.is_file():
        raise FileNotFoundError(f"{options.file} does not exist: --file names a file of prompts")
    if not prompts and options.file is None:
        raise ConfigError('generate needs a prompt: jaxpost generate MODEL "What is the capital of France?"')

    from jaxpost import assemble

    own: list[Any] | None = None
    if options.file is not None:
        read, parameters = assemble.read_prompts(options.file, notes=sys.stderr)
        own = [{}] * len(prompts) + parameters
        prompts += read
    failed, encoding = 0, sys.stdout.encoding or "utf-8"
    for answer in _kept(_answers(options, prompts, sampling, own), options.out):
        failed += "error" in answer
        if options.json:
            print(as_line(answer, encoding), flush=True)
        elif options.out is None:
            said = f"(failed: {answer['error']})" if "error" in answer else answer["text"]
            told = f"> {_shown(answer['prompt'])}\n{said}\n"
            print(writable(visible(told) if sys.stdout.isatty() else told, encoding), flush=True)
    if options.out is not None:
        print(f"wrote {options.out}", file=sys.stderr)
    if failed:
        print(f"{failed} answers failed; their rows say why", file=sys.stderr)
    return FAILED if failed else OK


def _kept(answers: Any, out: Path | None) -> Iterator[dict[str, Any]]:
    """The answers; what fails as they are written to `out` names it."""
    with nullcontext() if out is None else disk.writing(out):
        yield from answers


def _take_any_bytes() -> None:
    """Reads what is no text as halves of surrogate pairs, so that only the line which holds them is refused."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _answers(options: argparse.Namespace, prompts: list[Any], sampling: dict[str, Any], own: Any) -> Any:
    """The rows of `generate`, by our own engine or by a server."""
    from jaxpost import assemble

    thinking = _given(min=options.think_min, max=options.think_max, waits=options.waits)
    schema = None if options.schema is None else _read_schema(options.schema)
    shape = _given(regex=options.regex, choice=options.choice, json=schema)
    common: dict[str, Any] = {"sampling": sampling, "seed": options.seed, "system": options.system}
    common |= {"chat": not options.raw, "own": own, "out": options.out, "progress": sys.stderr}
    if options.server is None:
        engine: dict[str, Any] = {"rows": options.rows, "shape": shape, "thinking": thinking}
        return assemble.generate(options.model, prompts, speculate=options.speculate, **engine, **common)
    if thinking or options.speculate or "num_beams" in sampling:
        raise ConfigError(
            "--think-min, --think-max and --waits (no server forces the end of thinking), num_beams (a server gives no "
            "beams but its own) and --speculate (the server's own business) do not go with --server: leave them out"
        )
    remote: dict[str, Any] = {"name": options.server_model, "model": None if options.model == "-" else options.model}
    remote |= {"requests": options.rows, "policy_version": options.policy_version or 0, "shape": shape}
    return assemble.ask_server(options.server, prompts, **remote, **common)


def _read_schema(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--schema {path} is not UTF-8 ({error.reason}); save the file in that encoding") from None


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def run_chat(options: argparse.Namespace, flags: list[str]) -> int:
    sampling = sampling_of(options)

    from jaxpost import assemble

    thinking = _given(min=options.think_min, max=options.think_max, waits=options.waits)
    talk = assemble.Conversation(
        options.model, system=options.system, sampling=sampling, thinking=thinking, seed=options.seed
    )
    print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")

    def write(text: str) -> None:
        print(writable(visible(text), sys.stdout.encoding or "utf-8"), end="", flush=True)

    _take_any_bytes()
    assemble.chat(talk, lambda: input("> "), write)
    print()
    return OK


def run_convert(options: argparse.Namespace, flags: list[str]) -> int:
    from jaxpost import assemble

    print(assemble.convert(options.source, options.out, dtype=options.dtype))
    return OK


def run_inspect(options: argparse.Namespace, flags: list[str]) -> int:
    config = check_config(apply_flags(load(options.preset), flags))
    color = options.color == "always" or (
        options.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )

    from jaxpost import assemble

    print(assemble.inspect(config, rows=options.rows, color=color))
    return OK


def run_show(options: argparse.Namespace, flags: list[str]) -> int:
    print(dump(apply_flags(load(options.preset), flags)), end="")
    return OK


def run_diff(options: argparse.Namespace, flags: list[str]) -> int:
    changes = diff(load(options.first), apply_flags(load(options.second), flags))
    print("\n".join(map(str, changes)) if changes else "no difference")
    return OK


def run_report(options: argparse.Namespace, flags: list[str]) -> int:
    from jaxpost import report

    if len(options.folders) == 1:
        from jaxpost.report.search import is_search, write_search

        write = write_search if is_search(options.folders[0]) else report.write_report
        written = write(options.folders[0], options.out.absolute() if options.out else "report.html")
    else:
        written = report.write_comparison(options.folders, options.out or Path("report.html"))
    print(f"wrote {written}")
    return OK


def run_env(options: argparse.Namespace, flags: list[str]) -> int:
    from jaxpost import assemble

    facts = assemble.environment()
    if options.json:
        print(json.dumps(facts, indent=2))
        return OK
    rows = [
        (f"{name} {part}" if part else name, value)
        for name, found in facts.items()
        for part, value in (found.items() if isinstance(found, dict) else [("", found)])
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return OK


COMMANDS = {
    "train": run_train,
    "generate": run_generate,
    "chat": run_chat,
    "convert": run_convert,
    "inspect": run_inspect,
    "show": run_show,
    "diff": run_diff,
    "report": run_report,
    "env": run_env,
    **EXPORT_COMMANDS,
    **cli_score.COMMANDS,
    **cli_lab.COMMANDS,
    **cli_search.COMMANDS,
}


if __name__ == "__main__":
    sys.exit(main())
