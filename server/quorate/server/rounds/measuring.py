"""Step 8 of a round: have the sites measure a model on their own rows."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.serverapp import Grid

from quorate.server.exchange.join import Members, answers_of, request
from quorate.server.rounds.evaluation import summarise
from quorate.server.rounds.round_log import Books
from quorate.server.rounds.run import Run
from quorate.server.rounds.update_checks import check_measured
from quorate.server.tracking.records import Evaluation, Exclusion
from quorate.shared.adapters.selection import downloaded
from quorate.shared.aggregation import GlobalState
from quorate.shared.errors import ModelDiverged, NonFiniteUpdate, ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.protocol.messages import RoundRequest, Split, Update

_BROKEN = (NonFiniteUpdate.code, ProtocolError.code)
"""Codes that say something of the model, not of the site: its figures are not finite, or cannot be."""


def measure(
    grid: Grid,
    run: Run,
    members: Members,
    state: GlobalState,
    split: Split,
    round: int,
    books: Books | None = None,
    *,
    intervals: bool = False,
) -> tuple[Evaluation, dict[str, Outcomes]]:
    """Have every site that has rows of this split measure `state` on them.

    Args:
        books: takes the traffic and the exclusions.
        intervals: whether to give 95 % intervals.
    Returns: the figures of those that answered, with those that did not named; and site -> outcomes.
    Raises: ModelDiverged: all sites that have such rows answered, and none of them could measure it.
    """
    outcomes, excluded = _ask(grid, run, members, state, split, round, books)
    asked = [site for site, each in sorted(members.sites.items()) if each.rows.get(split)]
    missing = {site: excluded[site] for site in asked if site in excluded}
    if asked and len(missing) == len(asked) and all(why.code in _BROKEN for why in missing.values()):
        raise _diverged(round, split, missing, books.norms if books else {})
    figures = summarise(run.config.task, split, outcomes, intervals=intervals)
    return figures.model_copy(update={"missing": missing}), outcomes


def _ask(
    grid: Grid,
    run: Run,
    members: Members,
    state: GlobalState,
    split: Split,
    round: int,
    books: Books | None,
) -> tuple[dict[str, Outcomes], dict[str, Exclusion]]:
    answers = answers_of(run, members.by_node, members.presence, expected=members.pace)
    arrays = downloaded(run.config, state, round)
    asked = {
        node: request(run, round, "evaluate", site, arrays, split)
        for site, node in members.nodes.items()
        if members.sites[site].rows.get(split)
    }

    def check(_request: RoundRequest, update: Update) -> None:
        rows = members.sites[update.header.site].rows
        check_measured(run.config.task, update, rows.get(split, 0))

    outcomes = {
        site: update.header.outcomes or Outcomes() for site, update in answers.ask(grid, asked, check)
    }
    members.pace = max(members.pace, answers.longest)
    if books is not None:
        books.take(answers)
    return outcomes, answers.excluded


def _diverged(
    round: int, split: Split, missing: Mapping[str, Exclusion], norms: Mapping[str, float]
) -> ModelDiverged:
    why = "; ".join(f"{site}: {each.reason}" for site, each in sorted(missing.items()))
    moved = ", ".join(f"{site} {norm:.3g}" for site, norm in sorted(norms.items()))
    return ModelDiverged(
        f"no site can measure the model of round {round} on its {split} rows ({why}): training diverged, or "
        f"a site sent an update that spoils the model{f' (they moved: {moved})' if moved else ''}. Lower "
        "training.learning_rate, or leave that site out; the last good round is kept."
    )
