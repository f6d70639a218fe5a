"""The filter of system calls: a list of what a program has no business with, as a program for the kernel (BPF).

Python's own calls pass. Calls that are newer than the lists fail as unknown ones do, so that nothing new (io_uring ...)
goes around them.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Sequence

# Numbers on x86_64 and aarch64; None where the machine has no such call.
_NETWORK = {
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200),
    "listen": (50, 201),
}  # fmt: skip
_OTHER_PROCESSES = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "perf_event_open": (298, 241), "setsid": (112, 157), "setpgid": (109, 154), "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
_MACHINE = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "swapon": (167, 224),
    "swapoff": (168, 225), "reboot": (169, 142), "sethostname": (170, 161), "setdomainname": (171, 162),
    "init_module": (175, 105), "delete_module": (176, 106), "finit_module": (313, 273), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "syslog": (103, 116), "quotactl": (179, 60),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "userfaultfd": (323, 282), "unshare": (272, 97), "setns": (308, 268), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
    "lookup_dcookie": (212, 18), "vhangup": (153, 58), "uselib": (134, None), "personality": (135, 92),
    "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "inotify_init": (253, None),
    "inotify_init1": (294, 26), "seccomp": (317, 277),
}  # fmt: skip
# Memory that no limit of a process counts, or that outlives it.
_SHARED_MEMORY = {
    "memfd_create": (319, 279), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
# What Landlock leaves to the owner of a file.
_FILES = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
_SIGNALS = {
    "kill": (62, 129), "tgkill": (234, 131), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}  # fmt: skip
_START = {"fork": (57, None), "vfork": (58, None)}
_BY_ARGUMENT = {
    "clone": (56, 220), "socketpair": (53, 199), "prlimit64": (302, 261), "prctl": (157, 167), "fcntl": (72, 25),
    "ioctl": (16, 29),
}  # fmt: skip
_NEWEST = 424
"""From here on both machines count alike, and what is not among these is unknown to the program."""
_NEWER = (436, 439, 441, 449)
"""close_range, faccessat2, epoll_pwait2, futex_waitv."""

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE_NEW, _CLONE_THREAD = 0x7E020000, 0x10000

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x50000
_EPERM, _ENOSYS = 1, 38

_Code = list[tuple[int, int, int, int]]


def supported() -> bool:
    """Whether the numbers of this machine's system calls are known."""
    return platform.machine() in _MACHINES


def build(*, own_processes: bool, own_files: bool, may_fork: bool, pid: int) -> bytes:
    """The filter for process `pid`, as instructions for the kernel.

    Args:
      own_processes: it sees no processes but its own, so it may send signals; else only to itself and its group.
      own_files: it sees no files of others, so it may change modes and owners.
      may_fork: it may start processes.
    """
    column, machine = _MACHINES[platform.machine()]
    denied = _NETWORK | _OTHER_PROCESSES | _MACHINE | _SHARED_MEMORY
    denied |= {} if own_files else _FILES
    denied |= {} if may_fork else _START
    code: _Code = [(_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, machine), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if column == 0:  # the same calls under other numbers (x32)
        code += [(_JUMP_GREATER_EQUAL, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for number in _NEWER:
        code += _when(number, [(_RETURN, 0, 0, _ALLOW)])
    code += [(_JUMP_GREATER_EQUAL, 0, 1, _NEWEST), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    for numbers in denied.values():
        code += _when(numbers[column], [(_RETURN, 0, 0, _ERRNO | _EPERM)])
    if not own_processes:
        for numbers in _SIGNALS.values():
            code += _when(numbers[column], _argument(0, only=[0, pid]))
    arguments = {name: numbers[column] for name, numbers in _BY_ARGUMENT.items()}
    code += _when(arguments["clone"], _clone(may_fork))
    # Connected streams only: a datagram socket of a pair could write to any other's address.
    code += _when(arguments["socketpair"], _argument(1, only=[1], mask=0xF))
    code += _when(arguments["prlimit64"], _argument(0, only=[0, pid]))
    code += _when(arguments["prctl"], _argument(0, never=[1, 36]))  # to outlive its parent, to adopt
    code += _when(arguments["fcntl"], _argument(1, never=[8, 10, 15, 1024, 1026]))  # signals to others by a file
    code += _when(
        arguments["ioctl"], _argument(1, never=[0x5412, 0x8901, 0x8902])
    )  # the same, and typing on a terminal
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _when(number: int | None, body: _Code) -> _Code:
    """`body`, which returns, if the call has this number."""
    return [] if number is None else [(_JUMP_EQUAL, 0, len(body), number), *body]


def _argument(index: int, *, only: Sequence[int] = (), never: Sequence[int] = (), mask: int = 0) -> _Code:
    """Decides by the low half of an argument, which is all that the kernel reads of an int."""
    code: _Code = [(_LOAD, 0, 0, 16 + 8 * index)]
    if mask:
        code.append((_AND, 0, 0, mask))
    met, otherwise = (_ALLOW, _ERRNO | _EPERM) if only else (_ERRNO | _EPERM, _ALLOW)
    for value in only or never:
        code += [(_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, met)]
    return [*code, (_RETURN, 0, 0, otherwise)]


def _clone(may_fork: bool) -> _Code:
    """No new namespaces; threads, and processes where they are allowed."""
    code: _Code = [(_LOAD, 0, 0, 16), (_JUMP_ANY_BIT, 0, 1, _CLONE_NEW), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    if not may_fork:
        code += [(_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    return [*code, (_RETURN, 0, 0, _ALLOW)]
