"""The demo, reduced: it keeps its promises, and when it is interrupted it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def demo(tmp_path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-u", "-m", "examples.demo", "--quick", *options]
    environment = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "TMPDIR": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()


def assert_nothing_is_left(tmp_path: Path) -> None:
    assert not list(tmp_path.iterdir())
    for process in psutil.process_iter(["cmdline"]):
        assert not any(str(tmp_path) in argument for argument in process.info["cmdline"] or ())


def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    with demo(tmp_path, "--no-cgroup") as process:  # CI runs the whole of it, in a cgroup where it may
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "BROKEN" not in said
    assert_nothing_is_left(tmp_path)


def test_an_interrupted_demo_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with demo(tmp_path, "--no-cgroup") as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("PRESSURE"):
                process.send_signal(signal.SIGINT)
                break
        said = process.stdout.read()
    assert process.returncode == 128 + signal.SIGINT, said
    assert "nothing is left behind" in said
    assert_nothing_is_left(tmp_path)


def test_a_demo_that_cannot_make_its_case_ends_with_1(tmp_path: Path) -> None:
    code = "import sys; from examples.demo import __main__ as demo, acts\n"
    code += "def load(stage): acts.load(stage); stage.report.promise('sabotage', kept=False)\n"
    code += "demo._ACTS = (load,); sys.exit(demo.main(['--quick', '--no-cgroup']))"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "BROKEN in load: sabotage" in done.stdout
    assert_nothing_is_left(tmp_path)
