"""A soak of budgets: threads, tasks, reclaimers, waiters, moves, aborts and closes at once, ending at exactly zero.

``python -m tests.soak --seconds 600 --threads 16 --seed 1``. It fails, with what every thread was doing, when a budget
holds more than its limit allows, when nobody gets anywhere for a minute, or when anything is left at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import faulthandler
import gc
import logging
import random
import sys
import threading
import time
import warnings

from memsafe import Budget, BudgetAbortedError, BudgetClosedError, BudgetExceededError, ReservationClosedError

LIMIT_BYTES = 1 << 20
OVERDRAFT_BYTES = LIMIT_BYTES // 16
STUCK_S = 60.0

REFUSED = (BudgetExceededError, BudgetAbortedError, BudgetClosedError, ReservationClosedError)


class Cache:
    """Holds reservations until it is asked for them; sometimes lies, fails, or needs room itself."""

    def __init__(self, budget: Budget, soak: Soak, *, asynchronous: bool) -> None:
        self.budget, self.soak, self.held = budget, soak, collections.deque()
        budget.reclaimer(
            self.shed_async if asynchronous else self.shed,
            priority=soak.random.randrange(3),
            reclaimable=None if soak.random.random() < 0.5 else lambda: sum(r.size_bytes for r in list(self.held)),
        )

    def fill(self, size: int) -> None:
        reservation = self.budget.try_reserve(size)
        if reservation is not None:
            self.held.append(reservation)

    def shed(self, need_bytes: int) -> int:
        self.soak.counts["reclaim"] += 1
        chance = random.random()
        if chance < 0.05:
            raise RuntimeError("a reclaimer that fails")
        if chance < 0.1:
            return need_bytes  # a lie
        if chance < 0.2 and (buffer := self.budget.try_reserve(4096)) is not None:
            self.soak.counts["overdraft"] += 1
            buffer.release()
        freed_bytes = 0
        with contextlib.suppress(IndexError):
            while freed_bytes < need_bytes:
                reservation = self.held.popleft()
                freed_bytes += reservation.size_bytes
                reservation.release()
        return freed_bytes

    async def shed_async(self, need_bytes: int) -> int:
        await asyncio.sleep(0)
        return self.shed(need_bytes)

    def empty(self) -> None:
        while self.held:
            self.held.pop().release()


class Soak:
    """One run: a tree, its caches, and the threads that use them."""

    def __init__(self, seconds: float, threads: int, seed: int) -> None:
        self.until_s = time.monotonic() + seconds
        self.random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self.root = Budget(LIMIT_BYTES, name="soak", soft_limit=LIMIT_BYTES // 2)
        self.root.on_soft_limit(lambda budget: self.count("soft"))
        self.shared = [self.root.child(f"shared{i}", LIMIT_BYTES // (1 + i), quantum=i // 3 * 4096) for i in range(4)]
        self.caches = [Cache(self.shared[i % 4].child(f"cache{i}"), self, asynchronous=i % 3 == 2) for i in range(6)]
        self.progress = [0] * (threads + 2)
        self.threads = [
            threading.Thread(target=self.guarded, args=(self.work, i, seed), name=f"worker-{i}", daemon=True)
            for i in range(threads)
        ]
        self.threads.append(
            threading.Thread(target=self.guarded, args=(self.tasks, threads, seed), name="tasks", daemon=True)
        )
        self.threads.append(
            threading.Thread(target=self.guarded, args=(self.watch, threads + 1, seed), name="watch", daemon=True)
        )

    def count(self, what: str) -> None:
        self.counts[what] += 1  # not exact under threads: nothing is judged by it

    def guarded(self, body, number: int, seed: int) -> None:
        try:
            body(number, random.Random(f"{seed}-{number}"))
        except BaseException as error:
            self.failures.append(f"{threading.current_thread().name}: {error!r}")
            raise

    def running(self, number: int) -> bool:
        """Go on until the time is over, and everything that is to happen has, however slow the machine is."""
        self.progress[number] += 1
        is_over = time.monotonic() >= self.until_s and all(self.counts[what] for what in EXPECTED)
        return not is_over and not self.failures

    # ------------------------------------------------------------------------------------------------ threads

    def work(self, number: int, rng: random.Random) -> None:
        mine: list = []
        while self.running(number):
            step = rng.choice(STEPS)
            try:
                getattr(self, step)(rng, mine, number)
                self.count(step)
            except REFUSED as error:
                self.count(type(error).__name__)
            while len(mine) > 4:
                mine.pop(rng.randrange(len(mine))).release()
        for reservation in mine:
            reservation.release()

    def anywhere(self, rng: random.Random) -> Budget:
        return rng.choice(self.shared)

    def reserve(self, rng, mine, number) -> None:
        mine.append(self.anywhere(rng).reserve(rng.randrange(LIMIT_BYTES // 64)))

    def reserve_and_wait(self, rng, mine, number) -> None:
        while len(mine) > 2:  # who waits holds little, or nobody would get anywhere
            mine.pop().release()
        mine.append(self.anywhere(rng).reserve(rng.randrange(LIMIT_BYTES // 8), timeout_s=rng.random() * 0.05))

    def grow(self, rng, mine, number) -> None:
        if mine:
            rng.choice(mine).grow(rng.randrange(LIMIT_BYTES // 64), timeout_s=rng.choice((None, 0.01)))

    def resize(self, rng, mine, number) -> None:
        if mine:
            rng.choice(mine).resize(rng.randrange(LIMIT_BYTES // 32))

    def split_and_merge(self, rng, mine, number) -> None:
        if mine:
            whole = rng.choice(mine)
            part = whole.split(whole.size_bytes // 2)
            if rng.random() < 0.5:
                mine.append(part)
            else:
                whole.merge(part)

    def move(self, rng, mine, number) -> None:
        if mine:
            rng.choice(mine).move_to(self.anywhere(rng))

    def charge(self, rng, mine, number) -> None:
        budget, size = self.anywhere(rng), rng.randrange(512)
        budget.charge(size)
        budget.uncharge(size)

    def query(self, rng, mine, number) -> None:
        """A subtree of its own that ends in one way or another, perhaps while another thread waits in it."""
        with self.anywhere(rng).child(f"query{number}", LIMIT_BYTES // 8) as query:
            scan = query.child("scan")
            with scan.reserve(rng.randrange(LIMIT_BYTES // 64)):
                waiter = threading.Thread(target=self.wait_in, args=(scan, rng.random()))
                waiter.start()
                ending = rng.randrange(3)
                if ending == 0:
                    query.abort("the soak wants it so")
                elif ending == 1:
                    self.root.report()
            if ending == 2:
                scan.close()
            waiter.join()

    def wait_in(self, budget: Budget, chance: float) -> None:
        with contextlib.suppress(*REFUSED), budget.reserve(int(chance * LIMIT_BYTES / 6), timeout_s=0.02):
            self.count("granted beside an end")

    def fill_a_cache(self, rng, mine, number) -> None:
        rng.choice(self.caches).fill(rng.randrange(LIMIT_BYTES // 32))

    def change_a_limit(self, rng, mine, number) -> None:
        i = rng.randrange(4)
        self.shared[i].limit_bytes = rng.randrange(LIMIT_BYTES // 4, LIMIT_BYTES)

    def lose(self, rng, mine, number) -> None:
        with warnings.catch_warnings():
            self.anywhere(rng).try_reserve(rng.randrange(1024))  # and drop it: the collector gives it back

    # ------------------------------------------------------------------------------------------------ tasks

    def tasks(self, number: int, rng: random.Random) -> None:
        asyncio.run(self.all_tasks(number, rng))

    async def all_tasks(self, number: int, rng: random.Random) -> None:
        await asyncio.gather(*(self.task(number, random.Random(rng.random())) for _ in range(20)))

    async def task(self, number: int, rng: random.Random) -> None:
        while self.running(number):
            request = self.anywhere(rng).reserve_async(rng.randrange(LIMIT_BYTES // 32), timeout_s=rng.random() * 0.1)
            try:
                if rng.random() < 0.3:
                    reservation = await asyncio.wait_for(request, rng.random() * 0.01)
                else:
                    reservation = await request
            except TimeoutError:
                self.count("cancelled task")
            except REFUSED as error:
                self.count(type(error).__name__)
            else:
                self.count("task")
                with reservation:
                    await asyncio.sleep(rng.random() * 0.001)

    # ------------------------------------------------------------------------------------------------ the judge

    def watch(self, number: int, rng: random.Random) -> None:
        seen, since_s = list(self.progress), [time.monotonic()] * len(self.progress)
        bound_bytes = LIMIT_BYTES + OVERDRAFT_BYTES + len(self.threads) * 512
        while self.running(number):
            time.sleep(0.05)
            if not 0 <= self.root.used_bytes <= bound_bytes:
                self.failures.append(f"the root holds {self.root.used_bytes} of {bound_bytes}")
            now_s = time.monotonic()
            for i, steps in enumerate(list(self.progress)):
                if steps != seen[i]:
                    seen[i], since_s[i] = steps, now_s
                elif now_s - since_s[i] > STUCK_S and self.threads[i].is_alive():
                    faulthandler.dump_traceback(all_threads=True)
                    self.failures.append(
                        f"{self.threads[i].name} got nowhere for {STUCK_S:.0f} s\n{self.root.report()}"
                    )
                    since_s[i] = now_s

    def run(self) -> list[str]:
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join(max(0.0, self.until_s - time.monotonic()) + 2 * STUCK_S)
            if thread.is_alive():
                faulthandler.dump_traceback(all_threads=True)
                return [*self.failures, f"{thread.name} did not end\n{self.root.report()}"]
        for cache in self.caches:
            cache.empty()
        gc.collect()
        self.root._collect_slack()
        budgets = [self.root, *self.shared, *(cache.budget for cache in self.caches)]
        for budget in budgets:
            if budget.used_bytes or budget.waiting or budget.charged_bytes:
                self.failures.append(f"left at the end: {budget!r}, {budget.waiting} waiting")
        if self.root._policy.claims:
            self.failures.append(f"claims left: {self.root._policy.claims}")
        for budget in budgets:
            budget.limit_bytes = LIMIT_BYTES
        with self.caches[0].budget.reserve(LIMIT_BYTES):  # every gate is open again
            pass
        return self.failures


STEPS = (
    *["reserve"] * 4, *["reserve_and_wait"] * 4, *["grow"] * 2, "resize", "split_and_merge", "move", "charge", "query",
    *["fill_a_cache"] * 4, "change_a_limit", "lose",
)  # fmt: skip


EXPECTED = ("task", "reclaim", "reserve_and_wait", "query", "move", "overdraft")


def main() -> int:
    parser = argparse.ArgumentParser(description="Soak budgets in threads, tasks, reclaimers, waiters and aborts.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.getLogger("memsafe.budget").setLevel(logging.CRITICAL)  # failing reclaimers are a part of it
    warnings.simplefilter("ignore", ResourceWarning)  # so are lost reservations, and closes with bytes in use
    soak = Soak(options.seconds, options.threads, options.seed)
    failures = soak.run()
    print(", ".join(f"{what} {count:,}" for what, count in sorted(soak.counts.items())))
    print("\n".join(failures) or f"ended at zero; at most {soak.root.peak_bytes:,} of {LIMIT_BYTES:,} bytes were held")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
