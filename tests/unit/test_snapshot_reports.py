"""What the child says over its pipe."""

import fcntl
import os
import select
import struct
import threading

import pytest

from memsafe._kernel.descriptors import Owned
from memsafe.snapshot.reports import Done, Progress, Raised, Reporter, ReportReader
from memsafe.snapshot.writer import Written

WRITTEN = Written(7, "crc32:00000000")


@pytest.fixture
def pipe():
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    fds = {"read": read_fd, "write": write_fd}
    yield fds
    for fd in fds.values():
        os.close(fd)


def heard(pipe):
    return ReportReader(Owned(pipe["read"])).read()


def test_reports_arrive_as_they_were_sent(pipe):
    reporter = Reporter(pipe["write"])
    reporter.progress(1, 2**70)
    reporter.done(4096, ["a warning with \udc80 in it"], WRITTEN)
    assert heard(pipe) == [Progress(1, 2**70), Done(4096, ("a warning with \udc80 in it",), WRITTEN)]


def test_copies_that_could_not_be_counted_are_none(pipe):
    Reporter(pipe["write"]).done(None, [], Written(0, None))
    assert heard(pipe) == [Done(None, (), Written(0, None))]


def test_an_exception_arrives_with_its_name_message_and_traceback(pipe):
    try:
        int("x")
    except ValueError as error:
        Reporter(pipe["write"]).raised(error)
    (report,) = heard(pipe)
    assert isinstance(report, Raised)
    assert report.type == "ValueError"
    assert "invalid literal" in report.message
    assert 'int("x")' in report.traceback


@pytest.mark.parametrize("character", ["x", "\0", "\u00e9", "\U0001f4a5", "\udc80"])
def test_the_longest_exception_arrives_whatever_it_is_written_in(pipe, character):
    kind = type(character.replace("\0", "x").replace("\udc80", "x") * 2**18, (Exception,), {})
    sender = threading.Thread(target=Reporter(pipe["write"]).raised, args=(kind(character * 2**20),))
    sender.start()
    reader, reports = ReportReader(Owned(pipe["read"])), []
    while not reports:
        select.select([pipe["read"]], [], [], 30)
        reports = reader.read()
    sender.join()
    (report,) = reports
    assert report.message == character * (16 * 1024)
    assert len(report.traceback) == 128 * 1024
    assert report.traceback.endswith(character + "\n")


def test_a_report_in_pieces_is_put_together(pipe):
    writer_read, writer_write = os.pipe2(os.O_NONBLOCK)
    Reporter(writer_write).done(1, [], WRITTEN)
    whole = os.read(writer_read, 1000)
    os.close(writer_read)
    os.close(writer_write)
    reader = ReportReader(Owned(pipe["read"]))
    for byte in whole[:-1]:
        os.write(pipe["write"], bytes([byte]))
        assert reader.read() == []
    os.write(pipe["write"], whole[-1:])
    assert reader.read() == [Done(1, (), WRITTEN)]
    assert not reader.at_end


def test_the_end_is_told(pipe):
    reader = ReportReader(Owned(pipe["read"]))
    os.close(pipe["write"])
    assert reader.read() == []
    assert reader.at_end
    pipe["write"] = os.open(os.devnull, os.O_WRONLY)


def test_a_full_pipe_drops_progress_but_the_last_one_and_the_outcome_wait(pipe):
    fcntl.fcntl(pipe["write"], fcntl.F_SETPIPE_SZ, 4096)
    while True:
        try:
            os.write(pipe["write"], struct.pack("=I", 17) + b'["progress", 1,1]')
        except BlockingIOError:
            break
    reporter = Reporter(pipe["write"])
    reporter.progress(7, 9)
    ending = threading.Thread(target=reporter.done, args=[None, [], Written(0, None)])
    ending.start()
    reader = ReportReader(Owned(pipe["read"]))
    reports = []
    while not any(isinstance(report, Done) for report in reports):
        reports += reader.read()
    ending.join()
    assert reports[-2:] == [Progress(7, 9), Done(None, (), Written(0, None))]


@pytest.mark.parametrize(
    "junk",
    [
        struct.pack("=I", 2**31),
        struct.pack("=I", 4) + b"junk",
        struct.pack("=I", 2) + b"[]",
        struct.pack("=I", 16) + b'["progress", 1.5]',
        struct.pack("=I", 2) + b"\xff\xfe",
    ],
)
def test_junk_on_the_pipe_is_an_error_and_no_report(pipe, junk):
    os.write(pipe["write"], junk)
    with pytest.raises(OSError, match="came from the child"):
        heard(pipe)


def test_a_file_that_never_ends_in_the_place_of_the_pipe_is_an_error():
    endless = Owned(os.open("/dev/zero", os.O_RDONLY))
    with pytest.raises(OSError, match="came from the child"):
        ReportReader(endless).read()
    endless.close()


def test_a_reader_that_was_closed_hears_nothing_and_the_writer_is_told():
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    reader = ReportReader(Owned(read_fd))
    os.write(write_fd, b"x")
    reader.close()
    reader.close()
    assert (reader.read(), reader.at_end) == ([], True)
    with pytest.raises(BrokenPipeError):
        os.write(write_fd, b"x")
    os.close(write_fd)
