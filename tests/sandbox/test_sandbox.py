"""What the sandbox promises to a program that means well, and what it says where it cannot keep a promise."""

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxpost.sandbox import run
from jaxpost.sandbox.limits import LEVELS, IsolationMissing, Limits
from jaxpost.sandbox.run import available, run_python, strongest

pytestmark = pytest.mark.skipif(
    not any(not problem for problem in available().values()), reason="no isolation works on this machine"
)


@pytest.fixture(params=LEVELS)
def level(request):
    if available()[request.param]:
        pytest.skip(available()[request.param])
    return request.param


def left_behind():
    return {name for name in os.listdir(run.tempfile.gettempdir()) if name.startswith("jaxpost-sandbox-")}


def test_output_exit_code_and_input_come_through(level):
    code = "import sys\nname = input()\nprint('grüß', name)\nsys.stderr.write('oh')\nsys.exit(3)"
    ran = run_python(code, stdin="Zoë\nmore", isolation=level)
    assert ran[:4] == ("grüß Zoë\n", "oh", 3, "error")
    assert ran.isolation == level
    assert 0 < ran.seconds < 5
    fine = run_python("exit()", isolation=level)
    assert (fine.exit, fine.reason) == (0, "ok")


def test_the_program_starts_with_nothing(level, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret-7261")
    code = """
import json, os
descriptors = []
for number in range(64):
    try:
        os.fstat(number)
        descriptors.append(number)
    except OSError:
        pass
print(json.dumps([sorted(os.environ), descriptors, os.listdir("."), os.getcwd(), os.environ["HOME"]]))
open("mine.txt", "w").write("x")
import tempfile
tempfile.TemporaryFile().write(b"x")
"""
    ran = run_python(code, isolation=level)
    assert ran.reason == "ok", ran.stderr
    names, descriptors, files, folder, home = json.loads(ran.stdout)
    assert set(names) <= {"HOME", "TMPDIR", "PATH", "LANG", "PYTHONHASHSEED", "MALLOC_ARENA_MAX", "LC_CTYPE"}
    assert descriptors == [0, 1, 2, 3]
    assert files == ["main.py"]
    assert folder == home


def test_the_usual_library_works(level):
    code = """
import asyncio, collections, decimal, fractions, itertools, json, random, re, threading, datetime, typing, unicodedata
async def f():
    await asyncio.sleep(0.001)
    return 5
print(asyncio.run(f()), random.Random(0).random() < 1, unicodedata.name("a"), datetime.date(2020, 1, 1))
found = []
threads = [threading.Thread(target=found.append, args=(i,)) for i in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
print(sorted(found))
"""
    ran = run_python(code, isolation=level)
    assert ran.stdout == "5 True LATIN SMALL LETTER A 2020-01-01\n[0, 1, 2, 3]\n", ran.stderr


def test_the_same_program_says_the_same_again(level):
    code = "print({'a', 'b', 'c', 'd', 'e'}, hash('x'))"
    assert run_python(code, isolation=level).stdout == run_python(code, isolation=level).stdout != ""


def test_processes_where_they_are_allowed(level):
    code = (
        "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'print(4)'], capture_output=True).stdout)"
    )
    assert run_python(code, isolation=level, limits=Limits(processes=4)).stdout == "b'4\\n'\n"
    assert run_python(code, isolation=level).reason == "error" or level == "process"


def test_many_at_once_from_threads(level):
    with ThreadPoolExecutor(8) as pool:
        runs = pool.map(
            lambda i: run_python(f"print({i} ** 2)", isolation=level, limits=Limits(seconds=30.0)), range(12)
        )
        assert [ran.stdout for ran in runs] == [f"{i**2}\n" for i in range(12)]


def test_nothing_stays_behind(level):
    before, threads = left_behind(), threading.active_count()
    descriptors = len(os.listdir("/dev/fd")) if Path("/dev/fd").is_dir() else 0
    deep = """
import os
for i in range(600):
    os.mkdir('d')
    os.chdir('d')
    open('f', 'w').write('x')
os.mkdir('z', 0)
"""
    # Where its folders are counted, one that is closed ends the program.
    assert run_python(deep, isolation=level).reason in ("ok", "files")
    hostile = """
import os
for name in ('a', 'b'):
    os.makedirs(f'{name}/{name}')
    os.symlink('/', f'{name}/l')
os.symlink('..', 'up')
"""
    assert run_python(hostile, isolation=level).reason == "ok"
    assert left_behind() <= before
    assert threading.active_count() == threads
    assert (len(os.listdir("/dev/fd")) if descriptors else 0) == descriptors


def test_strange_programs_fail_by_themselves(level):
    assert "null bytes" in run_python("a\0b", isolation=level).stderr
    assert run_python("\ud800", isolation=level).reason == "error"
    assert run_python("print(" * 2000, isolation=level).reason in ("error", "memory")
    assert run_python("", isolation=level).reason == "ok"


def test_auto_is_the_strongest_that_works_and_says_so():
    ran = run_python("", isolation="auto")
    works = [level for level in LEVELS if not available()[level]]
    assert ran.isolation == strongest() == works[0]


def test_an_isolation_that_is_missing_is_refused(monkeypatch):
    with pytest.raises((ValueError, TypeError), match="docker"):
        run_python("", isolation="docker")
    missing = [level for level in LEVELS if available()[level]]
    for level in missing:
        with pytest.raises(IsolationMissing, match=f"'{level}' does not work on this machine"):
            run_python("", isolation=level)
    monkeypatch.setattr(run, "available", lambda: dict.fromkeys(LEVELS, "nothing here"))
    with pytest.raises(IsolationMissing, match="nothing here"):
        run_python("")


def test_a_launcher_that_cannot_begin_is_a_refusal(monkeypatch, tmp_path):
    """Whatever fails on the way, the program is not run with less."""
    level = strongest()
    mark = tmp_path / "ran"
    monkeypatch.setattr(run, "_python_folders", lambda python: [])
    if not os.path.realpath(sys.executable).startswith("/usr/"):
        with pytest.raises(IsolationMissing, match="could not be started"):
            run_python(f"open({str(mark)!r}, 'w')", isolation=level)
    assert not mark.exists()


def test_limits_that_cannot_be():
    with pytest.raises(ValueError, match=r"seconds = 0.* must be positive"):
        Limits(seconds=0.0)
    with pytest.raises(ValueError, match="memory_mb = 8: Python itself needs 64"):
        Limits(memory_mb=8)


def test_a_short_limit_counts_the_program_alone(level):
    start = time.monotonic()
    ran = run_python("import time; time.sleep(60)", isolation=level, limits=Limits(seconds=0.3))
    assert ran.reason == "timeout"
    assert 0.3 <= ran.seconds < 2
    assert time.monotonic() - start < 20
