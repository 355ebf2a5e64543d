"""AtomicFile: the old file or the complete new one."""

import errno
import fcntl
import itertools
import os
import stat
from contextlib import ExitStack

import pytest

from memsafe.snapshot import AtomicFile, atomic
from tests.integration.scenario import open_files, opened_since

TMPFILE = os.O_TMPFILE


@pytest.fixture(params=["nameless", "named"])
def kind(request, monkeypatch):
    """Run each test with O_TMPFILE and as on a file system that has none."""
    if request.param == "named":
        without_tmpfile(monkeypatch)
    return request.param


def without_tmpfile(monkeypatch):
    real = os.open

    def opened(path, flags, *args, **keywords):
        if flags & TMPFILE == TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return real(path, flags, *args, **keywords)

    monkeypatch.setattr(os, "open", opened)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dump.db"


def replace(path, data=b"new"):
    with AtomicFile(path) as file:
        os.write(file.fd, data)
        return file.commit()


def names(path):
    return sorted(os.listdir(path.parent))


def test_commit_puts_the_new_file_in_place_and_returns_its_size(kind, path):
    path.write_bytes(b"old and longer")
    assert replace(path) == 3
    assert path.read_bytes() == b"new"
    assert names(path) == ["dump.db"]


def test_a_path_without_a_file_gets_one(kind, path):
    replace(path)
    assert path.read_bytes() == b"new"


def test_leaving_without_commit_leaves_the_old_file_and_nothing_else(kind, path):
    path.write_bytes(b"old")
    with AtomicFile(path) as file:
        os.write(file.fd, b"half")
    assert path.read_bytes() == b"old"
    assert names(path) == ["dump.db"]


def test_the_new_file_is_invisible_or_hidden_until_commit(kind, path):
    with AtomicFile(path):
        visible = names(path)
    assert visible == ([] if kind == "nameless" else visible)
    assert all(name.startswith(".dump.db.memsafe-") for name in visible)


def test_close_twice_is_a_noop(kind, path):
    file = AtomicFile(path)
    file.close()
    file.close()


def test_a_new_file_gets_0666_less_the_umask(kind, path):
    before = os.umask(0o027)
    try:
        replace(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_old_files_permissions_are_kept(kind, path):
    path.write_bytes(b"old")
    path.chmod(0o604)
    replace(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def other_group():
    """A group of this process's that new files do not get, or None."""
    return next((group for group in os.getgroups() if group != os.getegid()), None)


def owned(path):
    status = path.stat()
    return status.st_uid, status.st_gid, oct(stat.S_IMODE(status.st_mode))


def test_the_old_files_owner_and_group_are_kept_where_they_may_be_given(kind, path):
    path.write_bytes(b"old")
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    elif (group := other_group()) is not None:
        os.chown(path, -1, group)
    path.chmod(0o6750 if os.geteuid() == 0 else 0o750)  # a write by others than root takes the first two bits away
    before = owned(path)
    replace(path)
    assert owned(path) == before


def test_what_was_granted_to_an_owner_and_a_group_that_cannot_be_kept_is_granted_to_no_others(kind, path, monkeypatch):
    path.write_bytes(b"old")
    path.chmod(0o6754)
    mine = path.stat()

    def refuse(*args):
        raise PermissionError(errno.EPERM, "")

    class Strangers:
        def __getattr__(self, name):
            return {"st_uid": mine.st_uid + 1, "st_gid": mine.st_gid + 1}.get(name, getattr(mine, name))

    monkeypatch.setattr(os, "fchown", refuse)
    monkeypatch.setattr(AtomicFile, "_old", lambda self: Strangers())
    replace(path)
    assert owned(path) == (mine.st_uid, mine.st_gid, "0o744")


def test_nobody_can_open_a_named_file_before_it_has_the_old_ones_permissions(path, monkeypatch):
    without_tmpfile(monkeypatch)
    path.write_bytes(b"old")
    path.chmod(0o600)
    given = []
    real = os.fchown

    def look(fd, *args):
        given.append(oct(stat.S_IMODE(os.fstat(fd).st_mode)))
        real(fd, *args)

    monkeypatch.setattr(os, "fchown", look)
    replace(path)
    assert given[0] == "0o600"


def test_a_symbolic_link_stays_and_its_target_is_replaced(kind, tmp_path):
    (tmp_path / "data").mkdir()
    target = tmp_path / "data" / "real.db"
    target.write_bytes(b"old")
    link = tmp_path / "link.db"
    link.symlink_to(target)
    replace(link)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("as_type", [str, os.fsencode, lambda path: path])
def test_a_path_may_be_str_bytes_or_pathlike(path, as_type):
    replace(as_type(path))
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127])
def test_the_longest_names_work(kind, tmp_path, name):
    replace(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"new"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["", "/", "/none/", "/."])
def test_a_folder_at_the_path_is_refused(tmp_path, name):
    with pytest.raises(IsADirectoryError):
        AtomicFile(f"{tmp_path}{name}")


@pytest.mark.parametrize("name", ["", "none/dump.db"])
def test_a_path_to_nowhere_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        AtomicFile(name)


def test_a_file_as_folder_is_refused(path):
    path.write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        AtomicFile(path / "dump.db")


def test_a_device_or_fifo_is_never_replaced(path):
    os.mkfifo(path)
    with pytest.raises(OSError, match="Not a regular file"):
        AtomicFile(path)


def test_moving_the_folder_meanwhile_moves_the_target(kind, tmp_path):
    (tmp_path / "a").mkdir()
    with AtomicFile(tmp_path / "a" / "dump.db") as file:
        (tmp_path / "a").rename(tmp_path / "b")
        file.commit()
    assert os.listdir(tmp_path / "b") == ["dump.db"]


def test_left_overs_of_the_dead_are_removed_and_files_in_use_are_not(path):
    dead = path.parent / ".dump.db.memsafe-1-0.tmp"
    in_use = path.parent / ".dump.db.memsafe-2-0.tmp"
    other = path.parent / ".other.db.memsafe-1-0.tmp"
    for file in (dead, in_use, other):
        file.write_bytes(b"x")
    with open(in_use) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        replace(path)
    assert names(path) == sorted([in_use.name, other.name, "dump.db"])


@pytest.mark.parametrize("what", ["read-only", "lockable when writable"])
def test_a_left_over_that_cannot_be_opened_or_locked_in_one_way_is_removed_in_the_other(path, monkeypatch, what):
    dead = path.parent / ".dump.db.memsafe-1-0.tmp"
    dead.write_bytes(b"x")
    if what == "read-only":
        dead.chmod(0o444)
        monkeypatch.setattr(os, "open", as_nobody(os.open))
    else:
        monkeypatch.setattr(fcntl, "flock", as_on_nfs(fcntl.flock))
    replace(path)
    assert names(path) == ["dump.db"]


def as_nobody(real):
    """open(2) without root's privilege."""

    def opened(name, flags, *args, **keywords):
        if os.fspath(name).endswith("-1-0.tmp") and flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return real(name, flags, *args, **keywords)

    return opened


def as_on_nfs(real):
    """An exclusive lock only where the file may be written (flock(2))."""

    def locked(fd, operation):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(fd, operation)

    return locked


def test_a_name_that_a_process_of_the_same_number_in_another_container_has_is_passed_over(kind, path, monkeypatch):
    monkeypatch.setattr(atomic, "_numbers", itertools.count(7))
    taken = [path.parent / f".dump.db.memsafe-{os.getpid()}-{number}.tmp" for number in (7, 8)]
    with ExitStack() as theirs:
        for file in taken:
            fcntl.flock(theirs.enter_context(file.open("w")), fcntl.LOCK_EX)
        replace(path)
        assert names(path) == sorted(["dump.db", *(file.name for file in taken)])
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("lost", ["removed before it was locked", "locked by the remover"])
def test_a_file_that_another_one_takes_for_a_left_over_before_it_is_locked_is_made_anew(path, monkeypatch, lost):
    without_tmpfile(monkeypatch)
    flock, removers = fcntl.flock, []

    def late(fd, operation):
        """Let another AtomicFile for the path come between, once: it removes what nobody has locked."""
        if not removers:
            removers.append(fd)
            (name,) = names(path)
            if lost == "locked by the remover":
                removers.append(os.open(path.parent / name, os.O_RDONLY))
                flock(removers[1], operation)
            else:
                AtomicFile(path).close()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with AtomicFile(path) as file:
        for remover in removers[1:]:
            os.close(remover)
        os.write(file.fd, b"new")
        AtomicFile(path).close()  # now it is locked, and no left-over
        assert file.commit() == 3
    assert path.read_bytes() == b"new"
    assert names(path) == ["dump.db"]


def test_where_somebody_removes_every_file_at_once_that_is_told(path, monkeypatch):
    without_tmpfile(monkeypatch)
    before = open_files()
    monkeypatch.setattr(fcntl, "flock", lambda *_: os.unlink(path.parent / names(path)[0]))
    with pytest.raises(OSError, match="removed at once by somebody else"):
        AtomicFile(path)
    assert names(path) == []
    assert opened_since(before) == []


def test_where_every_name_is_taken_that_is_told(kind, path, monkeypatch):
    def taken(*_, **__):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", taken)
    real = os.open
    monkeypatch.setattr(os, "open", lambda *a, **k: taken() if a[1] & os.O_EXCL else real(*a, **k))
    with pytest.raises(FileExistsError):
        replace(path)
    assert names(path) == []


def test_no_descriptor_is_left_open(kind, path):
    before = open_files()
    replace(path)
    for bad in (path.parent, path.parent / "none" / "x"):
        with pytest.raises(OSError):  # noqa: PT011 - of two kinds
            AtomicFile(bad)
    assert opened_since(before) == []


class Faults:
    """Fails the n-th of the file system's calls, once or from then on."""

    NAMES = ("open", "fchown", "fchmod", "link", "fsync", "rename", "stat", "fstat", "listdir")

    def __init__(self, monkeypatch, nth, *, for_good):
        self.left = nth
        self.for_good = for_good
        self.failed = False
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, call):
        def wrapped(*args, **keywords):
            self.left -= 1
            if self.left == 0 or (self.for_good and self.left < 0):
                self.failed = True
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args, **keywords)

        return wrapped


@pytest.mark.parametrize("for_good", [False, True])
def test_whatever_fails_there_is_the_old_file_or_the_new_one_and_nothing_else(kind, path, for_good):
    before = open_files()
    outcomes = []
    for nth in range(1, 100):
        path.write_bytes(b"old")
        path.chmod(0o600)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, nth, for_good=for_good)
            try:
                replace(path)
                outcomes.append("new")
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017 - success is possible too
                outcomes.append("failed")
        # Only the folder's own fsync comes after the rename.
        assert path.read_bytes() in ((b"new",) if outcomes[-1] == "new" else (b"old", b"new"))
        assert names(path) == ["dump.db"]
        assert opened_since(before) == []
        if not faults.failed:
            break
    assert outcomes[-1] == "new"
    assert outcomes.count("failed") >= 5


def test_the_long_sync_comes_before_there_is_a_name_and_a_short_one_after(kind, path, monkeypatch):
    """btrfs keeps an inode that has no name out of its log (btrfs_log_inode_parent()): so it is synced twice."""
    calls = []

    def noting(call, note):
        def noted(*args, **keywords):
            calls.append(note(*args))
            return call(*args, **keywords)

        return noted

    def what(fd):
        return "folder synced" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"file with {len(names(path))} names synced"

    monkeypatch.setattr(os, "fsync", noting(os.fsync, what))
    monkeypatch.setattr(os, "rename", noting(os.rename, lambda *_: "renamed"))
    replace(path)
    nameless = ["file with 0 names synced"] if kind == "nameless" else []
    assert calls == [*nameless, "file with 1 names synced", "renamed", "folder synced"]


@pytest.mark.parametrize(("code", "works"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_without_fsync_of_folders_is_good_enough_but_an_error_is_told(path, monkeypatch, code, works):
    real = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    if works:
        replace(path)
    else:
        with pytest.raises(OSError, match="Input/output"):
            replace(path)
    assert path.read_bytes() == b"new"
