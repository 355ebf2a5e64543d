"""The benchmarks' own arithmetic. What they measure is printed and never asserted."""

import json
import signal
import subprocess
import sys

import pytest

pytest.importorskip("pyperf", reason="pyperf, of the extra dev, is not installed")

from benchmarks import report, rounds, servers
from benchmarks.report import Options, Result, Skipped, compare
from benchmarks.survival import cells, observer, table
from benchmarks.survival.cells import MIB, Cell
from benchmarks.survival.journal import Ending, Journal, Mark


def test_a_comparison_is_of_medians():
    result = compare("a", "b", [1.0, 100.0, 2.0], [4.0, 4.0, 0.0])
    assert (result.ours, result.peer, result.ratio, result.rounds) == (2.0, 4.0, 0.5, 3)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.5, "s", "1.5 s"),
        (0.0123, "s", "12.3 ms"),
        (456e-6, "s", "456 µs"),
        (7e-10, "s", "0.7 ns"),
        (12345.6, "/s", "12,346/s"),
    ],
)
def test_figures_have_the_unit_that_suits_them(value, unit, text):
    assert report.figure(value, unit) == text


def test_every_contender_runs_once_a_round_in_changing_order():
    order = []

    def contender(name):
        def loop(loops):
            order.append(name)
            return loops * 2.0

        return loop

    seconds = rounds.alternate({"a": contender("a"), "b": contender("b")}, rounds=9)
    assert seconds == {"a": [2.0] * 9, "b": [2.0] * 9}
    orders = {tuple(order[turn : turn + 2]) for turn in range(0, len(order), 2)}
    assert len(order) == 2 * (9 + 1)  # the first round is not counted
    assert orders == {("a", "b"), ("b", "a")}


def test_loops_are_doubled_until_a_round_is_long_enough():
    asked = []

    def loop(loops):
        asked.append(loops)
        return loops * 0.25

    assert rounds.alternate({"a": loop}, rounds=1, at_least_s=1.0) == {"a": [0.25]}
    assert asked == [1, 2, 4, 4, 4]


def test_what_is_missing_is_skipped_by_name_and_the_rest_runs(monkeypatch):
    def missing(_options):
        raise ImportError("no such module: spam")

    def present(_options):
        yield Result("eggs", "peer", 1.0, 2.0)

    outcomes = report.run([("spam", missing), ("eggs", present)], Options())
    assert outcomes == [Skipped("spam", "no such module: spam"), Result("eggs", "peer", 1.0, 2.0)]
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(servers.UnavailableError, match="redis-server is not installed"):
        servers.program("redis-server")


@pytest.mark.parametrize("with_rich", [True, False])
def test_the_table_shows_every_figure_with_and_without_rich(capsys, monkeypatch, with_rich):
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    report.show([Result("spam", "eggs", 0.001, 0.002, target="ratio ≤ 1"), Skipped("ham", "too large")])
    shown = capsys.readouterr().out
    for text in ("spam", "eggs", "1 ms", "2 ms", "0.5", "ratio ≤ 1", "skipped: ham: too large"):
        assert text in shown


def test_json_holds_results_and_what_was_skipped(tmp_path):
    path = tmp_path / "figures.json"
    report.save([Result("spam", "eggs", 1.0, 4.0), Skipped("ham", "why")], path)
    saved = json.loads(path.read_text())
    assert saved["results"][0]["ratio"] == 0.25
    assert saved["skipped"] == [{"what": "ham", "why": "why"}]
    assert saved["machine"]["processors"] > 0


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "spam"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no such benchmark: spam; there are budget, " in done.stderr


# survival


@pytest.mark.parametrize("rate", cells.RATES)
@pytest.mark.parametrize("limit_bytes", cells.LIMITS)
@pytest.mark.parametrize("has_high", [False, True])
def test_nothing_survives_a_cell_without_an_answer_and_all_can_with_the_cache_given_up(limit_bytes, rate, has_high):
    cell = Cell(limit_bytes, rate, "none", has_high)
    for used_bytes in (MIB, 6 * MIB):  # beside the cache
        left_bytes = cell.tight_bytes - cell.cache_bytes - used_bytes
        demand_bytes = cell.demand_bytes(left_bytes)
        assert cell.cache_bytes + used_bytes + demand_bytes > limit_bytes
        assert used_bytes + demand_bytes + cell.chunk_bytes < cell.tight_bytes


def test_a_cell_goes_to_another_process_as_plain_data():
    (cell,) = cells.matrix(["memsafe"], limits=[MIB], rates=[None], highs=[True], kinds=["python"], runs=3)
    assert Cell.from_dict(json.loads(json.dumps(cell.as_dict()))) == cell
    assert str(cell) == "memsafe: python at full speed in 1 MiB, memory.high"


EXITED, KILLED, FAILED = 0, signal.SIGKILL, 1 << 8


@pytest.mark.parametrize(
    ("ending", "status", "oom_kills", "overdue", "outcome"),
    [
        (Ending.SURVIVED, EXITED, 0, False, "survived"),
        (Ending.GAVE_UP, EXITED, 0, False, "gave up"),
        (0, KILLED, 1, False, "killed"),
        (0, KILLED, 0, True, "stood still"),
        (0, KILLED, 1, True, "killed"),
        (0, KILLED, 0, False, "failed"),
        (0, FAILED, 0, False, "failed"),
        (0, EXITED, 0, False, "failed"),
    ],
)
def test_what_became_of_a_run_is_told_from_outside(ending, status, oom_kills, overdue, outcome):
    journal = Journal()
    journal[Mark.DONE] = ending
    assert observer._outcome(journal, status, oom_kills, overdue) == outcome
    journal.close()


def test_the_lead_is_what_was_left_at_the_first_response_and_the_time_until_the_limit_would_have_been_met():
    journal = Journal()
    journal[Mark.LEFT] = 10
    journal.took(4)
    journal.acted()
    journal.took(9)
    journal.called("LOW polling")
    assert journal[Mark.PASSED_AT] == 0
    journal.took(12)
    journal.took(14)
    run = observer._told(journal, "survived")
    assert (run.lead_bytes, run.source, run.taken_bytes) == (6, "LOW polling", 14)
    assert 0 <= run.lead_ms <= run.end_ms
    journal.close()


def test_runs_of_a_cell_are_a_row_of_their_place():
    told = {"what": "run", "kernel": "6.1", "cgroup": 2, "psi": True, "source": "LOW polling"}
    lines = [
        {**told, "cell": Cell(64 * MIB, None, "memsafe", True).as_dict(), "outcome": outcome, "lead_ms": ms} | lead
        for outcome, ms, lead in [
            ("survived", 3.0, {"lead_bytes": 2 * MIB}),
            ("survived", 1.0, {"lead_bytes": 4 * MIB}),
            ("killed", None, {"lead_bytes": None}),
        ]
    ]
    *heading, row, end = table.markdown([*lines, {"what": "cell"}])
    assert heading[0] == "### Linux 6.1, cgroup v2, PSI on"
    assert row == (
        "| 64 MiB | 57.6 MiB | native | full | memsafe | 2 of 3 | 1 killed | 2.0 (1.0) | 3.0 (2.0) | LOW polling 3 |"
    )
    assert end == ""
