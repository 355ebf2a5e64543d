"""Let the kernel kill this process for what it must not do: what a filter forbids, no counter can miss."""

import ctypes
import errno
import os
import struct
import time

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
_KILL_PROCESS, _FAIL, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_GREATER, _JUMP_IF_ANY, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARGUMENT_LOW, _ARGUMENT_HIGH = 0, 16, 20  # in struct seccomp_data, little-endian

CLONE3 = 435
CLOSE_RANGE = 436
_CLONE_VM = 0x100

# seccomp; all that opens a path: open, creat, openat, openat2 (only x86-64 has numbers of its own for them); all that
# takes address space or makes it usable: mmap, mprotect, mremap; brk; clone; and fork.
_NUMBERS = {"x86_64": (317, (2, 85, 257, 437), (9, 10, 25), 12, 56, (57,))}
_GENERIC_NUMBERS = (277, (56, 437), (222, 226, 216), 214, 220, ())
_SECCOMP, _OPENS, _GROWS, _BRK, _CLONE, _FORK = _NUMBERS.get(os.uname().machine, _GENERIC_NUMBERS)
_CLOCK_NANOSLEEP = {"x86_64": 230}.get(os.uname().machine, 115)

_SEALING_BYTES = 64 * 1024  # much more than what sealing itself takes


def seal(*, memory=False):
    """From now on, in every thread of this process, opening a file by its path is death by SIGSYS.

    Args:
        memory: Taking memory from the kernel is, too; giving it back, also by a smaller brk, is not.
    """
    steps = []
    if memory:
        libc = ctypes.CDLL(None)
        libc.sbrk.restype = ctypes.c_void_p
        bytes(_SEALING_BYTES)  # there is room for it now: the end of the heap moves no more before it is sealed
        high, low = divmod(libc.sbrk(0), 1 << 32)
        steps = [
            (_JUMP_IF_EQUAL, 0, 7, _BRK),
            (_LOAD, 0, 0, _ARGUMENT_HIGH),
            (_JUMP_IF_GREATER, 4, 0, high),
            (_JUMP_IF_EQUAL, 0, 2, high),
            (_LOAD, 0, 0, _ARGUMENT_LOW),
            (_JUMP_IF_GREATER, 1, 0, low),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _KILL_PROCESS),
        ]
    for number in (*_OPENS, *(_GROWS if memory else ())):
        steps += _on(number, _KILL_PROCESS)
    _install(steps)


def forbid(number, error):
    """From now on, in every thread of this process and its children, the system call *number* fails with *error*."""
    _install(_on(number, _FAIL | error))


def seal_forks():
    """From now on a child with a copy of our memory is death by SIGSYS, in our children too.

    There is no clone3() then, which no filter sees into.
    """
    steps = _on(CLONE3, _FAIL | errno.ENOSYS)
    for number in _FORK:
        steps += _on(number, _KILL_PROCESS)
    steps += [
        (_JUMP_IF_EQUAL, 0, 3, _CLONE),
        (_LOAD, 0, 0, _ARGUMENT_LOW),
        (_JUMP_IF_ANY, 1, 0, _CLONE_VM),
        (_RETURN, 0, 0, _KILL_PROCESS),
    ]
    _install(steps)


def refuse_to_sleep_by_cpu_time(error):
    """From now on clock_nanosleep() on a clock of CPU time fails with *error*; by those of the day it sleeps."""
    _install(
        [
            (_JUMP_IF_EQUAL, 0, 3, _CLOCK_NANOSLEEP),
            (_LOAD, 0, 0, _ARGUMENT_LOW),
            (_JUMP_IF_GREATER, 0, 1, time.CLOCK_MONOTONIC),  # glibc has another number for it than the headers
            (_RETURN, 0, 0, _FAIL | error),
        ]
    )


def _on(number, answer):
    return [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)]


def _install(steps):
    """Install a filter that looks at a call's number by *steps*, and allows what they let pass."""
    steps = [(_LOAD, 0, 0, _NUMBER), *steps, (_RETURN, 0, 0, _ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        lambda: libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        lambda: libc.syscall(_SECCOMP, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, header),
    ):
        if call() != 0:
            raise OSError(ctypes.get_errno(), "seccomp")
