"""More programs that mean harm: system calls, programs that will not end, and what killed judges leave behind."""

import os
import sys
import time
from pathlib import Path

import pytest

from jaxpost.sandbox import run
from jaxpost.sandbox.limits import LEVELS, Limits
from jaxpost.sandbox.run import available, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="its attacks are for Linux")


@pytest.fixture(params=[level for level in LEVELS if level != "process"])
def closed(request):
    """A level that also keeps files, the network and other processes from the program."""
    if available()[request.param]:
        pytest.skip(available()[request.param])
    return request.param


def test_no_system_call_gives_more(closed):
    code = """
import ctypes, mmap, os, resource, socket
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, do):
    try:
        if do() != -1:
            print(name)
    except (OSError, ValueError):
        pass
for name in ("AS", "CPU", "FSIZE", "NPROC", "NOFILE", "CORE", "STACK"):
    attempt(name, lambda: resource.setrlimit(getattr(resource, "RLIMIT_" + name), (resource.RLIM_INFINITY,) * 2))
for family in range(46):
    for kind in (1, 2, 3, 5):
        attempt(f"socket {family} {kind}", lambda: socket.socket(family, kind))
for call in (425, 426, 427, 428, 434, 435, 437, 438, 442, 447, 452):
    attempt(f"call {call}", lambda: libc.syscall(call, 0, 0, 0, 0, 0))
attempt("real time", lambda: os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1)))
attempt("nice", lambda: os.nice(-5))
attempt("one processor", lambda: os.sched_setaffinity(0, {0}))
attempt("all users", lambda: libc.setresuid(0, 0, 0))
attempt("a large file", lambda: os.truncate(os.open("a", os.O_RDWR | os.O_CREAT), 10**12))
attempt("its blocks", lambda: os.posix_fallocate(os.open("b", os.O_RDWR | os.O_CREAT), 0, 10**9))
attempt("the input's file", lambda: os.write(0, b"x"))
attempt("memory", lambda: mmap.mmap(-1, 10**12))
attempt("root by su", lambda: -1 if os.spawnv(os.P_WAIT, "/usr/bin/su", ["su", "-c", "true"]) else 0)
for path in ("/dev/tty", "/dev/mem", "/proc/self/mem", "/proc/1/environ", "/sys/kernel", "/run", "/dev/shm"):
    attempt(path, lambda: os.listdir(path) if os.path.isdir(path) else open(path).read(1))
"""
    ran = run_python(code, isolation=closed, limits=Limits(seconds=20.0, processes=4, file_mb=2))
    assert (ran.stdout, ran.reason) == ("", "ok"), ran


def test_files_beneath_folders_that_no_path_can_name_count_too(closed):
    code = """
import os, time
for _ in range(2200):
    os.mkdir("d")
    os.chdir("d")
print("deep", flush=True)
for i in range(4):
    with open(str(i), "wb") as file:
        file.write(b"x" * 10**7)
time.sleep(9)
"""
    ran = run_python(code, isolation=closed, limits=Limits(seconds=3.0, file_mb=20))
    assert ran.reason == "files" or "No space left" in ran.stderr, ran
    assert not [name for name in os.listdir(run.tempfile.gettempdir()) if f"jaxpost-sandbox-{os.getpid()}-" in name]


def test_files_that_were_removed_and_are_held_open_count_too(closed):
    code = """
import sys, time, tempfile
read = len(sys.stdin.read())
held = []
for _ in range(10):
    held.append(tempfile.TemporaryFile())
    held[-1].write(b"x" * 4_000_000)
    held[-1].flush()
    time.sleep(0.1)
print(read)
time.sleep(9)
"""
    ran = run_python(code, isolation=closed, limits=Limits(seconds=5.0, file_mb=8))
    assert ran.reason == "files" or "No space left" in ran.stderr, ran
    short = code.replace("range(10)", "range(1)").replace("sleep(9)", "sleep(0.3)")
    ran = run_python(short, stdin="x" * 20_000_000, isolation=closed, limits=Limits(seconds=20.0, file_mb=8))
    assert (ran.stdout, ran.reason) == ("20000000\n", "ok"), ran


@pytest.mark.parametrize(
    "code",
    [
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nos.kill(0, signal.SIGSTOP)\nwhile True: pass",
        "import atexit, time, threading as t\natexit.register(time.sleep, 9)\nt.Timer(9, print).start()",
        "import os\nfor i in range(64):\n    try: os.close(i)\n    except OSError: pass\nwhile True: pass",
        "import os\nos.mkfifo('f')\nopen('f').read()",
        "x = 3 ** (10 ** 8)",
    ],
    ids=["stopped", "threads", "closed", "fifo", "one long call"],
)  # fmt: skip
def test_a_program_that_will_not_end_is_ended(closed, code):
    start = time.monotonic()
    assert run_python(code, isolation=closed, limits=Limits(seconds=0.3)).reason == "timeout"
    assert time.monotonic() - start < 10


def test_calls_of_another_architecture_are_the_end(closed):
    if os.uname().machine != "x86_64":
        pytest.skip("x32 is x86_64's")
    ran = run_python("import ctypes\nctypes.CDLL(None).syscall(0x40000000 | 41, 2, 1, 0)\nprint(1)", isolation=closed)
    assert (ran.stdout, ran.reason) == ("", "error")


def test_folders_of_killed_judges_are_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run.tempfile, "gettempdir", lambda: str(tmp_path))
    long_ago = time.time() - 2 * run.FORGOTTEN_SECONDS
    gone = 2**22 + 1  # beyond any process's number
    outside = tmp_path / "kept.txt"
    outside.write_text("mine")
    for pid, when in ((gone, long_ago), (gone, None), (os.getpid(), long_ago)):
        folder = tmp_path / f"jaxpost-sandbox-{pid}-{when is None}"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "link").symlink_to(outside)
        if when:
            os.utime(folder, (when, when))
    (tmp_path / f"jaxpost-sandbox-{gone}-link").symlink_to(tmp_path)
    run._remove_forgotten.cache_clear()
    run._remove_forgotten()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(
        [
            "kept.txt",
            f"jaxpost-sandbox-{gone}-True",
            f"jaxpost-sandbox-{os.getpid()}-False",
            f"jaxpost-sandbox-{gone}-link",
        ]
    )
    assert Path(outside).read_text() == "mine"
