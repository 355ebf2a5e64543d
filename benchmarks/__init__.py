"""What memsafe costs, each figure beside a named peer in the same run. ``python -m benchmarks`` runs all of it.

Every pair is measured in alternating rounds in one process, so that both meet the same machine: its frequency, its
caches, its neighbours. That is why pyperf's own Runner does not drive it: that runs all processes of one benchmark
before the first of the next. Its clock is used, and its way of calibrating loops.
"""
