"""Children without fork's bill: subprocess's Popen and run, which never copy this process.

fork() copies the page tables and is charged for all writable memory of the parent; a child that shares the parent's
memory until it runs its program costs the same beside 1 MiB and beside 100 GiB. subprocess does that too until one
of ``user``, ``group``, ``extra_groups`` or ``preexec_fn`` is asked for, and then falls back to fork().

popen.py has Popen and run; arguments.py what they hand through to subprocess; request.py what is asked of the native
call; limits.py what memsafe adds to a child, and what tells that the OOM killer ended it; coroutine.py the same for
asyncio, imported when it is asked for.
"""

from memsafe.spawn.popen import ChildOOMKilledError, CompletedProcess, Popen, run

__all__ = ["ChildOOMKilledError", "CompletedProcess", "Popen", "run"]
