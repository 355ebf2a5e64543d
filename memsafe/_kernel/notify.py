"""Descriptors on which the kernel tells that something happened to memory.

Sources: Documentation/accounting/psi.rst; admin-guide/cgroup-v2.rst (memory.events); cgroup-v1/memory.rst
(cgroup.event_control).
"""

from __future__ import annotations

import errno
import os
import select

from memsafe._kernel import files
from memsafe.errors import KernelError

# Without CAP_SYS_RESOURCE, a trigger's window must be a multiple of this.
PSI_WINDOW_US = 2_000_000


def open_read(path: str) -> int:
    """Return a descriptor to read *path* by.

    Raises:
        KernelError: There is no such file, or it may not be read.
    """
    return _open(path, os.O_RDONLY)


def open_eventfd() -> int:
    """Return an eventfd, non-blocking, at 0.

    Raises:
        KernelError: No descriptor could be had.
    """
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "eventfd") from None


def open_watched(path: str) -> int:
    """Return a descriptor of a kernfs file that signals POLLPRI when it changes, such as memory.events.

    Raises:
        KernelError: There is no such file, or it is a plain copy on which nothing is ever signalled (EPERM).
    """
    fd = open_read(path)
    try:
        _require_signals(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def arm_stall_trigger(path: str, kind: str, stall_us: int, window_us: int = PSI_WINDOW_US) -> int:
    """Return a descriptor that signals POLLPRI when tasks stalled for *stall_us* within *window_us*.

    The kernel signals at most once a window, and with an unprivileged trigger the first two signals may count all
    stall since boot.

    Args:
        path: A memory.pressure, or /proc/pressure/memory.
        kind: ``some`` or ``full``.
        stall_us: More than 0, at most *window_us*.
        window_us: At most 10 s; a multiple of 2 s without CAP_SYS_RESOURCE.

    Raises:
        KernelError: EOPNOTSUPP: PSI is off. EPERM: this kernel (before 6.5) wants CAP_SYS_RESOURCE. EBUSY: the file
            has a trigger already. Or as open_watched().
    """
    return arm_trigger(path, f"{kind} {stall_us} {window_us}".encode())


def arm_trigger(path: str, trigger: bytes) -> int:
    """Return a descriptor that signals POLLPRI as *trigger* asks: ``some 200000 2000000``.

    Raises:
        KernelError: As arm_stall_trigger().
    """
    fd = _open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        # Before the write: a copy of the file would be overwritten by it.
        _require_signals(fd, path)
        # The kernel puts its NUL over the last byte that is written.
        write(fd, trigger.rstrip(b"\0") + b"\0", path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def arm_usage_threshold(directory: str, usage_bytes: int) -> int:
    """Return an eventfd that is signalled when a v1 cgroup's usage passes *usage_bytes*, upwards or downwards.

    Raises:
        KernelError: There is no such cgroup, or it may not be written to.
    """
    return _arm_v1(directory, "memory.usage_in_bytes", str(usage_bytes))


def arm_oom_notice(directory: str) -> int:
    """Return an eventfd that is signalled when a v1 cgroup, or an ancestor of it, runs out of memory.

    Raises:
        KernelError: As arm_usage_threshold().
    """
    return _arm_v1(directory, "memory.oom_control", "")


def arm_pressure_level(directory: str, level: str) -> int:
    """Return an eventfd that is signalled while reclaim for the limit of this very v1 cgroup goes badly.

    The kernel looks each time that it has scanned 512 pages (mm/vmpressure.c): ``medium`` if it could free less than
    40 % of them, ``critical`` if less than 5 %, or if it has begun to scan an eighth of all at a time. ``low`` is each
    of those looks. Pages that are being written back count as not freed, so a process that writes files has
    ``critical`` without any other memory. There is no limit on the rate: a cgroup that thrashes gave 7,000 a second.

    Reclaim for the limit of another cgroup, above or below, is not heard; before Linux 4.13, which knows no such mode,
    that below is.

    Args:
        directory: The cgroup's.
        level: ``low``, ``medium`` or ``critical``; each hears those above as well.

    Raises:
        KernelError: As arm_usage_threshold(); EINVAL: the kernel knows no such level.
    """
    try:
        return _arm_v1(directory, "memory.pressure_level", f"{level},local")
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise
    return _arm_v1(directory, "memory.pressure_level", level)


def write(fd: int, data: bytes, path: str) -> None:
    """Write all of *data* at once.

    Raises:
        KernelError: It was not taken; EAGAIN where only a part was.
    """
    try:
        taken = os.write(fd, data)
    except OSError as error:
        raise files.failed(error, path, f"write {_shown(data)!r} to") from None
    if taken != len(data):
        raise KernelError(errno.EAGAIN, f"write to {path}", f"{taken} of {len(data)} bytes were taken")


def _arm_v1(directory: str, name: str, argument: str) -> int:
    path, control_path = f"{directory}/{name}", f"{directory}/cgroup.event_control"
    target_fd = _open(path, os.O_RDONLY)
    try:
        _require_signals(target_fd, path)
        control_fd = _open(control_path, os.O_WRONLY)
        try:
            # One eventfd for one threshold: with two on one, unregistering could crash kernels before 5.6.
            event_fd = open_eventfd()
            try:
                write(control_fd, f"{event_fd} {target_fd} {argument}".encode(), control_path)
            except BaseException:
                os.close(event_fd)
                raise
        finally:
            os.close(control_fd)
    finally:
        # The registration lives as long as the eventfd; the kernel keeps neither of these.
        os.close(target_fd)
    return event_fd


def _shown(data: bytes) -> str:
    return data.rstrip(b"\0")[:80].decode(errors="replace")


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise files.failed(error, path, "open") from None


def _require_signals(fd: int, path: str) -> None:
    try:
        with select.epoll() as probe:
            probe.register(fd, 0)
    except PermissionError:
        raise KernelError(
            errno.EPERM, f"epoll_ctl {path}", "a plain file, not the kernel's: it never signals"
        ) from None
    except OSError as error:
        raise files.failed(error, path, "epoll_ctl") from None
