"""What ``import memsafe`` costs beyond the bare interpreter, beside other imports."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.report import Options, Outcome, Result, main
from benchmarks.rounds import Loop, alternate, call

OURS = "import memsafe"
OURS_WHOLE = "import memsafe, every public name used"
STATEMENTS = {
    OURS: "import memsafe",
    OURS_WHOLE: "import memsafe\nfor name in memsafe.__all__: getattr(memsafe, name)",
    "import psutil": "import psutil",
    "import asyncio": "import asyncio",
}
BARE = "bare"


def _python(code: str) -> Loop:
    return call(lambda: subprocess.run([sys.executable, "-c", code], check=True))


def measure(options: Options) -> Iterator[Outcome]:
    contenders = {BARE: _python("pass"), **{name: _python(code) for name, code in STATEMENTS.items()}}
    rounds = options.rounds(40)
    seconds = alternate(contenders, rounds=rounds)
    bare_s = statistics.median(seconds[BARE])
    beyond_s = {name: statistics.median(seconds[name]) - bare_s for name in STATEMENTS}
    for name, peer, target in (
        (OURS, "import psutil", "≤ 40 ms"),
        (OURS, "import asyncio", "≤ 40 ms"),
        (OURS_WHOLE, "import asyncio", ""),
    ):
        yield Result(f"{name}, beyond bare", peer, beyond_s[name], beyond_s[peer], target=target, rounds=rounds)
    yield Result("python -c 'import memsafe'", "python -c pass", bare_s + beyond_s[OURS], bare_s, rounds=rounds)


if __name__ == "__main__":
    sys.exit(main({"importing": measure}))
