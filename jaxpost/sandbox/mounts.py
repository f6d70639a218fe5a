"""A file system for one program: Python's own files, read-only, and an empty private folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jaxpost.sandbox import kernel

PRIVATE = "/sandbox"
"""The program's folder in it."""
SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/lib32",
    "/libx32",
    "/nix/store",
    "/gnu/store",
    "/etc/ld.so.cache",
    "/etc/localtime",
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_KEPT = {os.ST_NOSUID: kernel.MS_NOSUID, os.ST_NODEV: kernel.MS_NODEV, os.ST_NOEXEC: kernel.MS_NOEXEC}


def enter(folder: str, python: Sequence[str], *, size: int, user: int, group: int) -> None:
    """Replaces the root of this process's mount namespace by a new one, mounted on `folder`.

    Args:
      python: folders of the interpreter, outside of the system's.
      size: bytes of the private folder.
      user, group: its owner.
    """
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    safe = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", folder, "tmpfs", kernel.MS_NOSUID, "size=1m,nr_inodes=256,mode=0755")
    for path in (*SYSTEM, *DEVICES, *python):
        _show(path, folder)
    private = folder + PRIVATE
    os.mkdir(private)
    options = f"size={size},nr_inodes=4096,mode=0700,uid={user},gid={group}"
    kernel.mount("tmpfs", private, "tmpfs", safe, options)
    os.symlink(PRIVATE, folder + "/tmp") if not os.path.lexists(folder + "/tmp") else None
    kernel.mount("none", folder, "", kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID, "size=1m,mode=0755")
    kernel.enter_root(folder)


def _show(path: str, root: str) -> None:
    """Puts a path of the old root into the new one, read-only; links are copied."""
    target = root + path
    if not os.path.lexists(path) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        Path(target).touch()
    kernel.mount(path, target, "", kernel.MS_BIND | kernel.MS_REC)
    if path not in DEVICES:
        held = os.statvfs(target).f_flag
        kept = sum(flag for shown, flag in _KEPT.items() if held & shown)
        flags = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
        kernel.mount("none", target, "", flags | kept)
