"""Pays for every private answer before it is made: reserve, train, store, commit, and only then answer.

    1  the stored answer of this very request    its spending is committed, and it is given again
    2  else write down the rows, and reserve     on disk before a row is looked at by the trainer
    3  train, store the answer                   the inner handler
    4  commit, with the answer's hash            on disk before the answer leaves
    5  return it

A kill between any two of these leaves a reservation that counts, and of which nothing has left; the same
request uses it again. A reservation whose answer was committed is never used twice: when the stored answer is
gone, the training is a new one and is paid for again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence

from quorate.client.policy.answer_store import AnswerStore
from quorate.client.privacy.budgets import Budgets, Spending, to_come
from quorate.client.privacy.ledger import Ledger
from quorate.client.privacy.ledger_records import RequestKey, Reservation
from quorate.client.site.request import Request, failed
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import NonFiniteUpdate, RequestRefused
from quorate.shared.protocol.messages import Update

log = logging.getLogger(__name__)

SpendingOf = Callable[[RunConfig], Spending]


class SpendingGate:
    """A handler that keeps the privacy ledger around a store of answers.

    Args:
        ledger: opens the ledger; called when the first private request comes, or by `open`.
        budgets: what may be spent, as site.yaml has it now.
        spending_of: what a run with record- or group-level privacy costs here.
        inner: the stored answers, and behind them the site that trains.
        write_down: keeps for good which rows are about to be trained on.
    """

    def __init__(
        self,
        ledger: Callable[[], Ledger],
        budgets: Callable[[], Budgets],
        spending_of: SpendingOf,
        inner: AnswerStore,
        *,
        write_down: Callable[[RunConfig], None],
    ) -> None:
        self._open = ledger
        self._ledger: Ledger | None = None
        self._budgets = budgets
        self._spending_of = spending_of
        self._inner = inner
        self._write_down = write_down

    def handle(self, request: Request) -> Update:
        """Answer a request; one that is refused, or that cannot be paid for, by its code."""
        run = request.run
        try:
            self._budgets().admit(run)
            if isinstance(run.privacy, SitePrivacy):
                if request.header.phase == "join":
                    self._check_whole_run(run, request.header.run_id)
                elif request.header.phase == "fit":
                    return self._fit(request)
        except Exception as error:  # whatever it is, only its code leaves
            return failed(request, error)
        return self._inner.handle(request)

    def open(self) -> Ledger:
        """Return the ledger.

        Raises: LedgerError: it is not what was written. OutputError: it cannot be opened.
        """
        if self._ledger is None:
            self._ledger = self._open()
        return self._ledger

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def _check_whole_run(self, run: RunConfig, run_id: str) -> None:
        """Refuse a run that would have to stop in the middle for want of budget."""
        spending, entries = self._spending_of(run), self.open().reservations
        _check_units(spending, entries, run_id)
        self._budgets().check(spending, entries, to_come(spending, entries, run_id))

    def _fit(self, request: Request) -> Update:
        run, key = request.run, _key(request)
        update = self._inner.stored(request)
        if update is None:
            reservation = self._reserve(run, key)
            update = self._inner.handle(request)
            if not _was_made(update):
                return update  # nothing of the training is in it: the reservation is used when asked again
        elif _hash(update) in self.open().answers(key):
            return update
        else:
            reservation = self._left_open(run, key)
        self.open().commit(reservation, _hash(update))
        return update

    def _left_open(self, run: RunConfig, key: RequestKey) -> int:
        """Return the reservation of a stored answer that a kill came before the commit of."""
        there = self.open().uncommitted(key)
        if there is not None:
            return there
        log.warning("run %s, round %d: stored and in no ledger; paid for now", key.run_id, key.round)
        return self._reserve(run, key)

    def _reserve(self, run: RunConfig, key: RequestKey) -> int:
        spending, ledger = self._spending_of(run), self.open()
        there = ledger.uncommitted(key, spending.protects, spending.event)
        if there is None:
            if not any(entry.request.run_id == key.run_id for entry in ledger.reservations):
                self._check_whole_run(run, key.run_id)  # it may not have joined, or others have spent since
            _check_units(spending, ledger.reservations, key.run_id)
            _check_claim(spending, ledger.reservations, key)
        more = spending.over(1 if there is None else 0)  # it counts already
        self._budgets().check(spending, ledger.reservations, more)
        self._write_down(run)
        return ledger.reserve(key, spending.alias, spending.protects, spending.event)


def _check_claim(spending: Spending, entries: Sequence[Reservation], key: RequestKey) -> None:
    """Refuse a training beyond those that the claim for this run counts, whatever the budgets allow."""
    trained = sum(entry.request.run_id == key.run_id for entry in entries)
    if trained >= spending.rounds:
        raise RequestRefused(
            f"round {key.round} of run {key.run_id}: this site has trained {trained} times for the run, and "
            f"its claim counts {spending.rounds}; have the coordinator begin a new run, which is a claim of "
            "its own.",
            code="policy-privacy",
        )


def _check_units(spending: Spending, entries: Sequence[Reservation], run_id: str) -> None:
    """Refuse a run whose rounds would not all be the mechanism that the site's claim for it is of."""
    if any(entry.request.run_id == run_id and entry.event != spending.event for entry in entries):
        raise RequestRefused(
            f"run {run_id}: rounds before had another number of training rows (or groups) here, and this "
            "site's claim was for those; put the data back, or have the coordinator begin a new run, which "
            "is a claim of its own.",
            code="policy-privacy",
        )


def _was_made(update: Update) -> bool:
    """Whether an answer tells of the training: that it diverged follows from noisy steps, as arrays do."""
    return update.header.error in (None, NonFiniteUpdate.code)


def _key(request: Request) -> RequestKey:
    header = request.header
    return RequestKey(
        run_id=header.run_id,
        config_hash=header.config_hash,
        round=header.round,
        input_hash=request.arrays.content_hash,
    )


def _hash(update: Update) -> str:
    return hashlib.sha256(update.encoded).hexdigest()
