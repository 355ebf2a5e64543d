"""Refusals by guard_python_heap() in real code: ``python -m tests.integration.heap_refusals [COUNT] [SEED] [CODE]``.

With a COUNT of 2000 and the CODE ``ast`` every file of the standard library is parsed.

Each refusal: a piece of real code runs until the heap guard refuses it one allocation, somewhere. It must end, by a
MemoryError or with the right result, and the same code must give the right result when it runs again. Half of them are
put in at a chosen question to the guard; the others come about by themselves, from a limit just above what is used and
pymalloc's pools filled up to a few. They run in children, a hundred refusals each, so that a crash or a hang is told
with its seed and its traceback.
"""

from __future__ import annotations

import ast
import asyncio
import collections
import contextlib
import copy
import csv
import dataclasses
import decimal
import faulthandler
import functools
import io
import itertools
import json
import pickle
import random
import re
import sqlite3
import string
import subprocess
import sys
import sysconfig
import threading
import traceback
import types
from pathlib import Path

from memsafe import Budget, guard_python_heap
from memsafe._native import heap

A_CHILD = 100
HANG_S = 200
MIB = 1 << 20

STDLIB = sorted(
    path
    for path in Path(sysconfig.get_path("stdlib")).rglob("*.py")
    if not {"site-packages", "bad_syntax", "lib2to3"} & set(path.parts) and b"\0" not in path.read_bytes()
)
WORDS = "".join(random.Random(1).choices(string.ascii_lowercase + "  \n", k=30_000))


# ------------------------------------------------------------------------------------------------------- real code


def use_json(salt):
    document = {f"key {salt} {n}": [n, n / 3, None, {"nested": WORDS[n : n + 40]}] for n in range(500)}
    text = json.dumps(document, indent=1)
    return json.loads(text) == document, text


def use_sqlite(salt):
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.create_function("back", 1, lambda text: text[::-1])
        db.execute("create table words (id integer primary key, word text, salt integer)")
        db.executemany("insert into words (word, salt) values (?, ?)", ((word, salt) for word in WORDS.split()[:800]))
        rows = db.execute("select back(word), count(*) from words group by word order by 2 desc, 1").fetchall()
        blob = db.execute("select group_concat(word, '') from words").fetchone()
    return rows, blob


def use_re(salt):
    re.purge()
    pattern = re.compile(rf"(?P<first>\w+)\s+((?:[aeiou]|{salt})\w*)|[^x]{{3,9}}y")
    found = pattern.findall(WORDS)
    return found, pattern.sub(lambda match: match[0].upper(), WORDS), re.split(r"\s*\n", WORDS)


def use_csv(salt):
    out = io.StringIO()
    writer = csv.DictWriter(out, ["word", "length", "salt"])
    writer.writeheader()
    writer.writerows({"word": f'"{word}",', "length": len(word), "salt": salt} for word in WORDS.split()[:600])
    return list(csv.DictReader(io.StringIO(out.getvalue()))), out.getvalue()


def use_decimal(salt):
    with decimal.localcontext(decimal.Context(prec=1500)):
        root = decimal.Decimal(salt + 2).sqrt()
        return str(root * root), str(root**9), str(1 / root)


def use_dataclasses(salt):
    made = dataclasses.make_dataclass(
        f"Made{salt}", [(f"field_{n}", int, n) for n in range(30)], order=True, slots=True
    )
    rows = sorted((made(salt, n % 7, n) for n in range(300)), reverse=True)
    replaced = dataclasses.replace(rows[0], field_3=salt)
    return repr(replaced), [dataclasses.asdict(row) for row in rows], [dataclasses.astuple(row) for row in rows[:20]]


async def pass_on(source, sink):
    while (item := await source.get()) is not None:
        await sink.put([*item, len(item)])
    await sink.put(None)


async def relay(salt):
    queues = [asyncio.Queue(4) for _ in range(4)]
    async with asyncio.TaskGroup() as group:
        for source, sink in itertools.pairwise(queues):
            group.create_task(pass_on(source, sink))

        async def feed():
            for n in range(40):
                await queues[0].put([salt, bytes(600), n])
            await queues[0].put(None)

        group.create_task(feed())
        received = []
        while (item := await queues[-1].get()) is not None:
            received.append(item)
            await asyncio.sleep(0)
    return received


def use_asyncio(salt):
    return asyncio.run(relay(salt))


def describe(code):
    """Equal for equal code, also where a constant is not equal to itself, or its order a matter of luck."""
    if isinstance(code, types.CodeType):
        return code.co_code, code.co_names, code.co_varnames, code.co_linetable, [*map(describe, code.co_consts)]
    return sorted(map(repr, code)) if isinstance(code, frozenset) else repr(code)


def use_ast(salt):
    path = STDLIB[salt % len(STDLIB)]
    source = path.read_bytes()
    try:
        return describe(compile(ast.parse(source, path.name), path.name, "exec", dont_inherit=True))
    except SyntaxError as error:
        return repr(error)


def use_unparse(salt):
    path = STDLIB[salt % len(STDLIB)]
    try:
        return ast.unparse(ast.parse(path.read_bytes()[:8_000].rpartition(b"\n\n\n")[0]))
    except SyntaxError as error:
        return repr(error)


def use_pickle(salt):
    rows = [{"id": n, "text": WORDS[n : n + 700], "of": (salt, n / 7)} for n in range(100)]
    data = pickle.dumps(rows)
    return pickle.loads(data) == copy.deepcopy(rows), data


def use_classes(salt):
    kinds = [
        type(f"Kind{n}", (collections.UserDict,), {f"method_{m}": lambda self: salt for m in range(30)})
        for n in range(30)
    ]
    return [kind(a=salt).method_3() + len(dir(kind)) for kind in kinds]


def use_recursion(salt):
    def depth(n, text):
        return len(text) if n == 0 else depth(n - 1, text + "x") + 1

    return depth(400, str(salt)), list(itertools.permutations(range(6)))


def use_exceptions(salt):
    told = []
    for n in range(60):
        try:
            try:
                {}[salt, n]
            except KeyError as error:
                raise ValueError(WORDS[: 600 + n]) from error
        except ValueError as error:
            told.append("".join(traceback.format_exception(error)))
    return told


def use_collections(salt):
    counts = collections.Counter(WORDS.split())
    numbers = {n: str(n) * 3 for n in range(20_000)}
    numbers.update((n, None) for n in range(0, 7_000, 7))
    grouped = {key: list(group) for key, group in itertools.groupby(sorted(counts), key=lambda word: word[0])}
    return counts, numbers, grouped, set(numbers) ^ set(range(salt)), 3**3000 % (10**500 + salt)


def use_text(salt):
    text = WORDS * 5
    return (
        text.upper().encode("utf-16").decode("utf-16").title(),
        "".join(f"{word:>20}{salt:x}" for word in WORDS.split()),
        text.translate({97: "ä", 98: None, 99: "汉字"}),
        bytes(bytearray(text, "utf-8")).replace(b"e", b"EE"),
    )


def use_import(salt):
    for name in [name for name in sys.modules if name == "colorsys" or name.startswith("xml.")]:
        del sys.modules[name]
    import colorsys
    import xml.dom.minidom

    document = xml.dom.minidom.parseString("<a>" + f"<b c='{salt}'>text</b>" * 20 + "</a>")
    return colorsys.rgb_to_hsv(0.1, 0.2, 0.3), document.toprettyxml(), ["a", "new", "module's"] * 2000


CODE = {function.__name__.removeprefix("use_"): function for function in (
    use_json, use_sqlite, use_re, use_csv, use_decimal, use_dataclasses, use_asyncio, use_ast, use_unparse, use_pickle,
    use_classes, use_recursion, use_exceptions, use_collections, use_text, use_import,
)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the refusals


class Ballast:
    """Objects that fill pymalloc's pools, so that after a few more the next small object needs an arena."""

    A_POOL = 31  # objects of 512 bytes in a pool of 16 KiB

    def __init__(self, guard):
        self.guard = guard
        self.objects = []

    def fill_up_to(self, free_pools):
        while True:
            before = self.guard.heap_bytes
            self.objects.append(bytes(512 - sys.getsizeof(b"")))
            if self.guard.heap_bytes - before >= MIB:
                break
        del self.objects[-1 - free_pools * self.A_POOL :]


def refuse(guard, ballast, chance, run):
    """Run until one refusal or more; return the outcome, or None where the code asked for nothing."""
    before = guard.refusals
    injected = chance.random() < 0.5
    if injected:
        heap.inject(1 << 40)
        try:
            run()
        finally:
            questions = (1 << 40) - heap.inject(0)
        if questions == 0:
            return None, None
        heap.inject(chance.randint(1, questions))
    else:
        ballast.fill_up_to(chance.choice((0, 1, 2, 5, 10, 20, 50, 100)))
        guard.budget.limit_bytes = guard.heap_bytes + chance.choice((1, 100_000, 900_000, 3 * MIB))
    try:
        result = run()
        outcome = "absorbed"
    except MemoryError:
        result, outcome = None, "MemoryError"
    except BaseExceptionGroup as error:
        result, outcome = None, "MemoryError" if error.split(MemoryError)[1] is None else repr(error)
    except Exception as error:
        result, outcome = None, f"{type(error).__name__}: {error}"
    finally:
        heap.inject(0)
        guard.budget.limit_bytes = None
    if guard.refusals == before:
        return None, result
    return ("injected " if injected else "by limit ") + outcome, result


def check_refusals(count, seed, names):
    """Put *count* refusals in; return the tally. An assertion fails where a result is wrong."""
    chance = random.Random(seed)
    tally, unraisable = collections.Counter(), []
    sys.unraisablehook = lambda what: unraisable.append(type(what.exc_value).__name__)
    threading.excepthook = lambda what: unraisable.append(type(what.exc_value).__name__)
    references, files = {}, itertools.count(seed)  # so that children, seeded a hundred apart, parse every file
    with guard_python_heap(Budget(name="heap")) as guard:
        ballast = Ballast(guard)
        while sum(tally.values()) < count:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            name = chance.choice(names)
            salt = next(files) if name in ("ast", "unparse") else chance.randrange(3)
            run = functools.partial(CODE[name], salt)
            if (name, salt) not in references:
                references[name, salt] = run()
            outcome, result = refuse(guard, ballast, chance, run)
            if result is not None and result != references[name, salt]:
                assert outcome, f"{name} {salt}: a wrong result without a refusal"
                outcome += " by code that went on with another result"
            assert run() == references[name, salt], f"{name} {salt}: a wrong result after {outcome}"
            if outcome:
                tally[f"{name} {outcome}"] += 1
        ballast.objects.clear()
    tally.update(f"unraisable {kind}" for kind in unraisable)
    faulthandler.cancel_dump_traceback_later()
    return tally


def run_children(count, seed=0, names=()):
    """Put *count* refusals in, in children; return the tally and what went wrong: (seed, exit status, stderr)."""
    tally, failures = collections.Counter(), []
    for start in range(0, count, A_CHILD):
        arguments = [min(A_CHILD, count - start), seed + start, ",".join(names or CODE)]
        command = [sys.executable, "-X", "faulthandler", "-m", __name__ if __spec__ is None else __spec__.name]
        done = subprocess.run([*command, "child", *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            failures.append((seed + start, done.returncode, done.stderr[-3000:]))
        else:
            tally.update(json.loads(done.stdout))
    return tally, failures


def main(arguments):
    if arguments[:1] == ["child"]:
        faulthandler.enable()
        print(json.dumps(check_refusals(int(arguments[1]), int(arguments[2]), arguments[3].split(","))))
        return 0
    count, seed = (int(argument) for argument in (*arguments[:2], *("10000", "0")[len(arguments[:2]) :]))
    tally, failures = run_children(count, seed, arguments[2:])
    for what, times in sorted(tally.items()):
        print(f"{times:7,}  {what}")
    for failure in failures:
        print("FAILED: seed {}, exit status {}\n{}".format(*failure))
    print(f"{sys.version.split()[0]}: {sum(tally.values()):,} refusals, {len(failures)} children failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
