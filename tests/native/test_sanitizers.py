"""The C core under the compiler's sanitizers, without Python in the process."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "memsafe_native"
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]
# What every native thread is made of.
THREAD = ["generation", "native_thread", "owned", "thread"]

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C compiler: {COMPILER}")


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
@pytest.mark.parametrize(
    ("name", "concepts"),
    [
        ("budget_threads", ["budget", "claim"]),
        ("heap_threads", ["heap", "budget", "claim"]),
        (
            "waiter_threads",
            ["waiter", "watch", "source", "timer", "kept", "gauge", "cpuwatch", "emergency", *THREAD],
        ),
        ("sentry_threads", ["sentry", "gauge", "fork_end", *THREAD]),
        ("region_faults", ["budget", "claim", "generation"]),
    ],
)
def test_a_program_runs_clean(tmp_path, name, concepts, sanitizers):
    program = tmp_path / name
    sources = [NATIVE / "src" / f"{concept}.c" for concept in concepts] + [Path(__file__).with_name(f"{name}.c")]
    flags = [
        "-std=gnu11",
        "-O1",
        "-g",
        "-D_GNU_SOURCE",
        "-pthread",
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
    ]
    includes = [f"-I{NATIVE / 'cdef'}", f"-I{NATIVE / 'src'}"]
    built = subprocess.run([COMPILER, *flags, *includes, *sources, "-o", program], capture_output=True, text=True)
    if built.returncode and "cannot find" in built.stderr:
        pytest.skip(f"{COMPILER} has no runtime for -fsanitize={sanitizers}")
    assert built.returncode == 0, built.stderr
    # Randomised addresses that are too random crash ThreadSanitizer on some kernels: setarch turns that off.
    prefix = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []
    done = subprocess.run([*prefix, program], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
