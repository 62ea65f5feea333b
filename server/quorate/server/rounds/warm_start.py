"""Before round 1: the head from one exchange (adapter.head.init: analytic).

Every member sends sums over its rows, which are added up in the order of names and solved; nobody's rows are
drawn or waited for, so whoever is missing is left out exactly. Sites that join later, or whose sums do not
count, get the solved head with round 1 as everybody does. docs/decisions/069-analytic-head.md has the method.
"""

from __future__ import annotations

import functools
import logging
import operator
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from flwr.serverapp import Grid

from quorate.server.exchange.exchange import Answers
from quorate.server.exchange.exclusions import exclusion
from quorate.server.exchange.join import Members, answers_of, request
from quorate.server.rounds.run import Run
from quorate.server.rounds.screening import FEWEST, largest_weight
from quorate.server.rounds.update_checks import check_statistics
from quorate.server.tracking.events import HeadSolved, PhaseBegan
from quorate.server.tracking.records import Exclusion, SolvedHead
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.linear_head import LinearHead, find_head
from quorate.shared.aggregation import GlobalState
from quorate.shared.errors import QuorumNotMet
from quorate.shared.metrics.head_sums import SUMMED, HeadSums
from quorate.shared.metrics.ridge import Solution, solve_best
from quorate.shared.protocol.messages import RoundRequest, Update

log = logging.getLogger(__name__)


def warm_start(grid: Grid, run: Run, members: Members, state: GlobalState) -> tuple[GlobalState, SolvedHead]:
    """Return the state with a solved head, and what that took.

    Args:
        grid: reaches the sites.
        run: asks for it.
        members: the sites.
        state: the seeded start.
    Raises: QuorumNotMet: fewer good answers than federation.quorum. AdapterError: they have no solution.
    """
    run.tell(PhaseBegan(round=0, name="statistics"))
    started, config = time.monotonic(), run.config
    head = find_head(config, members.initial.schema)
    quorum = min(config.federation.quorum, len(members.nodes))
    answers = answers_of(run, members.by_node, members.presence, quorum=quorum)
    arrived = _ask(grid, run, members, head, answers)
    aside = {**answers.excluded, **_out_of_scale(config.federation.max_norm_ratio, arrived)}
    counted = {site: arrived[site] for site in sorted(arrived.keys() - aside.keys())}
    _check_quorum(quorum, len(members.nodes), len(counted), aside)
    solution, measured = _solve(counted, config.federation.max_weight_share)
    solved = head.arrays(solution.head(config.task.logit_scale))
    solved.check_finite()
    record = SolvedHead(
        strength=solution.strength,
        validation_rows=measured,
        slope=solution.slope,
        rows={site: members.sites[site].rows.get("train", 0) for site in counted},
        excluded=dict(sorted(aside.items())),
        bytes_down=answers.bytes_down,
        bytes_up=answers.bytes_up,
        seconds=round(time.monotonic() - started, 3),
    )
    run.tell(HeadSolved(head=record))
    return replace(state, adapter=state.adapter.updated(solved)), record


def _ask(grid: Grid, run: Run, members: Members, head: LinearHead, answers: Answers) -> dict[str, Adapter]:
    """Return site -> sums that are good by themselves. All are held until the last has come."""
    asked = {node: request(run, 0, "statistics", site) for site, node in members.nodes.items()}

    def check(_request: RoundRequest, update: Update) -> Adapter:
        check_statistics(run.config.task, head, update, members.sites[update.header.site].rows)
        return update.arrays

    return dict(answers.ask(grid, asked, check))


def _out_of_scale(ratio: float | None, arrived: Mapping[str, Adapter]) -> dict[str, Exclusion]:
    """Return the sites whose features or targets are absurdly large next to the others', as updates may be.

    All sites have the same frozen model, so mean squares of its features differ little. Targets are labels,
    or numbers that were standardised for all sites alike, hence about 1.
    """
    if ratio is None or len(arrived) < FEWEST:
        return {}
    scales = {site: _mean_squares(HeadSums.read(sums, "train")) for site, sums in arrived.items()}
    features, targets = np.median(list(scales.values()), axis=0)
    bounds = ratio**2 * np.array([features, max(targets, 1.0)])
    return {
        site: exclusion(
            "norm",
            f"sent sums over features or targets that are more than {ratio:g} times as large as at most "
            "sites (federation.max_norm_ratio)",
        )
        for site, scale in scales.items()
        if not (np.array(scale) <= bounds).all()
    }


def _mean_squares(sums: HeadSums) -> tuple[float, float]:
    """Return the mean squared length of the rows' features (constant included), and of their targets."""
    weight = sums.weight or 1.0
    return float(np.trace(sums.gram)) / weight, float(sums.squares.sum()) / weight


def _solve(counted: Mapping[str, Adapter], share: float | None) -> tuple[Solution, int]:
    """Return the solution for all rows together, and on how many validation rows its ridge was picked."""
    train, validation = (
        {site: HeadSums.read(sums, split) for site, sums in counted.items()} for split in SUMMED
    )
    measured = round(sum(sums.weight for sums in validation.values()))
    return solve_best(_together(train, share), _together(validation, share)), measured


def _together(sums: Mapping[str, HeadSums], share: float | None) -> HeadSums:
    """Return the sum over sites; rows of one that has more than `share` of the weight count for less.

    How many rows it has a site says itself, so that the head is held to what holds for updates.
    """
    cap = largest_weight([each.weight for each in sums.values() if each.weight > 0], share)
    counting = (
        each if cap is None or each.weight <= cap else each.scaled(cap / each.weight)
        for each in sums.values()
    )
    return functools.reduce(operator.add, counting)


def _check_quorum(quorum: int, asked: int, counted: int, aside: Mapping[str, Exclusion]) -> None:
    """Name the sites that are not in it; raise QuorumNotMet where too few are."""
    for site, why in sorted(aside.items()):
        log.warning("%s is not in the solved head: %s", site, why.reason)
    if counted >= quorum:
        return
    reasons = "; ".join(f"{site}: {why.reason}" for site, why in sorted(aside.items()))
    raise QuorumNotMet(
        f"the head needs sums of {quorum} of {asked} sites, {counted} sent good ones ({reasons}); mend those "
        "sites, lower federation.quorum, or choose adapter.head.init: random.",
        kind="quorum-of-sums",
    )
