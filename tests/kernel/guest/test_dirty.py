"""Which pages were written, on kernels that have each method, and by users who may use it."""

import os

import pytest

import memsafe
from tests.integration.test_dirty import EXACT, MAPPED, MIB, PAGE, check_written, pages, write, written
from tests.kernel.guest import child

# PAGEMAP_SCAN and userfaultfd's asynchronous write-protection.
SCAN_SINCE = (6, 7)


def has(method, kernel):
    return method != "pagemap-scan" or kernel >= SCAN_SINCE


@pytest.mark.parametrize("user", [child.ROOT, child.ORDINARY])
@pytest.mark.parametrize("method", EXACT)
def test_pages_that_were_written_are_counted_where_the_kernel_has_the_method(kernel, method, user):
    told = child.run(written, method, user=user)
    if has(method, kernel):
        check_written(told)
    else:
        assert "wants Linux 6.7" in told["unsupported"]


def foretold_and_copied(path, method):
    """Write at a steady pace what a snapshot's time is watched for; then what the snapshot copied."""
    memory = pages()
    with memsafe.DirtyMeter(method) as meter:
        write(memory, range(0, MAPPED, 2))
        watched = meter.read().dirty_bytes
    begin, written = os.pipe(), os.pipe()

    def writer(out):
        os.write(begin[1], b"!")
        os.read(written[0], 1)
        out.write(b"done")

    job = memsafe.fork_snapshot(path, writer, keep_fds=[begin[1], written[0]])
    os.read(begin[0], 1)
    write(memory, range(0, MAPPED, 2))
    copied = memsafe._kernel.process.smaps_rollup(_child_of_this()).private_dirty_bytes
    os.write(written[1], b"!")
    job.wait(60)
    return {"watched": watched, "copied": copied}


def _child_of_this():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return int(file.read().split()[0])


def test_what_is_counted_is_what_a_fork_copies(kernel, scratch):
    for method in (method for method in EXACT if has(method, kernel)):
        told = child.run(foretold_and_copied, str(scratch / "image"), method)
        assert told["watched"] >= MAPPED // 2 * PAGE
        assert told["copied"] >= MAPPED // 2 * PAGE
        # The child's interpreter writes some of its own.
        assert abs(told["copied"] - told["watched"]) <= 6 * MIB
