"""The end of a run: what is measured and written after the last round, also when somebody stops it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from flwr.serverapp import Grid

from quorate.server.results.deliver import deliver
from quorate.server.results.local_reference import compare
from quorate.server.results.outputs import measure, write_outputs
from quorate.server.rounds.loop import Result
from quorate.server.rounds.run import Run
from quorate.server.tracking.records import Summary

_T = TypeVar("_T")


def all_the_same(result: Result, work: Callable[[], _T]) -> _T:
    """Return what `work` gives, after a Ctrl-C too: it is done again, knowing that the run was stopped.

    What takes long is then left out, and what is there gets written. A second Ctrl-C ends everything.
    """
    try:
        return work()
    except KeyboardInterrupt as stop:
        if isinstance(result.stopped, KeyboardInterrupt):
            raise
        result.stop(stop)
        return work()


def complete_run(grid: Grid, run: Run, result: Result) -> Summary:
    """Measure what the rounds gave, write it, and send the sites what is theirs of it.

    Raises: QuorumNotMet, ModelDiverged, KeyboardInterrupt: what ended the run early, once everything is
        written.
    """
    final, best, outcomes = all_the_same(result, lambda: measure(grid, run, result))
    compared = all_the_same(result, lambda: compare(grid, run, result, outcomes))
    summary = all_the_same(result, lambda: write_outputs(run, result, final, best, compared))
    deliver(grid, run, result, summary)
    if result.stopped is not None:
        raise result.stopped
    return summary
