"""Coverage-guided fuzzing of the readers: ``make fuzz``.

FUZZ_SECONDS is the time for all targets together, FUZZ_TARGETS names some of them. What fails is kept in corpus/, where
the tests replay it for ever.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["memsafe"]):
    from tests.fuzz import targets

CORPUS = Path(__file__).parent / "corpus"


def fuzz(name: str, seconds: int, folder: Path) -> None:
    """Fuzz one target in this process; never returns."""
    bench = targets.Bench(folder / "machine")
    begin, kept = folder / "seeds", CORPUS / name
    begin.mkdir()
    for number, seed in enumerate(bench.seeds(name)):
        (begin / str(number)).write_bytes(seed)
    kept.mkdir(exist_ok=True)
    check = targets.CHECKS[name]
    # The first corpus is where libFuzzer adds what it finds new; the kept ones are read only.
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={kept}/", "-max_len=4096"]
    arguments = [sys.argv[0], *options, "-print_final_stats=1", str(begin), str(kept)]
    atheris.Setup(arguments, lambda data: check(bench, data))
    atheris.Fuzz()


def main() -> int:
    names = os.environ.get("FUZZ_TARGETS", "").split() or list(targets.CHECKS)
    each_s = max(1, int(os.environ.get("FUZZ_SECONDS", "600")) // len(names))
    failed = []
    print(f"{each_s} s each\n{'target':20}{'executions':>12}{'coverage':>10}{'features':>10}", flush=True)
    for name in names:
        # libFuzzer ends its process, at the first failure or when the time is over, and cleans nothing up.
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            command = [sys.executable, "-m", "tests.fuzz", name, str(each_s), folder]
            done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, errors="replace")
        print(f"{name:20}{_reached(done.stderr)}", flush=True)
        if done.returncode:
            print(done.stderr)
            failed.append(name)
    print(f"failed: {' '.join(failed)}; the inputs are in {CORPUS}" if failed else "nothing found")
    return bool(failed)


def _reached(log: str) -> str:
    """Return how often libFuzzer ran the target, and what it reached: edges, and edges with their counts."""
    lines = re.findall(r"^#(\d+)\t\S+ +cov: (\d+) ft: (\d+)", log, re.MULTILINE)
    executions, coverage, features = lines[-1] if lines else ("?", "?", "?")
    return f"{executions:>12}{coverage:>10}{features:>10}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        fuzz(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    sys.exit(main())
