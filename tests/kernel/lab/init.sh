#!/bin/sh
# The first process of the guest: mounts what tests need, runs the task, ends the machine.
export PATH=/bin HOME=/ LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo "+memory +pids" >/sys/fs/cgroup/cgroup.subtree_control
ip link set lo up

# The disk is found while this runs. A file system with a page cache: the root one is all memory.
waited=0
while [ ! -b /dev/nvme0n1 ] && [ $waited -lt 100 ]; do
    usleep 100000
    waited=$((waited + 1))
done
mke2fs -q /dev/nvme0n1 >/dev/null && mount -t ext4 /dev/nvme0n1 /scratch && chmod 1777 /scratch

setsid cttyhack sh /lab.sh
poweroff -f
