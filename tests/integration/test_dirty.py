"""Which pages were written, asked of this machine's kernel. Each test runs in a child: the means are the process's."""

import ctypes
import gc
import mmap
import os
import tempfile
import threading

import pytest

import memsafe
from tests.integration import scenario

PAGE = mmap.PAGESIZE
MIB = 1024 * 1024
MAPPED = 2048  # pages
FEW = 300
# The interpreter's own writes while it counts. Half of what is mapped: a mapping that grows, as the heap does, is to
# soft-dirty new as a whole, with every page that it had (mm/vma.c: merged mappings keep VM_SOFTDIRTY).
SLACK = MAPPED * PAGE // 2
EXACT = ("soft-dirty", "pagemap-scan")

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def pages(count=MAPPED, flags=PRIVATE):
    """Memory in small pages, each written."""
    memory = mmap.mmap(-1, count * PAGE, flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    write(memory, range(count))
    return memory


def write(memory, numbers):
    for number in numbers:
        memory[number * PAGE] = number & 0xFF


def meter_or_reason(method):
    """A meter, or a dict that says why there is none."""
    try:
        return memsafe.DirtyMeter(method)
    except memsafe.UnsupportedError as error:
        return {"unsupported": str(error)}


def written(method):
    """What is counted: when nothing was written (but read), some pages were, the same again, all, and shared ones."""
    memory, shared = pages(), pages(flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    untouched = mmap.mmap(-1, MAPPED * PAGE, PRIVATE)
    untouched.madvise(mmap.MADV_NOHUGEPAGE)
    gc.disable()
    meter = meter_or_reason(method)
    if isinstance(meter, dict):
        return meter
    with meter:
        told = {"method": meter.method, "none": meter.read().dirty_bytes}
        assert not any(untouched[::PAGE])  # the page of zeros, which is nobody's
        write(memory, range(0, MAPPED, MAPPED // FEW))
        told["few"] = meter.read().dirty_bytes
        write(memory, range(0, MAPPED, MAPPED // FEW))
        write(shared, range(MAPPED))
        told["again"] = meter.read().dirty_bytes
        write(memory, range(MAPPED))
        told["all"] = meter.read().dirty_bytes
        fresh = pages()
        told["fresh"] = meter.read().dirty_bytes
        assert fresh[0] == 0
    assert list(memory[::PAGE]) == [number & 0xFF for number in range(MAPPED)]
    return told


def check_written(told):
    few = len(range(0, MAPPED, MAPPED // FEW))
    for name, count in (("few", few), ("again", few), ("all", MAPPED), ("fresh", 2 * MAPPED)):
        assert 0 <= told[name] - told["none"] - count * PAGE <= SLACK, told


@pytest.mark.parametrize("method", EXACT)
def test_pages_that_were_written_are_counted_once_and_no_others(method):
    """Where this kernel has the method; else it says what would be needed."""
    told = scenario.run(written, method)
    if "unsupported" in told:
        assert method in told["unsupported"]
        assert "minor-faults always works" in told["unsupported"]
    else:
        check_written(told)


def merged_meanwhile():
    """Count by a list of mappings that was read while two of them became one: the second is told again, as a part."""
    memory = pages()
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    lines = [f"{at:x}-{start + MAPPED * PAGE:x} rw-p 00000000 00:00 0 \n" for at in (start, start + 8 * PAGE)]
    meter = memsafe.DirtyMeter()
    if meter.method == "minor-faults":
        return {"counted": MAPPED * PAGE}
    with meter, tempfile.TemporaryFile() as maps:
        maps.write("".join(lines).encode())
        maps.flush()
        native = meter._pages._native
        own_fd, native.maps_fd = native.maps_fd, maps.fileno()
        write(memory, range(MAPPED))
        counted = meter.read().dirty_bytes
        native.maps_fd = own_fd
    return {"counted": counted}


def test_a_mapping_that_is_told_twice_counts_once():
    assert scenario.run(merged_meanwhile)["counted"] == MAPPED * PAGE


def faults_seen():
    with memsafe.DirtyMeter("minor-faults") as meter:
        fresh = pages(1000)
        rate = meter.read()
        assert fresh[PAGE] == 1
    return rate.as_dict()


def test_minor_faults_see_fresh_memory_and_say_that_they_are_a_lower_bound():
    told = scenario.run(faults_seen)
    assert told["dirty_bytes"] >= 1000 * PAGE
    assert (told["method"], told["is_lower_bound"]) == ("minor-faults", True)


def forked_beside_a_meter():
    """A child writes, and its copy of the meter is gone; the parent's goes on."""
    memory = pages()
    with memsafe.DirtyMeter() as meter:
        before = meter.read().dirty_bytes
        pid = os.fork()
        if not pid:
            write(memory, range(MAPPED))
            try:
                meter.read()
            except (memsafe.MemsafeError, ValueError):
                with memsafe.DirtyMeter() as own:  # and it may have one of its own
                    os._exit(own.read().method != meter.method)
            os._exit(2)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return {"status": status, "grown": meter.read().dirty_bytes - before, "method": meter.method}


def test_what_a_child_writes_is_not_the_parents():
    told = scenario.run(forked_beside_a_meter)
    assert told["status"] == 0
    if told["method"] != "minor-faults":
        assert told["grown"] <= SLACK


def threads_write_beside_a_meter(rounds):
    memory = pages()
    stop = threading.Event()

    def work(first):
        while not stop.is_set():
            write(memory, range(first, MAPPED, 4))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        with memsafe.DirtyMeter() as meter:
            meter.read()
    stop.set()
    for thread in threads:
        thread.join()
    return {"same": list(memory[::PAGE]) == [number & 0xFF for number in range(MAPPED)]}


def test_threads_that_write_meanwhile_are_not_disturbed():
    assert scenario.run(threads_write_beside_a_meter, 50)["same"]


def two_meters():
    with memsafe.DirtyMeter():
        try:
            memsafe.DirtyMeter()
        except memsafe.MemsafeError as error:
            return {"error": str(error)}
    return {}


def test_a_second_meter_is_refused_while_one_is_at_work():
    assert "one at a time" in scenario.run(two_meters)["error"]


def forecasts():
    """Where forecasts come from, before and after a rate was measured and a snapshot taken."""
    state = pages()
    sources = [memsafe.assess_fork().forecast_source]
    rate = memsafe.measure_dirty_rate(0.01)
    assessment = memsafe.assess_fork(duration_s=1.0)
    sources.append(assessment.forecast_source)
    with memsafe.DirtyMeter("minor-faults") as meter:
        meter.read()
    sources.append(memsafe.assess_fork().forecast_source)
    path = f"/tmp/memsafe-dirty-{os.getpid()}"
    memsafe.fork_snapshot(path, lambda out: out.write(state)).wait(30)
    os.unlink(path)
    last = memsafe.assess_fork()
    sources.append(last.forecast_source)
    return {"method": rate.method, "sources": sources, "reason": assessment.reasons[0]}


def test_the_forecast_says_what_it_was_measured_by():
    told = scenario.run(forecasts)
    measured = "private memory" if told["method"] == "minor-faults" else told["method"]
    assert told["sources"] == ["private memory", measured, "private memory", "last snapshot"]
    if measured != "private memory":
        assert "of Python's heap if its objects are read" in told["reason"]


@pytest.mark.parametrize("duration", [0, -1, float("nan"), float("inf")])
def test_a_time_that_makes_no_sense_is_refused(duration):
    with pytest.raises(ValueError, match="above 0"):
        memsafe.measure_dirty_rate(duration)


def test_a_method_that_there_is_none_of_is_refused():
    with pytest.raises(ValueError, match="must be one of"):
        memsafe.DirtyMeter("guess")


def inherited_meter(method):
    """Ask the parent's meter in a forked child, which may have one of its own, and knows of no rate."""
    meter = memsafe.DirtyMeter(method)
    meter.read()
    pid = os.fork()
    if not pid:
        if memsafe.assess_fork().forecast_source != "private memory":
            os._exit(3)
        own = memsafe.DirtyMeter(method)
        try:
            meter.read()
        except ValueError:
            os._exit(own.read().dirty_bytes < 0)
        os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    meter.close()
    return {"status": status}


@pytest.mark.parametrize("method", [None, "minor-faults"])
def test_in_a_forked_child_the_parents_meter_is_closed(method):
    assert scenario.run(inherited_meter, method)["status"] == 0


def closed_beside_readers(rounds):
    """Threads read the same meter at once, until it is closed under their hands."""
    told, started = [], threading.Semaphore(0)

    def read(meter):
        try:
            meter.read()
            started.release()
            while True:
                meter.read()
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
            started.release()

    for _ in range(rounds):
        with memsafe.DirtyMeter() as meter:
            readers = [threading.Thread(target=read, args=[meter]) for _ in range(3)]
            for reader in readers:
                reader.start()
            for _ in readers:
                started.acquire()
        for reader in readers:
            reader.join()
    return {"told": sorted(set(told))}


def test_threads_share_a_meter_and_it_is_closed_when_none_counts():
    assert scenario.run(closed_beside_readers, 20)["told"] == ["ValueError: the meter is closed"]


def closed_meter():
    meter = memsafe.DirtyMeter()
    meter.close()
    meter.close()
    try:
        meter.read()
    except ValueError:
        return {"refused": True}
    return {}


def test_a_closed_meter_says_so_and_leaves_nothing_open():
    assert scenario.run(closed_meter)["refused"]
