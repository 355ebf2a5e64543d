"""The descriptor and the streams of a monitor, in loops of every kind."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import selectors
import threading

import pytest
import trio
import trio.testing

from tests.unit.small_machine import CRITICAL, LOW, NORMAL, listen, monitored


def readable(fd):
    return bool(select.select([fd], [], [], 0)[0])


def test_the_descriptor_is_readable_from_a_change_until_it_is_read(monitor):
    fd = monitor.fileno()
    assert not readable(fd)
    monitor.simulate(LOW)
    monitor.simulate(CRITICAL)
    assert readable(fd)
    assert os.eventfd_read(fd) == 2
    assert not readable(fd)
    monitor.check()
    assert not readable(fd)


def test_changes_before_the_descriptor_was_asked_for_count(monitor):
    monitor.simulate(LOW)
    monitor.simulate(CRITICAL)
    assert os.eventfd_read(monitor.fileno()) == 2


def new_loops():
    import uvloop

    return [asyncio.new_event_loop, uvloop.new_event_loop]


on_each_loop = pytest.mark.parametrize("new_loop", new_loops(), ids=["asyncio", "uvloop"])


@on_each_loop
def test_events_are_an_async_iterator_that_ends_with_the_monitor(machine, clock, new_loop):
    async def read(monitor):
        stream = monitor.events()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, monitor.simulate, LOW)
        monitor.simulate(CRITICAL)  # from the loop's own thread
        seen = [await anext(stream), await anext(stream)]
        waiting = asyncio.ensure_future(anext(stream, "ended"))
        await asyncio.sleep(0)
        monitor.simulate(NORMAL)
        seen.append(await waiting)
        monitor.close()
        return [event.level for event in seen], [event async for event in stream]

    with monitored(machine, clock) as monitor, asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(read(monitor)) == ([LOW, CRITICAL, NORMAL], [])


def test_every_stream_hears_and_a_dropped_one_is_forgotten(monitor):
    async def read():
        first, second = monitor.events(), monitor.events()
        monitor.simulate(LOW)
        levels = [(await anext(stream)).level for stream in (first, second)]
        del first
        gc.collect()
        return levels, len(monitor._loops._streams)

    assert asyncio.run(read()) == ([LOW, LOW], 1)


def test_a_stream_may_be_ended_by_its_reader(monitor):
    async def read():
        stream = monitor.events()
        waiting = asyncio.ensure_future(anext(stream, "ended"))
        await asyncio.sleep(0)
        await stream.aclose()
        monitor.simulate(LOW)
        return await waiting, [event async for event in stream]

    assert asyncio.run(read()) == ("ended", [])


@on_each_loop
def test_a_loop_that_was_closed_with_its_stream_open_does_no_harm(monitor, new_loop):
    async def make():
        stream = monitor.events()
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        return stream, waiting  # cancelled by the runner

    with asyncio.Runner(loop_factory=new_loop) as runner:
        stream, waiting = runner.run(make())
    assert waiting.cancelled()
    heard = listen(monitor, LOW)
    monitor.simulate(LOW)
    monitor.close()
    assert len(heard) == 1
    del stream


@on_each_loop
def test_a_reader_that_is_cancelled_loses_nothing(monitor, new_loop):
    async def read():
        stream = monitor.events()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        monitor.simulate(LOW)  # handed over to the loop, which has not run since
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return (await anext(stream)).level

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(read()) == LOW


@on_each_loop
def test_a_reader_that_waits_is_told_when_the_monitor_closes(monitor, new_loop):
    async def read():
        stream = monitor.events()
        waiting = [asyncio.ensure_future(anext(stream, "ended")) for _ in range(2)]
        await asyncio.sleep(0)
        monitor.close()
        return await asyncio.gather(*waiting)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(read()) == ["ended", "ended"]


def test_loops_in_several_threads_all_hear(monitor):
    ready, heard = threading.Barrier(5), []

    async def read():
        stream = monitor.events()
        ready.wait(30)
        heard.append([(await anext(stream)).level for _ in range(3)])

    def run(new_loop):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(read())

    threads = [threading.Thread(target=run, args=(new_loop,)) for new_loop in new_loops() * 2]
    for thread in threads:
        thread.start()
    ready.wait(30)
    for level in (LOW, CRITICAL, NORMAL):
        monitor.simulate(level)
    for thread in threads:
        thread.join(30)
    assert heard == [[LOW, CRITICAL, NORMAL]] * 4


@on_each_loop
def test_the_descriptor_wakes_a_reader_of_a_loop(monitor, new_loop):
    async def read():
        loop, news, fd = asyncio.get_running_loop(), asyncio.Queue(), monitor.fileno()
        loop.add_reader(fd, lambda: news.put_nowait((os.eventfd_read(fd), monitor.level)))
        monitor.simulate(LOW)
        told = [await news.get()]
        monitor.simulate(CRITICAL)
        told.append(await news.get())
        loop.remove_reader(fd)
        return told

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(read()) == [(1, LOW), (1, CRITICAL)]


def test_the_descriptor_wakes_trio(monitor):
    async def read():
        fd, told = monitor.fileno(), []
        for level in (LOW, CRITICAL):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, fd)
                await trio.testing.wait_all_tasks_blocked()
                monitor.simulate(level)
            told.append((os.eventfd_read(fd), monitor.level))
        return told

    assert trio.run(read) == [(1, LOW), (1, CRITICAL)]


@pytest.mark.parametrize("selector", [selectors.SelectSelector, selectors.PollSelector, selectors.EpollSelector])
def test_the_descriptor_wakes_a_loop_of_ones_own(monitor, selector):
    with selector() as loop:
        loop.register(monitor.fileno(), selectors.EVENT_READ)
        assert loop.select(0) == []
        drill = threading.Thread(target=monitor.simulate, args=(CRITICAL,))
        drill.start()
        ((key, _),) = loop.select(30)
        assert (os.eventfd_read(key.fd), monitor.level) == (1, CRITICAL)
        assert loop.select(0) == []
        drill.join(30)


def test_a_lagging_stream_keeps_the_newest(monitor):
    async def read():
        stream = monitor.events()
        for level in [LOW, CRITICAL] * 50:
            monitor.simulate(level)
        monitor.simulate(NORMAL)
        await asyncio.sleep(0)
        monitor.close()
        return [event.level async for event in stream]

    levels = asyncio.run(read())
    assert len(levels) == 64
    assert levels[-1] == NORMAL
