"""Let the kernel kill this process when it opens a file or takes memory: what a filter forbids, no counter can miss.

Or let it refuse something, as a sandbox does.
"""

import ctypes
import os
import struct
import time

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
_KILL_PROCESS, _ALLOW, _FAIL_WITH = 0x80000000, 0x7FFF0000, 0x00050000
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_GREATER, _RETURN = 0x20, 0x15, 0x25, 0x06
_NUMBER, _ARGUMENT_LOW, _ARGUMENT_HIGH = 0, 16, 20  # in struct seccomp_data, little-endian

# seccomp; all that opens a path: open, creat, openat, openat2 (only x86-64 has numbers of its own for them); all that
# takes address space or makes it usable: mmap, mprotect, mremap; and brk.
_NUMBERS = {"x86_64": (317, (2, 85, 257, 437), (9, 10, 25), 12)}
_GENERIC_NUMBERS = (277, (56, 437), (222, 226, 216), 214)
_CLOCK_NANOSLEEP = {"x86_64": 230}
_GENERIC_CLOCK_NANOSLEEP = 115


def seal(*, memory=False):
    """From now on, in every thread of this process, opening a file by its path is death by SIGSYS.

    Args:
        memory: Taking memory from the kernel is, too; giving it back, also by a smaller brk, is not.
    """
    _, forbidden, grows, brk = _NUMBERS.get(os.uname().machine, _GENERIC_NUMBERS)
    steps = [(_LOAD, 0, 0, _NUMBER)]
    if memory:
        libc = ctypes.CDLL(None)
        libc.sbrk.restype = ctypes.c_void_p
        high, low = divmod(libc.sbrk(0), 1 << 32)
        forbidden = (*forbidden, *grows)
        steps += [
            (_JUMP_IF_EQUAL, 0, 7, brk),
            (_LOAD, 0, 0, _ARGUMENT_HIGH),
            (_JUMP_IF_GREATER, 4, 0, high),
            (_JUMP_IF_EQUAL, 0, 2, high),
            (_LOAD, 0, 0, _ARGUMENT_LOW),
            (_JUMP_IF_GREATER, 1, 0, low),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _KILL_PROCESS),
        ]
    steps += [(_JUMP_IF_EQUAL, len(forbidden) - index, 0, number) for index, number in enumerate(forbidden)]
    _filter([*steps, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _KILL_PROCESS)])


def refuse_to_sleep_by_cpu_time(error):
    """From now on clock_nanosleep() on a clock of CPU time fails with *error*; by those of the day it sleeps."""
    steps = [
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_IF_EQUAL, 0, 3, _CLOCK_NANOSLEEP.get(os.uname().machine, _GENERIC_CLOCK_NANOSLEEP)),
        (_LOAD, 0, 0, _ARGUMENT_LOW),
        (_JUMP_IF_GREATER, 0, 1, time.CLOCK_MONOTONIC),  # glibc has another number for it than the headers
        (_RETURN, 0, 0, _FAIL_WITH | error),
        (_RETURN, 0, 0, _ALLOW),
    ]
    _filter(steps)


def _filter(steps):
    seccomp = _NUMBERS.get(os.uname().machine, _GENERIC_NUMBERS)[0]
    libc = ctypes.CDLL(None, use_errno=True)
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(program)))
    for call in (
        lambda: libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        lambda: libc.syscall(seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, header),
    ):
        if call() != 0:
            raise OSError(ctypes.get_errno(), "seccomp")
