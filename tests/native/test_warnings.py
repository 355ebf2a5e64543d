"""The build that CI runs: what the compiler warns of in our own C is an error there."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C compiler: {COMPILER}")


@pytest.mark.parametrize(
    ("code", "warning"),
    [
        ("int fine(void); int fine(void) { return 0; }", None),
        ("int narrow(long wide); int narrow(long wide) { return wide; }", "conversion"),
        ("int undeclared(void) { return 0; }", "missing-prototypes"),
        ("int none(void); int none(void) { int unused; return 0; }", "unused-variable"),
    ],
)
def test_warnings_in_our_own_c_are_errors_where_that_is_asked(tmp_path, code, warning):
    source = tmp_path / "source.c"
    source.write_text(f'#include "ms.h"\n{code}\n')
    asked = "from memsafe_native.build import COMPILE_ARGS; print(*COMPILE_ARGS, sep='\\n')"
    flags = subprocess.check_output(
        [sys.executable, "-c", asked], text=True, cwd=ROOT, env={**os.environ, "MEMSAFE_WERROR": "1"}
    ).splitlines()
    command = [COMPILER, *flags, "-fsyntax-only", source]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode != 0) == (warning is not None), done.stderr
    assert (warning or "") in done.stderr
