"""Runs Python programs that nobody has read: `run_python`.

>>> run_python("print(sum(range(10)))").stdout
'45\\n'
"""

from __future__ import annotations

import json
import os
import platform
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jaxpost.sandbox.limits import LEVELS, Isolation, IsolationMissing, Level, Limits, Ran

START_SECONDS = 60.0
"""For the launcher, on a busy machine, beside the program's own time."""
FORGOTTEN_SECONDS = 3600.0
"""Age from which a folder whose process is gone was left behind by it, as when it was killed."""
_PREFIX = "jaxpost-sandbox-"
DRAIN_SECONDS = 1.0
"""For output that is on its way when the program has ended."""


class Launched(NamedTuple):
    """What a program did, and what it wrote on descriptor 3."""

    ran: Ran
    told: bytes


def run_python(code: str, *, stdin: str = "", limits: Limits | None = None, isolation: Isolation = "auto") -> Ran:
    """Runs a Python program in a process of its own, under limits, and kills all that it started.

    The program has an empty environment, an empty private folder as its working and home folder, and this Python's
    standard library. Nothing of it is ever part of a command. It may be called from any thread.

    Raises:
      IsolationMissing: the isolation does not work on this machine; nothing was run.
    """
    return launch({"main.py": code}, "main.py", stdin=stdin, limits=limits or Limits(), isolation=isolation).ran


@lru_cache(maxsize=1)
def available() -> Mapping[Level, str]:
    """Every level, the strongest first, with "" if it works on this machine, else the sentence that says why not."""
    found: dict[Level, str] = {}
    for level in LEVELS:
        try:
            ran = launch({"main.py": ""}, "main.py", stdin="", limits=Limits(seconds=30.0), isolation=level).ran
            found[level] = "" if ran.reason == "ok" else f"a program of no lines ended with {ran.reason}: {ran.stderr}"
        except IsolationMissing as error:
            found[level] = str(error)
    return found


def strongest() -> Level:
    """The level that "auto" stands for on this machine.

    Raises:
      IsolationMissing: none works.
    """
    for level, problem in available().items():
        if not problem:
            return level
    raise IsolationMissing("no isolation works here: " + "; ".join(available().values()))


def launch(files: Mapping[str, str], main: str, *, stdin: str, limits: Limits, isolation: Isolation) -> Launched:
    """Runs one of several files; raises as `run_python`."""
    level = strongest() if isolation == "auto" else isolation
    if level not in LEVELS:
        raise ValueError(f"there is no isolation {level!r}; choose auto, {', '.join(LEVELS)}")
    python = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    with ExitStack() as stack:
        _remove_forgotten()
        folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
        stack.callback(_remove, folder)
        text = stack.enter_context(tempfile.TemporaryFile())
        text.write(stdin.encode("utf-8", "surrogatepass"))
        text.seek(0)
        pipes = [os.pipe() for _ in range(3)]
        readers = [stack.enter_context(os.fdopen(reader, "rb", buffering=0)) for reader, _ in pipes]
        writers = [writer for _, writer in pipes]
        descriptors = [os.open(f"/dev/fd/{text.fileno()}", os.O_RDONLY), *writers]
        control, theirs = socket.socketpair()
        stack.enter_context(control)
        job = [
            level, asdict(limits), [python, "-P", "-s", "-B", "-X", "utf8", main], _python_folders(python), folder,
            dict(files), descriptors,
        ]  # fmt: skip
        try:
            process = subprocess.Popen(
                [python, "-I", "-S", "-B", str(Path(__file__).with_name("launcher.py")), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *descriptors],
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                start_new_session=True,
            )
        finally:
            theirs.close()
            for descriptor in descriptors:
                os.close(descriptor)
        stack.callback(_end, process, control)
        with suppress(BrokenPipeError, ConnectionResetError):
            control.sendall(json.dumps(job).encode() + b"\n")
        return _listen(control, readers, limits, level)


def _python_folders(python: str) -> list[str]:
    """What Python needs to start, besides the system's folders."""
    folders = {sys.base_prefix, sys.base_exec_prefix, os.path.dirname(python)}
    return sorted(os.path.realpath(folder) for folder in folders if os.path.realpath(folder) != "/")


def _listen(control: socket.socket, readers: list[Any], limits: Limits, level: Level) -> Launched:
    """Collects the program's output until its launcher reports."""
    room = limits.output_kb << 10
    heard = {reader: bytearray() for reader in readers}
    report, flooded = bytearray(), False
    deadline = time.monotonic() + limits.seconds + START_SECONDS
    with selectors.DefaultSelector() as selector:
        for source in (control, *readers):
            selector.register(source, selectors.EVENT_READ)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                source: Any = key.fileobj
                data = source.recv(65536) if source is control else source.read(65536)
                if not data:
                    selector.unregister(source)
                    if source is control:  # its launcher has ended, and with it the program
                        deadline = min(deadline, time.monotonic() + DRAIN_SECONDS)
                elif source is control:
                    report += data
                else:
                    buffer = heard[source]
                    buffer += data[: room + 1 - len(buffer)]
                    if len(buffer) > room and not flooded:
                        flooded = True
                        control.shutdown(socket.SHUT_WR)  # the launcher hears it and ends the program
    return _result(bytes(report), [bytes(heard[reader][:room]) for reader in readers], flooded, limits, level)


def _result(report: bytes, output: list[bytes], flooded: bool, limits: Limits, level: Level) -> Launched:
    stdout, stderr = (part.decode("utf-8", "replace") for part in output[:2])
    try:
        said: dict[str, Any] = json.loads(report)
    except ValueError:
        said = {"exit": -signal.SIGKILL, "reason": "timeout", "seconds": limits.seconds}
    if "missing" in said:
        raise IsolationMissing(
            f"the isolation {level!r} does not work on this machine ({platform.system()}): {said['missing']}"
        )
    reason = said["reason"]
    if flooded:
        reason = "output"
    elif reason == "ended":
        last = stderr.rstrip().rpartition("\n")[2]
        reason = "ok" if said["exit"] == 0 else "memory" if last.startswith("MemoryError") else "error"
    return Launched(Ran(stdout, stderr, said["exit"], reason, said["seconds"], level), output[2])


def _end(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    """The launcher ends when nobody listens; one that does not is killed, and the program dies with its parent."""
    control.close()
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@lru_cache(maxsize=1)
def _remove_forgotten() -> None:
    """Once a process: folders of judges that were killed before they could clean up."""
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as found:
        for entry in list(found):
            pid = entry.name.removeprefix(_PREFIX).partition("-")[0]
            if not entry.name.startswith(_PREFIX) or not pid.isdigit() or entry.is_symlink():
                continue
            with suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > FORGOTTEN_SECONDS and not _alive(
                    int(pid)
                ):
                    _remove(entry.path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(folder: str) -> None:
    """Removes a folder however deep: inner folders are moved up, so no path is ever long; no link is followed."""
    name, number = uuid.uuid4().hex, 0
    pending = [folder]
    while pending:
        here = pending.pop()
        with suppress(OSError):
            os.chmod(here, 0o700)
            with os.scandir(here) as found:
                entries = list(found)
            for entry in entries:
                with suppress(OSError):
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.path)
                        continue
                    os.chmod(entry.path, 0o700)
                    number += 1
                    moved = os.path.join(folder, f"{name}-{number}")
                    os.rename(entry.path, moved)
                    pending.append(moved)
            os.rmdir(here)
    shutil.rmtree(folder, ignore_errors=True)
