"""What a monitor costs a process that does nothing, by getrusage().

    python -m benchmarks.pressure_idle [seconds]

Each situation has a process and, where it needs one, a v1 cgroup of its own. "Gauge alone" is what cgroup v2 without
memory.high is: the kernel's own sources are left out.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from memsafe import PressureMonitor
from memsafe._kernel import cgroup
from memsafe.pressure import gauges, sources

MIB = 1024**2
# Of each: the limit, the file cache to have, which sources are left out.
SITUATIONS = {
    "no limit but the machine's": (None, 0, ()),
    "64 MiB, the kernel's thresholds": (64, 0, ()),
    "64 MiB, gauge alone": (64, 0, (sources,)),
    "256 MiB, 200 MiB of it file cache, gauge alone": (256, 200, (sources,)),
    "1 GiB, gauge alone": (1024, 0, (sources,)),
    "64 MiB, looks in Python alone": (64, 0, (sources, gauges)),
}


def wakeups() -> int:
    """How often threads of this process have slept so far, but the one that asks."""
    me = str(os.getpid())
    lines = [
        line
        for task in Path("/proc/self/task").iterdir()
        if task.name != me
        for line in (task / "status").read_text().splitlines()
    ]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def measure(limit_mib: int | None, cache_mib: int, left_out: tuple[object, ...], seconds: float) -> dict[str, float]:
    """Run in the process to be measured."""
    (own, *_) = cgroup.memory_cgroups()
    if limit_mib is not None:
        Path(own.directory, "memory.limit_in_bytes").write_text(f"{limit_mib}M")
    for module in left_out:
        module.choose = lambda *_: []
    if cache_mib:
        with open("cache", "wb+") as file:
            for _ in range(cache_mib):
                file.write(bytes(MIB))
            os.fsync(file.fileno())
            file.seek(0)
            while file.read(MIB):
                pass
    with PressureMonitor():
        time.sleep(1)
        before, slept = resource.getrusage(resource.RUSAGE_SELF), wakeups()
        time.sleep(seconds)
        after, woken = resource.getrusage(resource.RUSAGE_SELF), wakeups() - slept
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"ratio": used_s / seconds, "wakeups": woken / seconds, "cache": sum(own.file_cache_bytes() or (0, 0)) / MIB}


def run(name: str, seconds: float) -> dict[str, float]:
    """Measure in a process of its own, in a cgroup below this one's."""
    limit_mib, _, _ = SITUATIONS[name]
    group = None
    if limit_mib is not None:
        group = Path(cgroup.memory_cgroups()[0].directory, f"memsafe-idle-{os.getpid()}")
        group.mkdir()
    join = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')" if group else ""
    code = f"{join}\nimport sys\nfrom benchmarks import pressure_idle\npressure_idle.child({name!r}, {seconds})"
    try:
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    finally:
        while group is not None and group.exists():
            try:
                group.rmdir()
            except OSError:
                time.sleep(0.01)
        Path("cache").unlink(missing_ok=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def child(name: str, seconds: float) -> None:
    """Print what run() reads."""
    print(json.dumps(measure(*SITUATIONS[name], seconds)))


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    if cgroup.memory_cgroups()[0].version != 1:
        sys.exit("the limits are made with cgroup v1, which is not here")
    print(f"{'':48} {'of a core':>10} {'wake-ups/s':>11}   load {os.getloadavg()[0]:.1f}, over {seconds:.0f} s each")
    for name in SITUATIONS:
        found = run(name, seconds)
        cache = f"   ({found['cache']:.0f} MiB of file cache)" if SITUATIONS[name][1] else ""
        print(f"{name:48} {found['ratio']:10.3%} {found['wakeups']:11.1f}{cache}", flush=True)


if __name__ == "__main__":
    main()
