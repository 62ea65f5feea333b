"""Every message at a site: a line in the log, and its place in the book of runs, before the answer leaves."""

from __future__ import annotations

import logging
import re
import time

from quorate.client.policy.approvals import RUN_ID
from quorate.client.policy.site_config import ConnectionConfig
from quorate.client.runs.run_history import Asked, Left, RunHistory
from quorate.client.site.request import Failed, Handler, Request, failed
from quorate.shared.config.privacy_config import ClientPrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import OutputError, ProtocolError
from quorate.shared.protocol.messages import RoundRequest, Update

log = logging.getLogger(__name__)

_COUNTS = {"num_examples", "num_tokens", "num_steps"}


class MessageRecorder:
    """Reads messages, has them answered, and writes down who asked what, and what left.

    Args:
        connection: whose coordinator asks.
    """

    def __init__(self, book: RunHistory, connection: ConnectionConfig, inner: Handler) -> None:
        self._book = book
        self._connection = connection
        self._inner = inner

    def answer(self, message: RoundRequest) -> Update:
        """Read a message and answer it; one that is no request, or cannot be written down, by a code."""
        started, header = time.monotonic(), message.header
        asked: Asked | None = None
        try:
            request = Request.read(message)
            asked = self._asked(request)
            if asked is not None:
                self._book.begin(asked, header.phase, header.round)
            update = self._inner.handle(request)
            if asked is not None:
                self._note(asked, header.round, update)
        except (ProtocolError, OutputError) as error:
            update = failed(message, error)
        log.info(
            "run %s, round %d, %s%s: %s, in %.1f s",
            f"{asked.run_id} ({asked.name})" if asked else repr(header.run_id)[:66],
            header.round,
            header.phase,
            f" on {header.split}" if header.split else "",
            _said(update),
            time.monotonic() - started,
        )
        return update

    def _asked(self, request: Request) -> Asked | None:
        """Return what the run says of itself; None where its id is none, which is refused for that."""
        run, header = request.run, request.header
        if not re.fullmatch(RUN_ID, header.run_id):
            return None
        return Asked(
            run_id=header.run_id,
            config_hash=header.config_hash,
            name=run.name,
            federation=self._connection.federation,
            server=self._connection.server,
            task=run.task.name,
            data=run.data,
            model=run.model.sha256,
            privacy=_privacy(run),
            rounds=run.federation.rounds,
        )

    def _note(self, asked: Asked, round: int, update: Update) -> None:
        header = update.header
        if header.error is not None:
            why = update.why if isinstance(update, Failed) else ""
            self._book.end(asked, header.phase, round, None, header.error, why)
            return
        joined = header.description
        rows = header.num_examples if header.phase == "fit" else joined.rows.get("train") if joined else None
        claim = joined.privacy.sentence if joined and joined.privacy else None
        self._book.end(asked, header.phase, round, Left(what_left(update), rows, claim))


def what_left(update: Update) -> dict[str, int]:
    """Return what an answer lets out of the site, and how much of each [bytes].

    `arrays` (what was trained), `statistics` (sums over rows, to solve a head from), `counts` (rows, tokens,
    steps), `metrics`, `outcomes` (of an evaluation),
    `description` (answer to join), `seconds`; `header` is the rest: ids and hashes that the request has too.
    """
    header, found = update.header, dict[str, int]()
    if len(update.arrays):
        found["statistics" if header.phase == "statistics" else "arrays"] = update.arrays.num_bytes
    for name, included in {
        "counts": {each for each in _COUNTS if getattr(header, each)},
        "metrics": {"metrics"} if header.metrics else set(),
        "outcomes": {"outcomes"} if header.outcomes is not None else set(),
        "description": {"description"} if header.description is not None else set(),
        "seconds": {"seconds"} if header.seconds else set(),
    }.items():
        if included:
            found[name] = len(header.model_dump_json(include=included).encode())
    found["header"] = max(len(update.encoded) - sum(found.values()), 0)
    return found


def _privacy(run: RunConfig) -> str | None:
    if run.privacy is None:
        return None
    if isinstance(run.privacy, ClientPrivacy):
        return "client (noise at the server)"
    return f"{run.privacy.unit} (noise at this site)"


def _said(update: Update) -> str:
    if update.header.error is not None:
        return f"{update.header.error} (nothing but this code left)"
    left = what_left(update)
    return (
        f"answered with {len(update.encoded)} bytes: {', '.join(name for name in left if name != 'header')}"
    )
