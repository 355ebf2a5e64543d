"""A thread that is made ready to act when memory and processors are short."""

import ctypes
import os
import struct
import threading

import pytest

from memsafe._native import lib

_SCHED_GETATTR = {"x86_64": 315}.get(os.uname().machine, 275)


def in_a_thread(function):
    told = []
    thread = threading.Thread(target=lambda: told.append(function()))
    thread.start()
    thread.join()
    return told[0]


def slice_ns():
    """The calling thread's slice of time; 0 before Linux 6.12."""
    attributes = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None).syscall(_SCHED_GETATTR, 0, attributes, 48, 0) == 0
    return struct.unpack_from("IIQiIQ", attributes)[-1]


def ready_and_its_child():
    lib.ms_thread_ready()
    return slice_ns(), in_a_thread(slice_ns)


def test_it_has_short_slices_and_what_it_starts_does_not():
    usual_ns = in_a_thread(slice_ns)
    own_ns, child_ns = in_a_thread(ready_and_its_child)
    if usual_ns == 0:
        pytest.skip("no slices of one's own before Linux 6.12")
    if ctypes.CDLL(None).prctl(21, 0, 0, 0, 0):
        pytest.skip("under a seccomp filter nothing is asked for")
    assert own_ns < usual_ns
    assert child_ns == usual_ns


def test_a_small_stack_is_not_overrun():
    before = threading.stack_size(32 * 1024)
    try:
        assert in_a_thread(lambda: lib.ms_thread_ready() is None)
    finally:
        threading.stack_size(before)
