import errno
import itertools
import signal
import threading

import pytest

import memsafe
from memsafe import oom

MOUNTS = {
    1: "30 25 0:26 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n",
    2: "30 25 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n",
}
MEMBERSHIP = {1: "4:memory:/app\n0::/\n", 2: "0::/app\n"}
DIRECTORY = {1: "sys/fs/cgroup/memory/app", 2: "sys/fs/cgroup/app"}


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def machine(root, version, files):
    above = DIRECTORY[version].removesuffix("/app")
    write(root, {"proc/self/cgroup": MEMBERSHIP[version], "proc/self/mountinfo": MOUNTS[version]})
    if version == 2:
        write(root, {f"{above}/cgroup.controllers": "memory\n", f"{DIRECTORY[2]}/cgroup.controllers": "memory\n"})
    return write(root, {f"{DIRECTORY[version]}/{name}": text for name, text in files.items()})


def test_kills_come_from_memory_events_in_v2(tmp_path):
    events = "low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 1\n"
    assert oom.kills(root=machine(tmp_path, 2, {"memory.events": events})) == 3


def test_kills_come_from_oom_control_in_v1(tmp_path):
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"
    assert oom.kills(root=machine(tmp_path, 1, {"memory.oom_control": control})) == 7


def test_kills_are_the_machines_where_the_cgroup_does_not_count(tmp_path):
    root = machine(tmp_path, 1, {"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"})
    write(tmp_path, {"proc/vmstat": "pgfault 12\noom_kill 5\n"})
    assert oom.kills(root=root) == 5


def test_kills_that_nobody_counts_are_said_to_be_unsupported(tmp_path):
    root = machine(tmp_path, 1, {"memory.limit_in_bytes": "4096\n"})
    with pytest.raises(memsafe.UnsupportedError, match=r"not counted here.*since Linux 4\.13"):
        oom.kills(root=root)


def test_a_counter_that_makes_no_sense_is_an_error_and_no_number(tmp_path):
    root = machine(tmp_path, 2, {"memory.events": "oom_kill many\n"})
    with pytest.raises(memsafe.KernelError, match=r"memory\.events.*not a number"):
        oom.kills(root=root)


def test_score_and_adjustment_are_read_as_they_are(tmp_path):
    write(tmp_path, {"proc/self/oom_score": "666\n", "proc/self/oom_score_adj": "-17\n"})
    assert oom.score(root=tmp_path) == 666
    assert oom.score_adj(root=tmp_path) == -17


def test_a_score_that_is_not_told_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(memsafe.KernelError, match=r"/proc/self/oom_score: No such file.*is proc mounted") as caught:
        oom.score(root=tmp_path)
    assert caught.value.errno == errno.ENOENT


def test_set_score_adj_writes_the_number_and_returns_the_old_one(tmp_path):
    write(tmp_path, {"proc/self/oom_score_adj": "5\n"})
    assert oom.set_score_adj(500, root=tmp_path) == 5
    assert (tmp_path / "proc/self/oom_score_adj").read_text().startswith("500")


@pytest.mark.parametrize("junk", [-1001, 1001, 10**30])
def test_set_score_adj_out_of_range_is_refused_before_anything_is_read(tmp_path, junk):
    with pytest.raises(ValueError, match="from -1000 to 1000"):
        oom.set_score_adj(junk, root=tmp_path)


@pytest.mark.parametrize(("before", "after"), [(0, -500), (300, -200), (-600, -999), (-999, -999), (-1000, -1000)])
def test_protect_takes_500_off_and_never_exempts(tmp_path, before, after):
    path = tmp_path / "proc/self/oom_score_adj"
    write(tmp_path, {"proc/self/oom_score_adj": f"{before:<5}\n"})
    assert oom.protect(root=tmp_path) == before
    assert int(path.read_text().split()[0]) == after


@pytest.mark.parametrize(
    ("before", "offset", "after"),
    [(100, 200, 300), (100, -200, -100), (900, 200, 1000), (-600, -500, -999), (-1000, -1, -1000), (-1000, 1, -999)],
)
def test_adjust_by_goes_from_what_was_inherited_and_never_exempts(tmp_path, before, offset, after):
    machine_at(tmp_path, before)
    with oom.adjust_by(offset, root=tmp_path) as was:
        assert (was, oom.score_adj(root=tmp_path)) == (before, after)
    assert oom.score_adj(root=tmp_path) == before


def test_a_block_that_changed_nothing_writes_nothing_at_its_end(tmp_path, monkeypatch):
    machine_at(tmp_path, 1000)
    written = []
    monkeypatch.setattr(oom.kernel, "write_score_adj", lambda *args: written.append(args))
    with oom.adjust_by(100, root=tmp_path):
        pass
    assert written == []


def test_an_offset_that_is_no_int_is_refused(tmp_path):
    machine_at(tmp_path, 0)
    with pytest.raises(TypeError):
        oom.adjust_by(0.5, root=tmp_path)


def test_nobody_changes_the_value_between_its_reading_and_its_writing(tmp_path, monkeypatch):
    machine_at(tmp_path, 0)
    steps = []

    def noting(step, call):
        def noted(*args):
            steps.append((threading.get_ident(), step))
            return call(*args)

        return noted

    monkeypatch.setattr(oom.process, "oom_score_adj", noting("read", oom.process.oom_score_adj))
    monkeypatch.setattr(oom.kernel, "write_score_adj", noting("write", oom.kernel.write_score_adj))
    start = threading.Barrier(4)

    def work():
        start.wait()
        for change in (lambda: oom.adjust_by(1, root=tmp_path), lambda: oom.set_score_adj(7, root=tmp_path)) * 20:
            with change():
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last_of_each_turn = {step for (who, step), (next_one, _) in itertools.pairwise(steps) if who != next_one}
    assert last_of_each_turn == {"write"}
    assert oom.score_adj(root=tmp_path) == 0


def test_a_handler_that_interrupts_a_change_may_change_it_as_well(tmp_path, monkeypatch):
    machine_at(tmp_path, 0)
    write_score_adj, seen = oom.kernel.write_score_adj, []

    def interrupted(score_adj, root):
        monkeypatch.setattr(oom.kernel, "write_score_adj", write_score_adj)
        signal.raise_signal(signal.SIGUSR1)
        write_score_adj(score_adj, root)

    def handle(*_):
        with oom.adjust_by(5, root=tmp_path):
            seen.append(oom.score_adj(root=tmp_path))

    monkeypatch.setattr(oom.kernel, "write_score_adj", interrupted)
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with oom.set_score_adj(300, root=tmp_path):
            assert (seen, oom.score_adj(root=tmp_path)) == ([5], 300)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert oom.score_adj(root=tmp_path) == 0


def machine_at(root, score_adj):
    write(root, {"proc/self/oom_score_adj": f"{score_adj}\n"})


def test_what_was_set_for_a_block_is_taken_back_at_its_end(tmp_path):
    machine_at(tmp_path, 100)
    with oom.set_score_adj(300, root=tmp_path) as before:
        assert (before, oom.score_adj(root=tmp_path)) == (100, 300)
    assert oom.score_adj(root=tmp_path) == 100
    with oom.protect(root=tmp_path):
        assert oom.score_adj(root=tmp_path) == -400
    assert oom.score_adj(root=tmp_path) == 100


def test_it_is_taken_back_when_the_block_fails(tmp_path):
    machine_at(tmp_path, 100)

    def fail():
        with oom.protect(root=tmp_path):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert oom.score_adj(root=tmp_path) == 100


def test_what_others_changed_meanwhile_stays(tmp_path):
    machine_at(tmp_path, 0)
    with oom.protect(root=tmp_path):
        machine_at(tmp_path, -300)
    assert oom.score_adj(root=tmp_path) == 200


def test_changes_that_overlap_may_end_in_any_order(tmp_path):
    machine_at(tmp_path, 0)
    first, second = oom.protect(root=tmp_path), oom.protect(root=tmp_path)
    assert oom.score_adj(root=tmp_path) == -999
    for protection, left in ((first, -499), (second, 0), (first, 0)):
        with protection:
            pass
        assert oom.score_adj(root=tmp_path) == left


@pytest.mark.parametrize("before", [-1000, -999])
def test_where_there_is_nothing_left_to_take_off_nothing_is_given_back(tmp_path, before):
    machine_at(tmp_path, before)
    with oom.protect(root=tmp_path):
        assert oom.score_adj(root=tmp_path) == before
    assert oom.score_adj(root=tmp_path) == before
