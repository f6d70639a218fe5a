"""The folder of a run: everything needed to understand it, go on with it, or use its model.

config.yaml        the resolved configuration          metrics.jsonl  one record per line
environment.json   one entry per start: versions, devices, command, git commit
samples.jsonl      answers at each evaluation          curves.svg     the metrics drawn
checkpoints/       train states                        export/        the model, for other programs
log.txt            what the console said               README.md      how to resume and use it
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
import shlex
import socket
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import yaml
from jax.experimental import multihost_utils

from jaxpost import disk
from jaxpost.checkpoint import versions

HARMLESS_KEYS = (
    "run.dir",
    "run.name",
    "run.loggers",
    "run.export",
    "run.resume",
    "run.allow_changed_config",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "data.prefetch",
    "data.workers",
    "run.trees",
    "engine",
)
"""Keys that cannot change what is learned, so a resumed run may change them freely. Everything else may not:
`train.steps` moves the learning-rate schedule, `mesh` and `train.microbatches` change the rounding of sums,
`train.eval_every` and `train.samples` change the metrics and samples that an uninterrupted run would have."""


_BEFORE_A_RUN = (".lock", "rejected", ".config.yaml.tmp")
"""What may lie in a folder before its run: the lock, rows that reading left out, a configuration half written."""


class RunFolderError(RuntimeError):
    """The run's folder cannot be used as asked; the message says why and what to do."""


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested configuration.

    >>> flatten_config({"optim": {"lr": 0.1}, "data": {"train": [{"path": "a"}]}})
    {'optim.lr': 0.1, 'data.train.0.path': 'a'}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten_config(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value:
            flat |= flatten_config({str(i): v for i, v in enumerate(value)}, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_changes(old_text: str, new_text: str) -> list[str]:
    """What changed between two configurations (YAML), key by key, but for keys that cannot change the result.

    >>> config_changes("optim: {lr: 0.1}\\ntrain: {log_every: 1}", "optim: {lr: 0.2}\\ntrain: {log_every: 5}")
    ['optim.lr: 0.1 -> 0.2']
    """
    old, new = (flatten_config(yaml.safe_load(text) or {}) for text in (old_text, new_text))
    missing = "(absent)"
    return [
        f"{key}: {old.get(key, missing)} -> {new.get(key, missing)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
        and not any(key == h or key.startswith(h + ".") for h in HARMLESS_KEYS)
    ]


class RunFolder:
    """A run's folder, held by one process at a time. Made by `open_folder`."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.writes = writes
        """Whether this process writes (process 0 does)."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def write(self, name: str, text: str) -> None:
        """Replace a file as a whole, so that a crash never leaves half of it."""
        if self.writes:
            temporary = self.path / f".{name}.tmp"
            try:
                with disk.writing(self.path / name):
                    temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, self.path / name)
            except OSError:
                temporary.unlink(missing_ok=True)  # a full disk would keep what there is no space for
                raise

    def record_start(self, command: Sequence[str], step: int) -> None:
        """Add this start to environment.json."""
        if not self.writes:
            return
        path = self.path / "environment.json"
        starts = _starts(path) if path.exists() else []
        starts.append(environment(command) | {"from_step": step})
        self.write("environment.json", json.dumps(starts, indent=2) + "\n")


@contextmanager
def open_folder(
    path: Path,
    *,
    config_text: str,
    resume: Literal["auto", "never", "must"] = "auto",
    allow_changed_config: bool = False,
) -> Generator[RunFolder]:
    """Make or reopen a run's folder and hold it until the end.

    Args:
        path: the folder.
        config_text: the resolved configuration; written as config.yaml, compared with the one that is there.
        resume: "never" refuses a folder that holds a run, "must" one that does not.
        allow_changed_config: take a folder whose run had another configuration; the old one is kept beside it.

    Raises:
        RunFolderError: another program's folder, another run's configuration (each difference is shown), a
            folder in use by another process, or against `resume`.
    """
    if str(path).startswith(("gs:/", "s3:/")):
        raise RunFolderError(f"{path} is a bucket; mount it (for instance with gcsfuse) and give the mounted folder.")
    path = Path(path).expanduser().absolute()
    with ExitStack() as stack:
        folder, error = RunFolder(path, writes=jax.process_index() == 0), None
        if folder.writes:
            try:
                _check(path, config_text, resume, allow_changed_config)
                path.mkdir(parents=True, exist_ok=True)
                _hold(stack.enter_context(open(path / ".lock", "a+")), path)
                _keep_config(folder, config_text)
            except (RunFolderError, OSError) as caught:
                error = caught
        _agree(path, error)
        yield folder


def _agree(path: Path, error: Exception | None) -> None:
    """All processes go on, or none: the first process's verdict, and whether the others see its folder."""
    if jax.process_count() > 1:
        mine = [int(error is not None), os.getpid() if jax.process_index() == 0 else 0]
        first = multihost_utils.process_allgather(np.array(mine))[0]
        lock = path / ".lock"
        if first[0]:
            error = error or RunFolderError(f"Process 0 cannot use {path}; its message says why.")
        elif not lock.exists() or f"pid {first[1]} " not in lock.read_text(encoding="utf-8"):
            error = RunFolderError(
                f"Process {jax.process_index()} does not see process 0's {path}: put it on storage "
                "that all hosts share."
            )
        failed = multihost_utils.process_allgather(np.array(int(error is not None)))
        if error is None and failed.any():
            error = RunFolderError(f"Process {int(failed.argmax())} cannot use {path}; its message says why.")
    if error is not None:
        raise error


def _check(path: Path, config_text: str, resume: str, allow_changed_config: bool) -> None:
    config = path / "config.yaml"
    if not config.exists():
        if path.exists() and (not path.is_dir() or any(not p.name.startswith(_BEFORE_A_RUN) for p in path.iterdir())):
            raise RunFolderError(
                f"{path} exists and is not a jaxpost run (it has no config.yaml); nothing was written. "
                "Choose another folder with --run.dir or --run.name."
            )
        if resume == "must":
            raise RunFolderError(f"--run.resume must: there is no run in {path} to resume.")
        return
    if resume == "never":
        raise RunFolderError(
            f"{path} already holds a run, and --run.resume never forbids going on with it. "
            "Choose another --run.name, or delete the folder."
        )
    changes = config_changes(_config_of(config), config_text)
    if changes and not allow_changed_config:
        raise RunFolderError(
            f"{path} holds a run with another configuration:\n  "
            + "\n  ".join(changes)
            + "\nTo start a new run, choose another --run.name. To go on with this one under the new settings, "
            "add --run.allow-changed-config (its result will be neither run's)."
        )


def _config_of(path: Path) -> str:
    """A run's configuration as it was written. Raises: RunFolderError where it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        if isinstance(yaml.safe_load(text), dict):
            return text
        why = "it holds no settings"
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:200]
    raise RunFolderError(
        f"{path} cannot be read as this run's configuration ({why}). Put back the file that the run wrote, or start a "
        "new run with --run.name."
    )


def _starts(path: Path) -> list[Any]:
    """The earlier starts of a run. Raises: RunFolderError where they cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, list):
            return found
        why = "it holds no list"
    except (ValueError, RecursionError) as error:
        why = str(error)
    raise RunFolderError(
        f"{path} is damaged ({why}). It only tells of this run's earlier starts: delete it and run the same command."
    )


def _hold(lock: Any, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        raise RunFolderError(
            f"Another process ({lock.read().strip() or 'unknown'}) is running in {path}. "
            "Wait for it, stop it, or choose another --run.name."
        ) from error
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
    lock.flush()


def _keep_config(folder: RunFolder, config_text: str) -> None:
    config = folder.path / "config.yaml"
    if config.exists() and (old := config.read_text(encoding="utf-8")) != config_text:
        number = 1
        while (folder.path / f"config.{number}.yaml").exists():
            number += 1
        folder.write(f"config.{number}.yaml", old)
    folder.write("config.yaml", config_text)


def environment(command: Sequence[str]) -> dict[str, Any]:
    """What this process runs on and with: versions, devices, command, git commit of the working folder."""
    devices = jax.devices()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "processes": jax.process_count(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "backend": devices[0].platform,
        "python": platform.python_version(),
        "versions": versions(),
        "git": _git_commit(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
    }


def _git_commit() -> str | None:
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + (" with uncommitted changes" if dirty.stdout.strip() else "")


def readme(folder: RunFolder, *, command: Sequence[str], status: str, results: Mapping[str, float]) -> str:
    """The page of a run: how far it came, what is here, how to go on."""
    lines = [f"# {folder.path.name}", "", status, ""]
    if results:
        lines += ["| metric | value |", "|---|---|", *(f"| {k} | {v:.6g} |" for k, v in results.items()), ""]
    lines += ["![curves](curves.svg)", "", "Started, and resumed after any interruption, with:", ""]
    lines += [f"    {shlex.join(command)}", ""]
    model = shlex.quote(str(folder.export))
    if (folder.export / "adapter_config.json").exists():
        lines += ["The trained adapter is in `export/` (PEFT's format). To merge it into its base and talk to it:", ""]
        lines += [f"    jaxpost convert {model} merged", '    jaxpost generate merged "What can you do?"', ""]
    elif folder.export.exists():
        lines += ["The trained model is in `export/` (Hugging Face's format). To talk to it:", ""]
        lines += [f'    jaxpost generate {model} "What can you do?"', ""]
    lines += [
        "| file | what |",
        "|---|---|",
        "| config.yaml | the resolved configuration; `jaxpost train config.yaml` repeats the run |",
        "| environment.json | versions, devices and command of each start |",
        "| metrics.jsonl | one record per line; what depends on the clock is under `time` |",
        "| samples.jsonl | answers at each evaluation |",
        "| curves.svg | the metrics drawn |",
        "| checkpoints/ | train states to resume from |",
        "| log.txt | what the console said |",
        "",
    ]
    return "\n".join(lines)
