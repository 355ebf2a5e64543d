"""The package as a whole: what importing it costs and does, what it offers, which way its imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import memsafe

PACKAGE = Path(memsafe.__file__).parent

# Lowest first; a module may import what is on its own level or below.
LAYERS = [
    {"errors", "sizes", "blocks"},
    {"_native"},
    {"_kernel"},
    {"status", "commit", "forecast"},
    {"budget", "numpy", "region", "heap", "limits", "trimming", "spawn", "oom"},
    {"pressure"},
    {"snapshot"},
    {"testing", "integrations"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def python(script, *arguments):
    done = subprocess.run([sys.executable, *arguments, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def imports_of(tree):
    """The modules of memsafe that are imported at run time, wherever in the file."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down_the_layers(file):
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    for name in imports_of(ast.parse(file.read_text())):
        package, _, rest = name.partition(".")
        if package == "memsafe_native":
            assert part == "_native"
        if package == "memsafe" and rest:
            target = rest.partition(".")[0]
            assert target in LEVEL, f"{target} has no place in the layers"
            assert LEVEL[target] <= LEVEL[part], f"{part} imports {name}, which is above it"


def test_every_public_name_is_there_and_typed():
    for name in memsafe.__all__:
        assert getattr(memsafe, name) is not None
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    told = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == {*memsafe.__all__, "numpy"}  # which a star must not put in the place of the real one
    assert set(memsafe.__all__) <= set(dir(memsafe))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = memsafe.nonsense


def test_importing_starts_no_thread_sets_no_handler_and_loads_nothing_heavy():
    script = """
import signal, sys, threading, resource
signals = [signal.getsignal(n) for n in range(1, 65) if n not in (32, 33)]
limits = [resource.getrlimit(n) for n in range(10)]
import memsafe
assert signals == [signal.getsignal(n) for n in range(1, 65) if n not in (32, 33)]
assert limits == [resource.getrlimit(n) for n in range(10)]
assert threading.active_count() == 1
heavy = {"asyncio", "subprocess", "psutil", "numpy", "inspect", "logging", "concurrent.futures"} & set(sys.modules)
assert not heavy, heavy
"""
    python(script, "-I")


def test_elsewhere_than_on_linux_the_import_fails_with_one_clear_sentence():
    script = """
import sys
sys.platform = "darwin"
try:
    import memsafe
except ImportError as error:
    print(error)
"""
    assert python(script) == ("memsafe works on Linux only: it stands on cgroups, PSI and /proc, which darwin lacks\n")
