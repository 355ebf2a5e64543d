"""Who survives a snapshot that memory cannot hold: memsafe, a plain fork, and redis-server's BGSAVE.

A program in a memory cgroup of limit L holds data of a share of L, and takes snapshots, one after another, while all
of its data is rewritten: at a pace, or as fast as it goes. Each page that is rewritten during a snapshot is copied, so
data of half of L and more cannot be held twice. What must never happen is that the program itself is killed.

    python -m benchmarks.snapshot_survival            all cells, here; hours
    python -m benchmarks.snapshot_survival --help     one cell, and all else

``cells`` says what is run, ``program`` is what runs in the cgroup, ``redis`` is the peer, ``observer`` runs them and
says what became of each, and ``table`` makes a table of the lines that come out.
"""
