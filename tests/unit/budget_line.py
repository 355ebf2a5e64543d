"""Who asks a budget and waits: threads and tasks that stand in line."""

import asyncio
import threading
import time

import pytest
import uvloop

FOR_EVER_S = 60.0  # long enough that nobody sees the end of it

LOOPS = pytest.mark.parametrize(
    "loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


class Requester(threading.Thread):
    """A thread that asks for *size* bytes and waits for them."""

    def __init__(self, budget, size, timeout_s=FOR_EVER_S, call=None):
        super().__init__(daemon=True)
        self.budget, self.size, self.timeout_s = budget, size, timeout_s
        self.call = call or budget.reserve
        self.result = self.error = None
        self.start()

    def run(self):
        try:
            self.result = self.call(self.size, timeout_s=self.timeout_s)
        except BaseException as error:
            self.error = error

    def stands_in_line(self):
        """Come back when it does."""
        root = self.budget._root()
        while not any(
            claim.budget is self.budget and claim.size_bytes == self.size and claim.in_line
            for claim in list(root._policy.claims)
        ):
            time.sleep(0.001)
            assert self.is_alive(), (self.result, self.error)
        return self

    def outcome(self):
        self.join(FOR_EVER_S)
        assert not self.is_alive()
        if self.error:
            raise self.error
        return self.result


def in_line(budget, size, **options):
    return Requester(budget, size, **options).stands_in_line()


def run(main, loop_factory=asyncio.new_event_loop):
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)


async def tasks_in_line(root, count):
    while sum(claim.in_line for claim in root._policy.claims) < count:
        await asyncio.sleep(0)
