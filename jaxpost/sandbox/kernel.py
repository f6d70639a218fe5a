"""Linux system calls that Python's os module lacks, by ctypes."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from typing import Any

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2

_SET_PDEATHSIG, _SET_KEEPCAPS, _SET_SECCOMP, _CAPBSET_DROP = 1, 8, 22, 24
_SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS, _CAP_AMBIENT = 36, 38, 47
CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN = 2, 21

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
LANDLOCK_NEEDED = 3
"""The version from which truncation is refused too (Linux 6.2)."""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> int:
    result = getattr(_libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return int(result)


def _number(value: int) -> ctypes.c_ulong:
    return ctypes.c_ulong(value)


def _prctl(option: int, *arguments: int) -> int:
    filled = (*arguments, 0, 0, 0, 0)[:4]
    return _call("prctl", ctypes.c_int(option), *map(_number, filled))


def unshare(flags: int) -> None:
    """New namespaces for this process (for its children, in the case of process ids)."""
    _call("unshare", ctypes.c_int(flags))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    _call("mount", *(os.fsencode(text) for text in (source, target, kind)), _number(flags), os.fsencode(options))


def enter_root(folder: str) -> None:
    """Makes a mounted folder the root of the file system and lets the old one go."""
    os.chdir(folder)
    _call("syscall", ctypes.c_long(_PIVOT_ROOT[platform.machine()]), b".", b".")
    _call("umount2", b".", ctypes.c_int(MNT_DETACH))
    os.chdir("/")


def die_with_parent() -> None:
    """SIGKILL when the parent ends."""
    _prctl(_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Descendants whose parents end become children of this process."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def no_new_privileges() -> None:
    """Programs with the set-user-id bit give no rights any more; seccomp and Landlock demand it."""
    _prctl(_SET_NO_NEW_PRIVS, 1)


def has_capability(number: int) -> bool:
    """Whether a capability is in force."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False


def keep_capabilities() -> None:
    """The next change of user ids keeps them, for `only_capabilities` to choose from."""
    _prctl(_SET_KEEPCAPS, 1)


def only_capabilities(kept: Sequence[int] = ()) -> None:
    """Gives up all capabilities but these, which a program that is started keeps too."""
    for number in range(64):
        try:
            _prctl(_CAPBSET_DROP, number)
        except OSError:
            break  # past the last one, or not ours to drop: then there are none
    mask = sum(1 << number for number in kept)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)
    _call("capset", header, data)
    for number in kept:
        _prctl(_CAP_AMBIENT, 2, number)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install_filter(instructions: bytes) -> None:
    """A seccomp filter of 8-byte instructions for this process and all that it starts."""
    held = ctypes.create_string_buffer(instructions, len(instructions))
    program = _Program(len(instructions) // 8, ctypes.addressof(held))
    _prctl(_SET_SECCOMP, 2, ctypes.addressof(program))


def landlock_version() -> int:
    """0 where the kernel has no Landlock."""
    try:
        return _call("syscall", ctypes.c_long(_CREATE_RULESET), None, _number(0), _number(1))
    except OSError:
        return 0


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def restrict_files(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Landlock: files can be opened beneath these paths only; no TCP; no signals to processes outside.

    Raises:
      OSError: the kernel has no Landlock of version LANDLOCK_NEEDED.
    """
    version = landlock_version()
    if version < LANDLOCK_NEEDED:
        raise OSError(f"Landlock has version {version} here; {LANDLOCK_NEEDED} is needed")
    every = (1 << 15) - 1 | (1 << 15 if version >= 5 else 0)
    fields = [every, 3, 3][: 1 + (version >= 4) + (version >= 6)]
    rules = (ctypes.c_uint64 * len(fields))(*fields)
    ruleset = _call("syscall", ctypes.c_long(_CREATE_RULESET), rules, _number(ctypes.sizeof(rules)), _number(0))
    try:
        for paths, folder_rights, file_rights in ((readable, 0b1101, 0b101), (writable, every & ~0x8840, 0b110)):
            for path in paths:
                handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
                rights = folder_rights if os.path.isdir(path) else file_rights
                rule = _Beneath(rights, handle)
                _call("syscall", ctypes.c_long(_ADD_RULE), ctypes.c_int(ruleset), 1, ctypes.byref(rule), _number(0))
                os.close(handle)
        _call("syscall", ctypes.c_long(_RESTRICT_SELF), ctypes.c_int(ruleset), _number(0))
    finally:
        os.close(ruleset)
