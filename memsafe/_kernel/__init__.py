"""What memsafe reads from the kernel: /proc, /sys and cgroups, all under one root that can be injected."""
