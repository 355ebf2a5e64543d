"""Who survives when memory fills up behind a budget's back: memsafe beside what others do, and beside nothing.

A program in a memory cgroup of limit L holds a cache of L/2, which it could do without, and then something in it that
no budget knows takes memory until the two together are more than L. Whoever drops the cache in time survives.

    python -m benchmarks.survival                 a short table, here
    python -m benchmarks.survival --lab           the full tables, in virtual machines with cgroup v2
    python -m benchmarks.survival --help          one cell, and all else

``cells`` says what is run, ``program`` is what runs in the cgroup, ``responders`` are the contenders, ``observer`` runs
it and says what became of it, ``lab`` does so in the guests, and ``table`` makes tables of the lines that come out.
"""
