"""Join cdef/*.h and src/*.c into the extension memsafe_native._ext.

One concept, one header in cdef/ and one C file in src/. A cdef header is plain declarations: cffi parses it, the C
file includes it too, so the two cannot drift apart.
"""

import os
import sys
import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
HEADERS = sorted((HERE / "cdef").glob("*.h"))
SOURCES = sorted((HERE / "src").glob("*.c"))

COMPILE_ARGS = [
    "-std=gnu11",
    "-O2",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wno-missing-field-initializers",  # cffi's own tables
]
# -iquote, not include_dirs: a header may bear a system header's name (spawn.h) without hiding it.
for folder in ("cdef", "src"):
    COMPILE_ARGS += ["-iquote", os.path.relpath(HERE / folder, HERE.parent)]
if os.environ.get("MEMSAFE_WERROR"):
    COMPILE_ARGS += ["-Werror", "-DMS_WERROR"]

macros = [("_GNU_SOURCE", "1")]
if not sysconfig.get_config_var("Py_GIL_DISABLED"):
    macros.append(("Py_LIMITED_API", "0x030B0000"))

ffibuilder = FFI()
for header in HEADERS:
    ffibuilder.cdef(header.read_text())
ffibuilder.set_source(
    "memsafe_native._ext",
    "#include <stddef.h>\n#include <stdint.h>\n#include <sys/types.h>\n"
    + "".join(f'#include "{header.name}"\n' for header in HEADERS),
    sources=[os.path.relpath(source, HERE.parent) for source in SOURCES],
    depends=[os.path.relpath(path, HERE.parent) for path in [*HEADERS, *(HERE / "src").glob("*.h")]],
    define_macros=macros,
    extra_compile_args=COMPILE_ARGS,
    libraries=["pthread"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(HERE.parent), verbose="-v" in sys.argv)
