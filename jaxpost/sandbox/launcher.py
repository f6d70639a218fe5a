"""The trusted process beside each program: `python launcher.py CONTROL` builds its cage, starts it, watches it, and
kills all that it started when it ends, when its time is over, or when nobody listens on CONTROL any more.

It runs in a fresh interpreter of one thread (forking a process with threads, jax among them, is not safe), with an
empty environment and the standard library alone, so nothing secret is in its memory.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from jaxpost.sandbox import kernel, seccomp
from jaxpost.sandbox.limits import THREADS, Limits

TICK = 0.05
"""Seconds between looks at what cannot be waited for."""
MAX_FILES = 4096
MAX_DEPTH = 64
"""Of folders in folders, where they are counted: deeper ones take long, and in the end have no path."""
LINUX = sys.platform == "linux"
DAY = 86400.0


class Missing(Exception):
    """Why an isolation does not work here."""


class Job(NamedTuple):
    """What is asked for, as it comes from `run`."""

    isolation: str
    limits: dict[str, Any]
    command: list[str]
    python: list[str]
    folder: str
    files: dict[str, str]
    descriptors: list[int]
    """What the program has as 0, 1, 2 and 3."""


class Place(NamedTuple):
    """Where and as whom the program runs."""

    folder: str
    user: int
    group: int
    drop: bool
    """Its user is another than this process's."""
    others: int
    """Processes of that user that the kernel counts beside the program's."""


def main(control: socket.socket) -> None:
    """One job: request in, report out."""
    with control.makefile("rb") as lines:
        job = Job(*json.loads(lines.readline()))
    try:
        report = run(job, control)
    except (Missing, OSError, ValueError) as error:
        report = {"missing": str(error)}
    with suppress(OSError):
        control.sendall(json.dumps(report).encode())


def run(job: Job, control: socket.socket) -> dict[str, Any]:
    """Starts the program and stays until nothing of it is left."""
    limits = Limits(**job.limits)
    os.umask(0o022)
    place = _prepare(job, limits)
    for name, text in job.files.items():
        path = os.path.join(place.folder, name)
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
        if place.drop:
            os.chown(path, place.user, place.group)
    pid = _start(job, limits, place)
    given = os.fstat(job.descriptors[0])
    for descriptor in job.descriptors:
        os.close(descriptor)
    started = time.monotonic()
    watched = None if job.isolation == "namespaces" else place.folder
    reason = _watch(pid, control, started + limits.seconds, watched, limits.file_mb << 20, given)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL) if job.isolation != "namespaces" else os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - started
    if job.isolation != "namespaces":
        _sweep(place)
    code = os.waitstatus_to_exitcode(status)
    if reason == "ended" and code in (-signal.SIGKILL, -signal.SIGXCPU):
        spent = usage.ru_utime + usage.ru_stime >= limits.cpu_seconds - 0.1
        reason = "timeout" if spent or code == -signal.SIGXCPU else reason
    return {"exit": code, "reason": reason, "seconds": seconds}


def _prepare(job: Job, limits: Limits) -> Place:
    """The file system, the user and the namespaces."""
    root = os.geteuid() == 0
    user, group = _spare_ids() if root else (os.geteuid(), os.getegid())
    if not LINUX:
        if job.isolation != "process":
            raise Missing(f"the isolation {job.isolation!r} needs Linux; this is {sys.platform}")
    else:
        kernel.adopt_orphans()
    if job.isolation == "filters" and kernel.landlock_version() < kernel.LANDLOCK_NEEDED:
        raise Missing(f"this kernel has no Landlock of version {kernel.LANDLOCK_NEEDED} or newer (Linux 6.2)")
    if job.isolation != "process" and not seccomp.supported():
        raise Missing("seccomp filters are known for Linux on x86_64 and aarch64 only")
    if job.isolation != "namespaces":
        if root:
            os.chown(job.folder, user, group)
        others = 0 if root else _tasks(user)
        return Place(job.folder, user, group, root, others)
    user, group = _new_namespaces(root, user, group)
    from jaxpost.sandbox import mounts

    mounts.enter(job.folder, job.python, size=limits.file_mb << 20, user=user, group=group)
    # Since Linux 5.14 a user namespace counts its own: this process and the program.
    newer = tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (5, 14)
    others = 0 if root else 1 if newer else _tasks(user)
    return Place(mounts.PRIVATE, user, group, root, others)


def _new_namespaces(root: bool, user: int, group: int) -> tuple[int, int]:
    """Leaves all that can be left; the program's user and group in them."""
    flags = kernel.NEWNS | kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS | kernel.NEWCGROUP
    try:
        if root:  # it may do so without a user namespace, and takes an unused user instead
            kernel.unshare(flags)
            return user, group
        kernel.unshare(flags | kernel.NEWUSER)
        inside = 1000
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{inside} {user} 1"),
            ("gid_map", f"{inside} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        raise Missing(f"namespaces cannot be made here: {error}") from error
    return inside, inside


def _spare_ids() -> tuple[int, int]:
    """A user and a group that nothing else has, so limits count this program alone."""
    found = []
    for name in ("uid_map", "gid_map"):
        wanted = [2**30 + os.getpid(), 50_000 + os.getpid() % 10_000]
        ranges = [(0, 2**31)]
        with suppress(OSError), open(f"/proc/self/{name}") as file:
            ranges = [(int(first), int(count)) for first, _, count in map(str.split, file)]
        inside = [i for i in wanted if any(first <= i < first + count for first, count in ranges)]
        if not inside:
            raise Missing(f"there is no unused id in /proc/self/{name} for the program; run as another user than root")
        found.append(inside[0])
    return found[0], found[1]


def _tasks(user: int) -> int:
    """Processes (on Linux, threads) that a user has now."""
    if not LINUX:
        table = subprocess.run(["ps", "-axo", "uid="], capture_output=True, text=True, check=True).stdout
        return sum(int(line) == user for line in table.split())
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/status") as status:
            fields = dict(line.split(":", 1) for line in status if ":" in line)
            count += int(fields["Threads"]) if int(fields["Uid"].split()[0]) == user else 0
    return count


def _start(job: Job, limits: Limits, place: Place) -> int:
    """Forks the program; back when it runs.

    Raises:
      Missing: it could not be started under these limits.
    """
    said, say = os.pipe()
    alive, held = os.pipe()  # `held` is closed when this process ends
    pid = os.fork()
    if pid == 0:
        try:
            os.close(held)
            _become(job, limits, place, alive, say)
        except BaseException as error:
            os.write(say, f"{type(error).__name__}: {error}"[:1000].encode())
        finally:
            os._exit(127)
    os.close(say)
    os.close(alive)
    with os.fdopen(said, "rb") as words:
        problem = words.read()
    if problem:
        os.waitpid(pid, 0)
        raise Missing(f"the program could not be started under the isolation {job.isolation!r}: {problem.decode()}")
    return pid


def _become(job: Job, limits: Limits, place: Place, alive: int, say: int) -> NoReturn:
    """In the child: everything is taken away, then the program takes its place."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    highest = [os.dup(descriptor) for descriptor in job.descriptors]
    for number, descriptor in enumerate(highest):
        os.dup2(descriptor, number)
    os.umask(0o077)
    os.chdir(place.folder)
    kept: list[int] = []
    if place.drop:
        kept = _leave_root(job, place)
    if LINUX:
        kernel.only_capabilities(kept)
        kernel.die_with_parent()
        kernel.no_new_privileges()
    if select.select([alive], [], [], 0)[0]:
        os._exit(127)  # the parent ended before
    if job.isolation == "filters":
        system = [path for path in (*_system(), *job.python) if os.path.exists(path)]
        kernel.restrict_files(system, [place.folder, "/dev/null"])
    _keep_only(4, say)
    _limit(limits, place)
    # Of the level "process" it is no part, but it makes the kill of its group sure.
    with suppress(OSError) if job.isolation == "process" else nullcontext():
        _filter(job, limits)
    home = place.folder
    # Hashes and so the order of sets are the same in every run; a thread's own heap would reserve 64 MB of its memory.
    environment = {"HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    environment |= {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
    os.execve(job.command[0], job.command, environment)


def _filter(job: Job, limits: Limits) -> None:
    inside = job.isolation == "namespaces"
    if LINUX and seccomp.supported():
        code = seccomp.build(own_processes=inside, own_files=inside, may_fork=limits.processes > 1, pid=os.getpid())
        kernel.install_filter(code)


def _system() -> tuple[str, ...]:
    from jaxpost.sandbox.mounts import DEVICES, SYSTEM

    return (*SYSTEM, *DEVICES)


def _leave_root(job: Job, place: Place) -> list[int]:
    """Takes the unused user; the capabilities that are left to it."""
    os.setgroups([])
    os.setresgid(place.group, place.group, place.group)
    if LINUX:
        kernel.keep_capabilities()
    os.setresuid(place.user, place.user, place.user)
    if job.isolation == "process" and not os.access(job.command[0], os.X_OK):
        raise Missing(f"{job.command[0]} lies in a folder of root's, and the program runs as another user")
    # Python may lie in root's home: under Landlock, a right to read all is a right to read Python's files.
    return [kernel.CAP_DAC_READ_SEARCH] if job.isolation == "filters" else []


def _keep_only(first: int, say: int) -> None:
    """Closes what was inherited, from `first` on; `say` closes itself when the program starts."""
    os.set_inheritable(say, False)
    os.closerange(first, say)
    os.closerange(say + 1, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 65536))


def _limit(limits: Limits, place: Place) -> None:
    allowed = limits.processes if limits.processes > 1 else THREADS
    values = {
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_FSIZE": limits.file_mb << 20,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_STACK": 8 << 20,
        "RLIMIT_NPROC": allowed + place.others,
        "RLIMIT_AS": limits.memory_mb << 20,
    }
    for name, value in values.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def _watch(
    pid: int, control: socket.socket, deadline: float, folder: str | None, size: int, given: os.stat_result
) -> str:
    """Waits for the program's end, its deadline, the other side's end, or too many files."""
    poller = select.poll()
    poller.register(control, select.POLLIN | select.POLLHUP)
    handle = -1
    with suppress(OSError, AttributeError):
        handle = os.pidfd_open(pid)
        poller.register(handle, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        tick = left if folder is None and handle >= 0 else min(left, TICK)
        events = dict(poller.poll(1000 * min(tick, DAY)))
        if control.fileno() in events:
            return "stopped"
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return "ended"
        if folder is not None and _full(folder, size, _nameless(pid, given)):
            return "files"
    return "timeout"


def _full(folder: str, size: int, held: int) -> bool:
    """Whether a folder and what is held beside it are more, or too many files, or too deep or closed to be counted."""
    waiting, count, total = [(folder, 0)], 0, held
    while waiting:
        path, depth = waiting.pop()
        if depth > MAX_DEPTH:
            return True
        try:
            found = os.scandir(path)
        except (FileNotFoundError, NotADirectoryError):
            continue  # the program has moved it
        except OSError:
            return True
        with found as entries:
            for entry in entries:
                count += 1
                with suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                if count > MAX_FILES or total > size:
                    return True
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, depth + 1))
    return total > size


def _nameless(pid: int, given: os.stat_result) -> int:
    """Bytes of the files that a process has removed and holds open; the one of its input is not its own."""
    held: dict[tuple[int, int], int] = {}
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                one = os.stat(f"/proc/{pid}/fd/{name}")
                if stat.S_ISREG(one.st_mode) and not one.st_nlink and not os.path.samestat(one, given):
                    held[one.st_dev, one.st_ino] = one.st_blocks * 512
    return sum(held.values())


def _sweep(place: Place) -> None:
    """Kills what left the program's group: all of its user, or all descendants, which this process has adopted."""
    if place.drop:
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                os.setresuid(place.user, place.user, place.user)
                os.kill(-1, signal.SIGKILL)
            os._exit(0)
    while True:
        for child in _children():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _children() -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc") if LINUX else []):
        with suppress(OSError, ValueError), open(f"/proc/{name}/stat") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
