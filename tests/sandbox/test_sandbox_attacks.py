"""Programs that mean harm: nothing escapes, hangs, stays, or is seen that should not be."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from jaxpost.sandbox.limits import LEVELS, Limits
from jaxpost.sandbox.run import available, run_python

QUICK = Limits(seconds=8.0, cpu_seconds=4, memory_mb=200, output_kb=32, file_mb=2)
SHORT = replace(QUICK, seconds=0.4)
FORKS = replace(SHORT, processes=6)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="its attacks are for Linux")


@pytest.fixture(params=LEVELS)
def level(request):
    if available()[request.param]:
        pytest.skip(available()[request.param])
    return request.param


@pytest.fixture(params=[level for level in LEVELS if level != "process"])
def closed(request):
    """A level that also keeps files, the network and other processes from the program."""
    if available()[request.param]:
        pytest.skip(available()[request.param])
    return request.param


def alive(mark: str) -> list[str]:
    """Processes with a mark on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            pass
    return found


def gone(mark: str, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while alive(mark) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(mark)


def marked(mark: str) -> str:
    """Python that becomes a process which sleeps and can be found."""
    return f"os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}])"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("while True: pass", "timeout"),
        ("import time\ntime.sleep(100)", "timeout"),
        (
            "import signal\nfor s in {*range(1, 32)} - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
            "timeout",
        ),
        ("9 ** 9 ** 9 ** 9", "timeout"),
        ("import re\nre.match('(a+)+$', 'a' * 40 + 'b')", "timeout"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "memory"),
        ("'a' * 10**11", "memory"),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", "output"),
        ("import os\nwhile True: os.write(2, b'x' * 65536)", "output"),
        ("import os\nwhile True: os.write(3, b'x' * 65536)", "output"),
        ("raise Exception('x' * 10**7)", "output"),
        ("import os\nos._exit(0)", "ok"),
        ("import os\nos.abort()", "error"),
        ("import ctypes\nctypes.string_at(0)", "error"),
        ("def f(): f()\nf()", "error"),
    ],
)  # fmt: skip
def test_limits_hold(level, code, reason):
    start = time.monotonic()
    ran = run_python(code, isolation=level, limits=SHORT if reason == "timeout" else QUICK)
    assert ran.reason == reason or (reason == "error" and ran.reason == "memory"), ran.stderr[-300:]
    assert time.monotonic() - start < 20
    assert len(ran.stdout) <= QUICK.output_kb << 10
    assert len(ran.stderr) <= QUICK.output_kb << 10


def test_memory_outside_of_the_address_space(closed):
    code = """
import os, ctypes
libc = ctypes.CDLL(None, use_errno=True)
try:
    os.memfd_create("x")
    print("memfd")
except OSError:
    pass
print(libc.shmget(0, 10**8, 0o1600), libc.mq_open(b"/x", 0o102, 0o600, None))
"""
    assert run_python(code, isolation=closed, limits=QUICK).stdout == "-1 -1\n"


@pytest.mark.parametrize("limits", [SHORT, FORKS])
def test_a_fork_bomb_ends(level, limits):
    mark = uuid.uuid4().hex
    code = f"""
import os, sys
while True:
    try:
        if os.fork() == 0 and os.getpid() % 3 == 0:
            {marked(mark)}
    except OSError:
        pass
"""
    ran = run_python(code, isolation=level, limits=limits)
    assert ran.reason == "timeout"
    assert gone(mark)


def test_threads_are_counted(level):
    code = """
import threading, time
n = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
        n += 1
except RuntimeError:
    print(n)
"""
    ran = run_python(code, isolation=level, limits=QUICK)
    assert 1 < int(ran.stdout) < 40


@pytest.mark.parametrize("limits", [SHORT, FORKS])
def test_daemons_end_with_the_program(level, limits):
    mark = uuid.uuid4().hex
    code = f"""
import os, sys, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.signal(signal.SIGHUP, signal.SIG_IGN)
if os.fork() == 0:
    for leave in (os.setsid, lambda: os.setpgid(0, 0)):
        try:
            leave()
        except OSError:
            pass
    if os.fork() == 0:
        {marked(mark)}
    os._exit(0)
print("done")
"""
    ran = run_python(code, isolation=level, limits=replace(limits, seconds=8.0))
    assert ran.seconds < 8
    assert ran.stdout == ("done\n" if limits is FORKS else "")
    assert gone(mark)


def test_the_program_ends_with_its_judge(level):
    mark = uuid.uuid4().hex
    script = f"""
from jaxpost.sandbox.limits import Limits
from jaxpost.sandbox.run import run_python
run_python("import os, sys\\n{marked(mark)}", isolation={level!r}, limits=Limits(seconds=50.0, processes=4))
"""
    with subprocess.Popen([sys.executable, "-c", script]) as judge:
        end = time.monotonic() + 30
        while len(alive(mark)) < 2 and time.monotonic() < end:  # the judge's own command line is the first
            time.sleep(0.02)
        assert len(alive(mark)) == 2
        judge.send_signal(signal.SIGKILL)
    assert gone(mark)


def test_other_processes_are_out_of_reach(closed):
    """Also from the user that the program is, which a test as root gives to the victim."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as victim:
        code = f"""
import ctypes, fcntl, os, signal
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, do):
    try:
        if do() != -1:
            print(name)
    except OSError:
        pass
for pid in ({victim.pid}, {os.getpid()}, os.getppid() or 999999, -1):
    attempt("kill", lambda: os.kill(pid, 9))
    attempt("tgkill", lambda: libc.syscall(234 if os.uname().machine == "x86_64" else 131, pid, pid, 9))
    attempt("queue", lambda: libc.sigqueue(pid, 9, None))
    attempt("pidfd", lambda: os.pidfd_open(pid) if pid > 0 else -1)
    attempt("attach", lambda: libc.ptrace(16, pid, 0, 0))
    attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, abs(pid), 19))
    attempt("prlimit", lambda: __import__("resource").prlimit(pid, 7, (0, 0)))
    read, write = os.pipe()
    attempt("owner", lambda: fcntl.fcntl(read, fcntl.F_SETOWN, pid))
    attempt("signal", lambda: fcntl.fcntl(read, fcntl.F_SETSIG, 9))
attempt("group", lambda: os.killpg({os.getpgid(0)}, 9))
"""
        ran = run_python(code, isolation=closed)
        assert (ran.reason, ran.stdout) == ("ok", ""), ran
        assert victim.poll() is None
        victim.kill()


def test_there_is_no_network(closed):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        name = f"\0jaxpost-{uuid.uuid4().hex}"
        unix.bind(name)
        unix.listen()
        server.settimeout(0.05), unix.settimeout(0.05)
        code = f"""
import socket, urllib.request
for family, address in (
    (socket.AF_INET, ("127.0.0.1", {server.getsockname()[1]})),
    (socket.AF_INET6, ("::1", {server.getsockname()[1]})),
    (socket.AF_UNIX, {name!r}),
):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            with socket.socket(family, kind) as s:
                s.connect(address)
                print("connected", family, kind)
        except OSError:
            pass
for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
    try:
        a, b = socket.socketpair(socket.AF_UNIX, kind)
        a.sendto(b"x", {name!r})
        print("sent")
    except OSError:
        pass
a, b = socket.socketpair()
try:
    a.connect({name!r})
    print("connected a pair")
except OSError:
    pass
a.send(b"within")
print(b.recv(9))
"""
        assert run_python(code, isolation=closed).stdout == "b'within'\n"
        for listener in (server, unix):
            with pytest.raises(TimeoutError):
                listener.accept()


def test_secrets_cannot_be_read(closed, tmp_path, monkeypatch):
    secret = f"secret-{uuid.uuid4().hex}"
    monkeypatch.setenv("JAXPOST_SECRET", secret)
    held = tmp_path / "key.txt"
    held.write_text(secret)
    for path in (held, tmp_path, tmp_path.parent, tmp_path.parent.parent):
        os.chmod(path, 0o755)
    os.chmod(held, 0o644)
    code = f"""
import os, glob, ctypes
found = []
paths = [{str(held)!r}, {str(Path(__file__))!r}, "/etc/passwd", "/etc/shadow", "/proc/self/environ", "/proc/self/maps",
         os.path.expanduser("~root/.bashrc"), "/dev/mem", "/dev/kmsg"]
for pid in (1, os.getppid(), {os.getpid()}):
    paths += [f"/proc/{{pid}}/environ", f"/proc/{{pid}}/mem", f"/proc/{{pid}}/cmdline", f"/proc/{{pid}}/fd/0"]
    paths += [f"/proc/{{pid}}/root" + {str(held)!r}, f"/proc/{{pid}}/cwd/pyproject.toml"]
for number, path in enumerate(paths):
    os.symlink(path, f"link{{number}}")
    for way in (path, f"link{{number}}", "../" * 30 + path.lstrip("/"), f"./link{{number}}"):
        try:
            found.append((way, open(way, "rb").read(64)))
        except OSError as error:
            pass
    try:
        os.link(path, f"hard{{number}}")
        found.append((path, open(f"hard{{number}}", "rb").read(64)))
    except OSError:
        pass
    try:
        os.rename(path, f"moved{{number}}")
        found.append((path, "moved"))
    except OSError:
        pass
for folder in ("/home", "/proc", "/var", {str(tmp_path)!r}):
    try:
        found.append((folder, os.listdir(folder)))
    except OSError:
        pass
print(found, os.environ)
"""
    ran = run_python(code, isolation=closed)
    assert ran.stdout.startswith("[] "), ran
    assert secret not in ran.stdout + ran.stderr
    assert held.read_text() == secret


def test_only_the_way_to_python_can_be_seen():
    if available()["namespaces"]:
        pytest.skip(available()["namespaces"])
    code = """
import os, sys
for folder, names, files in os.walk("/"):
    own = [sys.base_prefix, sys.base_exec_prefix, os.getcwd(), "/usr", "/lib", "/lib64", "/lib32", "/dev", "/etc"]
    if any(folder == p or folder.startswith(p + "/") for p in own):
        names.clear()
    elif files or (folder != "/" and not any(p.startswith(folder + "/") for p in own)):
        print(folder, names, files)
print(sorted(os.listdir("/dev")), set(os.listdir("/etc")) <= {"ld.so.cache", "localtime"})
"""
    ran = run_python(code, isolation="namespaces")
    assert ran.stdout == "['null', 'random', 'urandom', 'zero'] True\n", ran


def test_nothing_outside_can_be_changed(closed, tmp_path):
    held = tmp_path / "data.txt"
    held.write_text("as it was")
    library = Path(os.__file__)
    for path in (held, tmp_path, tmp_path.parent, tmp_path.parent.parent):
        os.chmod(path, 0o777)
    before = {path: (path.stat().st_mode, path.stat().st_mtime_ns, path.stat().st_size) for path in (held, library)}
    code = f"""
import os, ctypes
libc = ctypes.CDLL(None, use_errno=True)
for path in ({str(held)!r}, {str(library)!r}, "/etc/hosts", "/usr/x", "/dev/shm/{tmp_path.name}", "{tmp_path}/new"):
    for do in (
        lambda: open(path, "a").write("x"), lambda: os.truncate(path, 0), lambda: os.chmod(path, 0o777),
        lambda: os.utime(path, (1, 1)), lambda: os.unlink(path), lambda: os.chown(path, os.getuid(), -1),
        lambda: os.rename(path, path + "2"), lambda: os.setxattr(path, "user.a", b"b"),
        lambda: os.close(os.open(path, os.O_RDONLY | os.O_TRUNC)), lambda: os.mkdir(path + ".d"),
        lambda: os.symlink("a", path + ".l"), lambda: os.mkfifo(path + ".f"), lambda: os.mknod(path + ".n"),
    ):
        try:
            do()
            print("changed", path)
        except OSError:
            pass
print([libc.unshare(0x10020000), libc.mount(b"none", b"/", b"tmpfs", 0, None), libc.umount2(b"/usr", 2),
       libc.chroot(b"."), libc.setns(0, 0), libc.setuid(0), libc.syscall(425, 4, 0), libc.syscall(435, 0, 0)])
"""
    ran = run_python(code, isolation=closed)
    # Its own user is the program's already where that is root's namespace; all the rest must fail.
    assert ran.stdout == f"{[-1] * 8}\n", ran
    assert before == {
        path: (path.stat().st_mode, path.stat().st_mtime_ns, path.stat().st_size) for path in (held, library)
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.txt"]


def test_the_private_folder_is_small(level):
    one = """
import os
file = os.open('a', os.O_WRONLY | os.O_CREAT)
try:
    while True:
        os.write(file, b'x' * 10**5)
except OSError:
    print(os.fstat(file).st_size)
"""
    ran = run_python(one, isolation=level, limits=QUICK)
    assert ran.reason == "files" or int(ran.stdout) <= QUICK.file_mb << 20
    for size in (10**4, 0):
        many = f"""
i = 0
try:
    while True:
        open(str(i), 'wb').write(b'x' * {size})
        i += 1
except OSError:
    print(i, flush=True)
import time
time.sleep(9)
"""
        ran = run_python(many, isolation=level, limits=replace(QUICK, seconds=1.5))
        assert ran.reason == "files" or (ran.reason == "timeout" and int(ran.stdout or 0) < 5000)
