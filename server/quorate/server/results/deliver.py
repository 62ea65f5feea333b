"""After the last round: every site gets the final adapter, its own figures and the pooled ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from flwr.serverapp import Grid

from quorate.server.exchange.exclusions import exclusion
from quorate.server.exchange.join import answers_of, request
from quorate.server.results.outputs import best_state, good_round
from quorate.server.rounds.evaluation import scalars
from quorate.server.rounds.loop import Result
from quorate.server.rounds.run import Run
from quorate.server.tracking.events import PhaseBegan
from quorate.server.tracking.records import Evaluation, Exclusion, Measured, Summary
from quorate.shared.adapters.selection import downloaded
from quorate.shared.protocol.messages import Delivery, RoundRequest

log = logging.getLogger(__name__)

MIN_SITES = 3
"""Fewest measured sites for pooled figures to be told: with two, each could subtract its own."""


def deliver(grid: Grid, run: Run, result: Result, summary: Summary) -> dict[str, Exclusion]:
    """Send every site of a run that will not go on the best round's adapter, and what it should know.

    Returns: sites that did not take it, and why. None of them makes the run fail.
    """
    if result.progress is None or result.status not in ("done", "diverged"):
        return {}
    if good_round(run, result) is None:
        return {}
    try:
        run.tell(PhaseBegan(round=result.progress.round, name="deliver"))
        failed = _send(grid, run, result, summary)
    except Exception as error:  # the result is written already
        log.warning("the result could not be sent to the sites (%s)", type(error).__name__, exc_info=True)
        return {site: exclusion("unreachable") for site in result.members.nodes}
    for site, why in failed.items():
        log.warning("%s did not take the result of the run: %s", site, why.reason)
    return failed


def _send(grid: Grid, run: Run, result: Result, summary: Summary) -> dict[str, Exclusion]:
    assert result.progress is not None
    members = result.members
    round = result.progress.round
    arrays = downloaded(run.config, best_state(run, result), round)
    asked = {}
    for site, node in members.nodes.items():
        plain = request(run, round, "finish", site, arrays)
        header = plain.header.model_copy(update={"delivery": delivery(summary, site)})
        asked[node] = RoundRequest(header, arrays)
    answers = answers_of(run, members.by_node, members.presence)

    for _ in answers.ask(grid, asked, lambda _request, update: update):  # one without an error will do
        pass
    return answers.excluded


def delivery(summary: Summary, site: str) -> Delivery:
    """Return what `site` is told of the run."""
    measured = summary.best or summary.final
    evaluation = _evaluated(measured)
    bare = Delivery(
        rounds=summary.rounds, best_round=measured.round if measured else 0, metric=summary.metric
    )
    figures: dict[str, object] = {}
    if (claim := summary.client_privacy) is not None and math.isfinite(claim.epsilon):
        figures = {"epsilon": claim.epsilon}
    if evaluation is None:
        return bare.model_copy(update=figures)
    figures |= {
        "split": evaluation.split,
        "sites": len(evaluation.sites),
        "own": _finite(scalars(evaluation.sites.get(site, {}))),
        "own_rows": evaluation.rows.get(site, 0),
    }
    # Pooled figures hold no noise: with client-level privacy a site is told of its own rows alone.
    if len(evaluation.sites) >= MIN_SITES and summary.client_privacy is None:
        figures["pooled"] = _finite(scalars(evaluation.pooled))
        figures["pooled_rows"] = sum(evaluation.rows.values())
    if (worth := summary.worth.get(site)) and math.isfinite(worth.local_only):
        figures["local_only"] = worth.local_only
        if worth.interval and all(map(math.isfinite, (worth.gain, *worth.interval))):
            figures["gain"] = (worth.gain, *worth.interval)
    return Delivery.model_validate({**bare.model_dump(), **figures})


def _evaluated(measured: Measured | None) -> Evaluation | None:
    for evaluation in (measured.test, measured.validation) if measured else ():
        if evaluation and evaluation.pooled:
            return evaluation
    return None


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}
