"""How a CPU run gets its memory, and whether it gives it back. Imports nothing slow: it acts before anything else."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

TUNABLE = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
KEPT = f"{HUGE_PAGES}:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**36}:glibc.malloc.arena_max=1"
"""One heap that is never given back."""
SINCE = (2, 35)
"""glibc that knows the tunable."""
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def restart(*, keep: bool) -> None:
    """Starts this very command anew, with huge pages for what it allocates, where that is of use; else does nothing.

    A training step on a CPU allocates and frees gigabytes, and pays for each page that it touches first: 0.4 million
    pages of 4 KiB in a step of 4 x 256 tokens with SmolLM2-135M, 4 thousand where the kernel is asked for huge ones.
    Only the environment at a process's start can ask, hence the restart (the same process, by its number too). It is of
    use on a CPU alone, with glibc, where the kernel gives huge pages to those who ask ("madvise"). Whoever has set
    GLIBC_TUNABLES has chosen.

    Args:
        keep: what is freed stays with the process. In a run that draws samples between its updates, a virtual machine's
            host takes free memory back meanwhile, and is slow to return it: 1.5 of 8.4 s of an update. Where updates
            follow one another this gains nothing, and a heap cut up by small blocks grows.
    """
    if TUNABLE not in os.environ and _of_use():
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, os.environ | {TUNABLE: KEPT if keep else HUGE_PAGES})


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
