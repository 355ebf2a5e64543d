"""From a kernel's signal to the callback; what a monitor costs while nothing happens is in benchmarks.pressure_idle.

    python -m benchmarks.pressure_latency

The signal is a write to the eventfd of a v1 OOM notice, which is what the kernel does; the first callback is timed. The
figures beside busy threads show the price of the GIL: each return from a system call may wait a switch interval.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time

from memsafe import PressureLevel, PressureMonitor

ROUNDS = 1000


def spin(stop: threading.Event) -> None:
    x = 0
    while not stop.is_set():
        x += 1


def latencies_ms(busy: int) -> tuple[list[float], list[float]]:
    """Signal → seen by the native thread, signal → callback."""
    stop = threading.Event()
    threads = [threading.Thread(target=spin, args=(stop,)) for _ in range(busy)]
    native, called = [], []
    with PressureMonitor() as monitor:
        source = next(each for each in monitor._hub._chosen if each.name == "oom_control")
        if not source.used:
            sys.exit(f"no oom_control here: {source.status.reason}")
        hear, seen_ns = monitor._hub.hear, []
        monitor._hub.hear = lambda reports: seen_ns.extend(each.first_ns for each in reports) or hear(reports)
        came, at_ns = threading.Event(), []

        @monitor.on(PressureLevel.CRITICAL)
        def note(_: object) -> None:
            at_ns.append(time.monotonic_ns())
            came.set()

        for thread in threads:
            thread.start()
        for _ in range(ROUNDS):
            came.clear()
            seen_ns.clear()
            began_ns = time.monotonic_ns()
            os.eventfd_write(source._fd, 1)
            came.wait()
            called.append((at_ns[-1] - began_ns) / 1e6)
            native.append((seen_ns[0] - began_ns) / 1e6)
            monitor.simulate(PressureLevel.NORMAL)
        stop.set()
        for thread in threads:
            thread.join()
    return native, called


def main() -> None:
    print(f"{'':24} {'median':>10} {'p99':>10} {'max':>10}   ms, {ROUNDS} each, load {os.getloadavg()[0]:.1f}")
    for busy in (0, 1, 4):
        for name, values in zip(("native thread", "callback"), latencies_ms(busy), strict=True):
            p99 = statistics.quantiles(values, n=100)[-1]
            label = f"{name}, {busy} busy"
            print(f"{label:24} {statistics.median(values):10.3f} {p99:10.3f} {max(values):10.3f}")


if __name__ == "__main__":
    main()
