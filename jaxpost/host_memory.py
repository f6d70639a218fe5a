"""The size of the pages in which a CPU run gets its memory. Imports nothing slow: it must act before anything else."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

TUNABLE = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
SINCE = (2, 35)
"""glibc that knows the tunable."""
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def restart_with_huge_pages() -> None:
    """Starts this very command anew, with huge pages for what it allocates, where that is of use; else does nothing.

    A training step on a CPU allocates and frees gigabytes, and pays for each page that it touches first: 0.4 million
    pages of 4 KiB in a step of 4 x 256 tokens with SmolLM2-135M, 4 thousand where the kernel is asked for huge ones.
    Only the environment at a process's start can ask, hence the restart (the same process, by its number too). It is of
    use on a CPU alone, with glibc, where the kernel gives huge pages to those who ask ("madvise"). Whoever has set
    GLIBC_TUNABLES has chosen.
    """
    if TUNABLE not in os.environ and _of_use():
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, os.environ | {TUNABLE: HUGE_PAGES})


def _of_use() -> bool:
    name, version = platform.libc_ver()
    if sys.platform != "linux" or name != "glibc" or tuple(map(int, version.split(".")[:2])) < SINCE:
        return False
    platforms = os.environ.get("JAX_PLATFORMS", "")
    cpu = platforms == "cpu" or (not platforms and all(importlib.util.find_spec(x) is None for x in ACCELERATORS))
    try:
        return cpu and "[madvise]" in ENABLED.read_text()
    except OSError:
        return False
