"""Build memsafe_native; everything else about the project is in pyproject.toml."""

import sysconfig

from setuptools import setup

# cffi chooses the stable ABI itself; the wheel's tag has to be told. Free-threaded builds have no stable ABI yet.
stable_abi = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    cffi_modules=["memsafe_native/build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if stable_abi else {},
)
