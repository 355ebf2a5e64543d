"""Limits that change under a process, and cgroups that vanish and return: each answer is that of its moment."""

import memsafe
from tests.kernel.guest import child

MIB = 1024 * 1024


def limits():
    status = memsafe.memory_status()
    of_cgroups = [(c.kind, c.path, c.limit_bytes) for c in status.constraints if c.path is not None]
    return {"limits": of_cgroups, "bound_by": status.binding.path, "warnings": status.warnings}


def expect(told, *wanted, bound_by=None):
    assert told == {"limits": [list(each) for each in wanted], "bound_by": bound_by, "warnings": []}


def test_every_change_of_a_limit_is_seen(group):
    own = group.child("own")
    top, name = f"/{group.path.name}", f"/{group.path.name}/own"
    with child.asking(limits, cgroup=own) as ask:
        expect(ask())
        own["memory.max"] = 256 * MIB
        expect(ask(), ("memory.max", name, 256 * MIB), bound_by=name)
        own["memory.max"] = 128 * MIB
        expect(ask(), ("memory.max", name, 128 * MIB), bound_by=name)
        own["memory.high"] = 96 * MIB
        expect(ask(), ("memory.max", name, 128 * MIB), ("memory.high", name, 96 * MIB), bound_by=name)
        group["memory.max"] = 64 * MIB
        own["memory.high"] = "max"
        expect(ask(), ("memory.max", name, 128 * MIB), ("memory.max", top, 64 * MIB), bound_by=top)
        own["memory.max"] = group["memory.max"] = "max"
        expect(ask())


def test_a_process_that_is_moved_is_bound_by_its_new_place(group):
    here, there = group.child("here", memory_max=128 * MIB), group.child("there", memory_max=64 * MIB)
    with child.asking(limits, cgroup=here) as ask:
        for place, limit_bytes in ((here, 128 * MIB), (there, 64 * MIB), (here, 128 * MIB)):
            place["cgroup.procs"] = ask.pid
            name = f"/{group.path.name}/{place.path.name}"
            expect(ask(), ("memory.max", name, limit_bytes), bound_by=name)


def test_a_cgroup_that_returns_under_its_name_is_another_one(group):
    """Whoever kept its files open would be told of the old one for ever."""
    aside, own = group.child("aside"), group.child("own", memory_max=128 * MIB)
    name = f"/{group.path.name}/own"
    with child.asking(limits, cgroup=own) as ask:
        expect(ask(), ("memory.max", name, 128 * MIB), bound_by=name)
        for limit_bytes in (64 * MIB, 96 * MIB):
            aside["cgroup.procs"] = ask.pid
            expect(ask())
            own.path.rmdir()
            expect(ask())
            own = group.child("own", memory_max=limit_bytes)
            own["cgroup.procs"] = ask.pid
            expect(ask(), ("memory.max", name, limit_bytes), bound_by=name)


def test_an_ancestor_that_returns_under_its_name_is_another_one(group):
    name = f"/{group.path.name}/middle"
    aside = group.child("aside")
    with child.asking(limits, cgroup=aside) as ask:
        for limit_bytes in (64 * MIB, 96 * MIB):
            middle = group.child("middle", memory_max=limit_bytes)
            middle.child("own")["cgroup.procs"] = ask.pid
            expect(ask(), ("memory.max", name, limit_bytes), bound_by=name)
            aside["cgroup.procs"] = ask.pid
            middle.remove()
            expect(ask())


def test_a_controller_that_is_taken_away_and_given_back(group):
    group["memory.max"] = 256 * MIB
    own = group.child("own", memory_max=128 * MIB)
    top, name = f"/{group.path.name}", f"/{group.path.name}/own"
    with child.asking(limits, cgroup=own) as ask:
        expect(ask(), ("memory.max", name, 128 * MIB), ("memory.max", top, 256 * MIB), bound_by=name)
        group["cgroup.subtree_control"] = "-memory"
        expect(ask(), ("memory.max", top, 256 * MIB), bound_by=top)
        group["cgroup.subtree_control"] = "+memory"
        expect(ask(), ("memory.max", top, 256 * MIB), bound_by=top)
        own["memory.max"] = 128 * MIB
        expect(ask(), ("memory.max", name, 128 * MIB), ("memory.max", top, 256 * MIB), bound_by=name)


def test_in_a_deep_tree_each_level_may_be_the_one_that_binds(group):
    levels = [group]
    for depth in range(6):
        levels.append(levels[-1].child(f"level{depth}"))
    with child.asking(limits, cgroup=levels[-1]) as ask:
        for level in levels:
            level["memory.max"] = 96 * MIB
            name = f"/{level.path.relative_to(group.path.parent)}"
            expect(ask(), ("memory.max", name, 96 * MIB), bound_by=name)
            level["memory.max"] = "max"
