"""The seam under which sites train: an engine answers many requests at once.

Whoever asks (the in-process grid, the runner, reference runs, audits, the site process) holds an `Engine`
and does not know what is behind it: the resident `Site` of this process, or several of them on devices of
their own. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from quorate.client.site.request import Request, failed
from quorate.shared.aggregation import GlobalState
from quorate.shared.errors import ProtocolError
from quorate.shared.protocol.messages import RoundRequest, Update

if TYPE_CHECKING:
    from quorate.shared.config.run_config import RunConfig


class Engine(Protocol):
    """Answers requests for the sites that it has.

    A site that fails answers with an error code, and the others go on: `handle_many` raises for nothing that
    a request or a site's rows can bring about. What a site answers does not depend on what it is asked with.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The sites it answers for."""
        ...

    def prepare(self, run: RunConfig) -> RunConfig:
        """Make ready for a run, so that what is wrong shows before round 1.

        Returns: the run with its model's hash filled in.
        Raises: ModelError, DataError: naming the site.
        """
        ...

    def handle_many(self, requests: Sequence[Request]) -> list[Update]:
        """Answer requests, in order."""
        ...

    def samples(self, run: RunConfig, states: Sequence[GlobalState]) -> list[list[tuple[str, str]]]:
        """Return what each state answers to the run's own public prompts, as (prompt, answer)."""
        ...


@dataclass(frozen=True)
class OneAtATime:
    """An engine as the end of a chain of handlers."""

    engine: Engine

    def handle(self, request: Request) -> Update:
        (update,) = self.engine.handle_many([request])
        return update


def in_stacks(engine: Engine, messages: Iterable[RoundRequest]) -> Iterator[list[Update]]:
    """Have messages answered in order, and yield the answers a stack (`training.max_stack`) at a time.

    One whose configuration cannot be read is answered by a code. Messages are taken as they are needed.
    """
    left = iter(messages)
    for first in left:
        asked = [_read(first)]
        if isinstance(asked[0], Request):
            asked += map(_read, islice(left, asked[0].run.training.max_stack - 1))
        answers = iter(engine.handle_many([each for each in asked if isinstance(each, Request)]))
        yield [next(answers) if isinstance(each, Request) else each for each in asked]


def _read(message: RoundRequest) -> Request | Update:
    """Return the request, or the answer that refuses it."""
    try:
        return Request.read(message)
    except ProtocolError as error:
        return failed(message, error)
