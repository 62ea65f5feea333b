"""Step 8 of a round: have the sites measure a model on their own rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quorate.server.exchange.exchange import Answers
from quorate.server.rounds.evaluation import summarise
from quorate.server.rounds.round import Round
from quorate.server.rounds.update_checks import check_measured
from quorate.server.tracking.records import Evaluation, Exclusion
from quorate.shared.adapters.selection import downloaded
from quorate.shared.aggregation import GlobalState
from quorate.shared.errors import ModelDiverged, NonFiniteUpdate, ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.protocol.messages import RoundRequest, Split, Update

_BROKEN = (NonFiniteUpdate.code, ProtocolError.code)
"""Codes that say something of the model, not of the site: its figures are not finite, or cannot be."""


@dataclass(frozen=True)
class Measurement:
    """A model, measured at the sites.

    Args:
        evaluation: the figures of those that answered, with those that did not named.
        outcomes: site -> outcomes.
        answers: of the exchange: its traffic, and who does not count.
    """

    evaluation: Evaluation
    outcomes: dict[str, Outcomes]
    answers: Answers


def measure(
    round: Round,
    state: GlobalState,
    split: Split,
    *,
    intervals: bool = False,
    moved: Mapping[str, float] | None = None,
) -> Measurement:
    """Have every site that has rows of this split measure `state` on them.

    Args:
        intervals: whether to give 95 % intervals.
        moved: site -> how far its update moved, to be named where nobody can measure what came of it.
    Raises: ModelDiverged: all sites that have such rows answered, and none of them could measure it.
    """
    task, members = round.run.config.task, round.members
    answers = round.answers(expected=members.pace)
    arrays = downloaded(round.run.config, state, round.number)
    rows = {site: each.rows.get(split, 0) for site, each in members.sites.items()}
    asked = dict(round.request("evaluate", site, arrays, split) for site in members.nodes if rows[site])

    def check(_request: RoundRequest, update: Update) -> Outcomes:
        check_measured(task, update, rows[update.header.site])
        return update.header.outcomes or Outcomes()

    outcomes = dict(answers.ask(round.grid, asked, check))
    members.pace = max(members.pace, answers.longest)
    having = sorted(site for site, count in rows.items() if count)
    missing = {site: answers.excluded[site] for site in having if site in answers.excluded}
    if having and len(missing) == len(having) and all(why.code in _BROKEN for why in missing.values()):
        raise _diverged(round.number, split, missing, moved or {})
    figures = summarise(task, split, outcomes, intervals=intervals)
    return Measurement(figures.model_copy(update={"missing": missing}), outcomes, answers)


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
