"""Let the kernel kill this process for a system call, or refuse it: what a filter forbids, no counter can miss."""

import ctypes
import errno
import os
import struct

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
_KILL_PROCESS, _FAIL, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_ANY, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _FIRST_ARGUMENT = 0, 16  # offsets within struct seccomp_data, of the low half on little-endian machines

CLONE3 = 435
CLOSE_RANGE = 436
_CLONE_VM = 0x100

# seccomp, then all that opens a path: open, creat, openat, openat2; only x86-64 has numbers of its own for them.
_NUMBERS = {"x86_64": (317, (2, 85, 257, 437))}
_GENERIC_NUMBERS = (277, (56, 437))
# clone, fork
_FORKS = {"x86_64": (56, 57)}
_GENERIC_FORKS = (220, -1)


def seal():
    """From now on, in every thread of this process, opening a file by its path is death by SIGSYS."""
    _, forbidden = _NUMBERS.get(os.uname().machine, _GENERIC_NUMBERS)
    _install([(_LOAD, 0, 0, _NUMBER), *(step for number in forbidden for step in _on(number, _KILL_PROCESS))])


def forbid(number, error):
    """From now on, in every thread of this process and its children, the system call *number* fails with *error*."""
    _install([(_LOAD, 0, 0, _NUMBER), *_on(number, _FAIL | error)])


def seal_forks():
    """From now on a child with a copy of our memory is death by SIGSYS, in our children too.

    There is no clone3() then, which no filter sees into.
    """
    clone, fork = _FORKS.get(os.uname().machine, _GENERIC_FORKS)
    steps = [(_LOAD, 0, 0, _NUMBER), *_on(CLONE3, _FAIL | errno.ENOSYS)]
    if fork >= 0:
        steps += _on(fork, _KILL_PROCESS)
    steps += [
        (_JUMP_IF_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_JUMP_IF_ANY, 1, 0, _CLONE_VM),
        (_RETURN, 0, 0, _KILL_PROCESS),
    ]
    _install(steps)


def _on(number, answer):
    return [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)]


def _install(steps):
    """Install a filter that allows what *steps* let pass."""
    seccomp, _ = _NUMBERS.get(os.uname().machine, _GENERIC_NUMBERS)
    steps = [*steps, (_RETURN, 0, 0, _ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        lambda: libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        lambda: libc.syscall(seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, header),
    ):
        if call() != 0:
            raise OSError(ctypes.get_errno(), "seccomp")
