"""A site that is killed again and again while it answers private requests, and what is true after each kill.

`python ledger_killed.py FOLDER KILLS SEED` prints one JSON object. Each attempt is a process of its own,
forked from this one, that opens the real ledger and the real store of answers, answers round after round, and
sends each answer's hash through a pipe when it leaves. Only the training is not real: it draws numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from ledgers import EVENT, Place

from quorate.client.policy.answer_store import AnswerStore
from quorate.client.policy.site_config import SiteConfig
from quorate.client.privacy import ledger_verify
from quorate.client.privacy.budgets import Budgets, spending
from quorate.client.privacy.ledger import Ledger
from quorate.client.privacy.ledger_records import Commit, Reservation
from quorate.client.privacy.ledger_verify import Anchor, verify
from quorate.client.privacy.spending_gate import SpendingGate
from quorate.client.site.request import Request
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.run_config import RunConfig
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.protocol.messages import RequestHeader, Update

DELTA = 1e-5
ROUNDS_IN_REACH = 3
"""Kills are drawn from the time that opening and so many rounds take."""
WAYS = ("instruction", "time", "half-a-page", "in-sqlite", "half-a-line", "between-steps")
RUN = RunConfig.model_validate(
    {
        "name": "killed",
        "task": {"name": "sequence_classification", "labels": ["no", "yes"]},
        "data": "notes",
        "model": {"model_name_or_path": "nowhere"},
        "federation": {"rounds": 10_000},
        "privacy": {"unit": "record", "noise_multiplier": EVENT.noise_multiplier},
    }
)
SITE = SiteConfig.model_validate(
    {
        "data": {"notes": {"source": "/data/notes.csv"}},
        "policy": {"privacy_budgets": [{"data": "notes", "max_epsilon": 1e9, "delta": DELTA}]},
    }
)


class Trainer:
    """Answers that nobody could make twice."""

    def handle(self, request: Request) -> Update:
        numbers = np.frombuffer(os.urandom(32), np.uint8).astype(np.float32)
        return Update.reply(request, Adapter({"lora_A": numbers}), num_steps=EVENT.steps)


STEPS = (
    (Ledger, "reserve"),
    (Trainer, "handle"),
    (AnswerStore, "_store"),
    (Ledger, "commit"),
    (Anchor, "append"),
)
"""What an answer takes, one after the other."""


def request(round: int) -> Request:
    header = RequestHeader(
        run_id="killed",
        round=round,
        phase="fit",
        site="north",
        run_config=RUN.canonical_json(),
        config_hash=RUN.content_hash,
    )
    return Request(RUN, header, Adapter({"lora_A": np.full(4, round, np.float32)}))


def crude(events: Sequence[PrivacyEvent], delta: float) -> float:
    """The faster of the two accountants."""
    return epsilon(events, delta, "rdp")


def work(place: Place, first: int, rounds: int, out: int) -> None:
    """Answer rounds, and send what leaves."""
    answered = AnswerStore(place.folder / "answers.db", Trainer())
    budgets = Budgets(SITE, place.folder, crude)
    site = SpendingGate(
        place.open,
        lambda: budgets,
        lambda run: spending(run, SITE, place.folder, lambda _: EVENT),
        answered,
        write_down=lambda run: None,  # there are no rows
    )
    for round in range(first, first + rounds):
        update = site.handle(request(round))
        if update.header.error is not None:
            os.write(2, f"round {round}: {update.header.error}\n".encode())
            os._exit(9)
        os.write(out, f"{round} {hashlib.sha256(update.encoded).hexdigest()}\n".encode())
    site.close()
    answered.close()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Instructions:
    """Counts instructions of the modules that matter, and ends the process before the last one."""

    def __init__(self, last: int | None) -> None:
        self.count = 0
        self._last = last

    def __call__(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if "/quorate/client/" not in frame.f_code.co_filename and frame.f_code.co_filename != __file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.count += 1
            if self.count == self._last:
                die()
        return self


def arm(way: str, draw: random.Random, place: Place, reach: int) -> None:
    """Have this process end at a moment that is drawn."""
    if way == "instruction":
        sys.settrace(Instructions(draw.randrange(1, reach)))
    elif way == "half-a-page":
        # A file that grows beyond the limit takes what fits; the next byte ends the process.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        names = (place.database.with_name("ledger.db-wal"), place.folder / "answers.db-wal")
        sizes = [path.stat().st_size if path.exists() else 0 for path in names]
        limit = max(sizes) + draw.randrange(1, 8 * 4120)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    elif way == "in-sqlite":
        left = [draw.randrange(1, 400)]

        def progress() -> int:
            left[0] -= 1
            if not left[0]:
                die()
            return 0

        connect = sqlite3.connect

        def counted(*args: Any, **options: Any) -> sqlite3.Connection:
            db = connect(*args, **options)
            db.set_progress_handler(progress, 2)
            return db

        sqlite3.connect = counted  # type: ignore[assignment]
    elif way == "half-a-line":
        calls, write = draw.randrange(1, 2 * ROUNDS_IN_REACH), os.write

        class Torn:
            def __getattr__(self, name: str) -> Any:
                return getattr(os, name)

            def write(self, descriptor: int, data: bytes) -> int:
                nonlocal calls
                calls -= 1
                if not calls:
                    write(descriptor, data[: draw.randrange(len(data) + 1)])
                    die()
                return write(descriptor, data)

        ledger_verify.os = Torn()  # type: ignore[assignment]
    elif way == "between-steps":
        owner, name = draw.choice(STEPS)
        before, calls = draw.random() < 0.5, draw.randrange(1, ROUNDS_IN_REACH + 1)
        step = getattr(owner, name)

        def stepping(*args: Any) -> Any:
            nonlocal calls
            calls -= 1
            if not calls and before:
                die()
            done = step(*args)
            if not calls:
                die()
            return done

        setattr(owner, name, stepping)


def attempt(
    place: Place, first: int, way: str, draw: random.Random, reach: tuple[int, float]
) -> tuple[int, str]:
    """Run a process until it is killed; returns how it ended and what it sent."""
    incoming, outgoing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(incoming)
            arm(way, draw, place, reach[0])
            work(place, first, ROUNDS_IN_REACH, outgoing)
            die()  # it got further than the moment that was drawn
        finally:
            os._exit(8)
    os.close(outgoing)
    if way == "time":
        time.sleep(draw.uniform(0, reach[1]))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(incoming) as stream:
        return os.waitstatus_to_exitcode(status), stream.read()


class Books:
    """What left the site, and what its ledger says about it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.left: dict[int, set[str]] = {}
        self.windows: Counter[str] = Counter()

    @property
    def next(self) -> int:
        return max(self.left, default=0) + 1

    def take(self, sent: str) -> None:
        for line in sent.splitlines():
            round, answer = line.split()
            self.left.setdefault(int(round), set()).add(answer)

    def check(self) -> int:
        """Hold the ledger against what left; returns the number of events in it."""
        verdict = verify(self.place.database, Anchor(self.place.heads))
        assert not verdict.findings, verdict.findings
        spent = [row for row in verdict.rows if isinstance(row, Reservation)]
        committed = {row.answer: row.reservation for row in verdict.rows if isinstance(row, Commit)}
        rounds = {row.seq: row.request.round for row in spent}
        assert all(len(answers) == 1 for answers in self.left.values()), "one answer for one request"
        for round, (answer,) in self.left.items():
            assert rounds[committed[answer]] == round, "what left was committed"
        assert len(spent) >= len(self.left), "spent is never below what left"
        self._note_window(len(verdict.rows), spent, {rounds[each] for each in committed.values()})
        return len(spent)

    def _note_window(self, count: int, spent: list[Reservation], committed: set[int]) -> None:
        if count > Anchor(self.place.heads).read().newest:
            self.windows["written, not anchored"] += 1
        if self.next in committed:
            self.windows["committed, not sent"] += 1
        elif self.next in stored(self.place):
            self.windows["stored, not committed"] += 1
        elif any(row.request.round == self.next for row in spent):
            self.windows["reserved, not stored"] += 1
        else:
            self.windows["nothing of the next round"] += 1


def stored(place: Place) -> set[int]:
    path = place.folder / "answers.db"
    if not path.exists():
        return set()
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone() is None:
            return set()
        return {round for (round,) in db.execute("SELECT round FROM answers")}


def reach_of(folder: Path) -> tuple[int, float]:
    """Instructions and seconds that opening and some rounds take."""
    incoming, outgoing = os.pipe()
    pid = os.fork()
    if pid == 0:
        (folder / "timed").mkdir(parents=True)
        started = time.monotonic()
        work(Place(folder / "timed"), 1, ROUNDS_IN_REACH, 1)
        seconds, counted = time.monotonic() - started, Instructions(None)
        sys.settrace(counted)
        work(Place(folder / "counted"), 1, ROUNDS_IN_REACH, 1)
        sys.settrace(None)
        os.write(outgoing, json.dumps([counted.count, seconds]).encode())
        os._exit(0)
    os.close(outgoing)
    with os.fdopen(incoming) as stream:
        count, seconds = json.load(stream)
    os.waitpid(pid, 0)
    return count, seconds


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    crude([EVENT], DELTA)  # imports what no attempt should spend its time on
    draw, place = random.Random(seed), Place(folder / "site")
    books, ends = Books(place), Counter[str]()
    quiet, out = os.open(os.devnull, os.O_WRONLY), os.dup(1)
    os.dup2(quiet, 1)
    reach = reach_of(folder)
    os.dup2(out, 1)
    for number in range(kills):
        way = WAYS[number % len(WAYS)]
        again = bool(books.left) and draw.random() < 0.2  # the last answer was lost on its way
        code, sent = attempt(place, books.next - again, way, random.Random(draw.random()), reach)
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ), (number, way, code)
        ends[f"{way}, {signal.Signals(-code).name}"] += 1
        books.take(sent)
        books.check()
    incoming, outgoing = os.pipe()
    work(place, books.next, 1, outgoing)  # in peace
    os.close(outgoing)
    with os.fdopen(incoming) as stream:
        books.take(stream.read())
    events = books.check()
    spent = [row.event for row in place.open().reservations]
    return {
        "kills": kills,
        "ends": ends,
        "windows": books.windows,
        "answers_left": len(books.left),
        "events": events,
        "epsilon": epsilon(spent, DELTA),
        "reach": reach,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
