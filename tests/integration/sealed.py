"""Let the kernel kill this process when it opens a file or takes memory: what a filter forbids, no counter can miss."""

import ctypes
import os
import struct

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
_KILL_PROCESS, _ALLOW = 0x80000000, 0x7FFF0000
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_GREATER, _RETURN = 0x20, 0x15, 0x25, 0x06
_NUMBER, _ARGUMENT_LOW, _ARGUMENT_HIGH = 0, 16, 20  # in struct seccomp_data, little-endian

# seccomp; all that opens a path: open, creat, openat, openat2 (only x86-64 has numbers of its own for them); all that
# takes address space or makes it usable: mmap, mprotect, mremap; and brk.
_NUMBERS = {"x86_64": (317, (2, 85, 257, 437), (9, 10, 25), 12)}
_GENERIC_NUMBERS = (277, (56, 437), (222, 226, 216), 214)


def seal(*, memory=False):
    """From now on, in every thread of this process, opening a file by its path is death by SIGSYS.

    Args:
        memory: Taking memory from the kernel is, too; giving it back, also by a smaller brk, is not.
    """
    seccomp, forbidden, grows, brk = _NUMBERS.get(os.uname().machine, _GENERIC_NUMBERS)
    libc = ctypes.CDLL(None, use_errno=True)
    steps = [(_LOAD, 0, 0, _NUMBER)]
    if memory:
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
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _KILL_PROCESS)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(program)))
    for call in (
        lambda: libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        lambda: libc.syscall(seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, header),
    ):
        if call() != 0:
            raise OSError(ctypes.get_errno(), "seccomp")
