"""When a command starts anew to get huge pages, and with what."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxpost import host_memory


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """One where it is of use; what it was started with is in "started"."""
    found: dict[str, Any] = {"enabled": tmp_path / "enabled"}
    found["enabled"].write_text("always [madvise] never\n")
    monkeypatch.setattr(host_memory, "ENABLED", found["enabled"])
    monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execve", lambda *arguments: found.update(started=arguments))
    return found


@pytest.mark.parametrize("keep", [False, True])
def test_the_same_command_starts_anew_with_huge_pages(machine: dict[str, Any], keep: bool):
    host_memory.restart(keep=keep)
    program, words, environment = machine["started"]
    assert (program, words) == (sys.executable, sys.orig_argv)
    tunables = environment.pop("GLIBC_TUNABLES").split(":")
    assert environment == dict(os.environ)
    assert tunables[0] == "glibc.malloc.hugetlb=1"
    assert ("glibc.malloc.mmap_max=0" in tunables) == keep


@pytest.mark.parametrize("why", ["accelerator", "chosen", "always", "old", "musl", "unreadable"])
def test_it_goes_on_as_it_is_where_that_is_of_no_use(machine: dict[str, Any], why: str, monkeypatch):
    if why == "accelerator":
        monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    elif why == "chosen":
        monkeypatch.setenv("GLIBC_TUNABLES", "")
    elif why == "always":
        machine["enabled"].write_text("[always] madvise never\n")
    elif why == "unreadable":
        machine["enabled"].unlink()
    else:
        monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: ("glibc", "2.34") if why == "old" else ("", ""))
    host_memory.restart(keep=True)
    assert "started" not in machine


def test_a_command_starts_anew_once_and_keeps_its_arguments():
    program = "import sys, os; from jaxpost import host_memory as h; h._of_use = lambda: True\n"
    program += "h.restart(keep=False); print(sys.argv[1:], os.environ['GLIBC_TUNABLES'])"
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", program, "a b", "--c"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["['a b', '--c'] glibc.malloc.hugetlb=1"]


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="GLIBC_TUNABLES are glibc's")
def test_kept_memory_is_touched_once():
    """The second block of a process that keeps what it frees costs no page faults; without, it costs them again."""
    program = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults(size=2**27):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults())
"""
    counts = {}
    for tunables in (host_memory.HUGE_PAGES, host_memory.KEPT):
        command = [sys.executable, "-c", program]
        environment = os.environ | {"GLIBC_TUNABLES": tunables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        counts[tunables] = [int(x) for x in done.stdout.split()]
    assert counts[host_memory.HUGE_PAGES][1] > 10
    assert counts[host_memory.KEPT][1] < 5
