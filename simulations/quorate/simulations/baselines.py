"""The two reference runs that say what a federation was worth.

*Local only*: each site alone, from the same start, as many rounds of as many steps, its best round picked on
its own validation rows. *Centralised*: all rows in one place, with as many steps a round as all sites took
together, its best round picked on all validation rows. Both go through the sites' own trainer.

A reference that fails (its training diverges, say) is left out and named; the federated result stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quorate.client.site.local_baseline import UNKNOWN, single, value
from quorate.client.site.site import Site, SiteRows
from quorate.client.trainer.sampling import few_shot
from quorate.server.exchange.exchange import exclusion
from quorate.server.exchange.join import request
from quorate.server.rounds.evaluation import local_gain, summarise
from quorate.server.rounds.run import Run
from quorate.server.tracking.events import PhaseBegan
from quorate.server.tracking.records import Exclusion, LocalGain, Measured, References
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.selection import downloaded
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.run_config import RunConfig
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.protocol.messages import RoundRequest, Split, Update
from quorate.shared.protocol.phases import Phase
from quorate.shared.tasks.task import Row

POOL = "(all sites)"
"""The centralised run's name; no real site can have it."""


@dataclass(frozen=True)
class Candidate:
    """A site's adapter after some round, with its value on validation rows."""

    round: int
    adapter: Adapter
    value: float


def run_references(
    run: Run,
    rows: Mapping[str, SiteRows],
    site: Site,
    initial: Adapter,
    federated: Mapping[str, Outcomes],
) -> tuple[References, dict[str, LocalGain]]:
    """Run the references that the configuration asks for.

    Args:
        rows: site name -> split -> rows.
        site: the process that holds these rows and, under the name POOL, all of them together.
        initial: the adapter's seeded start.
        federated: test outcomes of the federated model per site.
    Returns: the references, and what the federation was worth to each site (with local_only).
    """
    wanted = run.config.evaluation.references
    config, intervals = run.config, run.config.evaluation.bootstrap_samples > 0
    local: dict[str, Measured] = {}
    gains: dict[str, LocalGain] = {}
    failed: dict[str, Exclusion] = {}
    centralised = None
    if "local_only" in wanted:
        best = train_reference(run, single(config), site, list(rows), initial, "local only", failed)
        for name, candidate in best.items():
            outcomes = _measure(run, site, rows, name, candidate, failed)
            if outcomes is None:
                continue
            test = summarise(config.task, "test", outcomes, intervals=intervals)
            local[name] = Measured(round=candidate.round, test=test)
            if federated.get(name, Outcomes()).rows:
                gains[name] = local_gain(
                    config.task, run.metric, federated[name], outcomes[name], intervals=intervals
                )
    if "centralised" in wanted:
        best = train_reference(run, _all_steps(config, rows), site, [POOL], initial, "centralised", failed)
        for candidate in best.values():
            outcomes = _measure(run, site, rows, POOL, candidate, failed)
            if outcomes is not None:
                test = summarise(config.task, "test", outcomes, intervals=intervals)
                centralised = Measured(round=candidate.round, test=test)
    return References(local_only=local, centralised=centralised, failed=failed), gains


def pool(rows: Mapping[str, SiteRows], config: RunConfig) -> dict[Split, Sequence[Row]]:
    """Return all sites' rows as those of one site; of the training rows, those that the sites use."""
    rows = {
        name: {**splits, "train": few_shot(config, name, splits.get("train", ()))}
        for name, splits in rows.items()
    }
    splits: tuple[Split, ...] = ("train", "validation", "test")
    # Sites number their patients by themselves: the same group at two of them is two groups.
    return {
        split: [
            row if row.group is None else replace(row, group=f"{name}/{row.group}")
            for name, site in rows.items()
            for row in site.get(split, ())
        ]
        for split in splits
    }


def train_reference(
    run: Run,
    config: RunConfig,
    site: Site,
    names: Sequence[str],
    initial: Adapter,
    what: str,
    failed: dict[str, Exclusion],
) -> dict[str, Candidate]:
    """Train each of `names` on its own rows for all rounds, without anyone else; return its best round.

    The sites share the trainer's passes but no arrays. One that fails goes to `failed` and has no best round:
    after fewer steps than the others it would be no comparison.
    """
    current = dict.fromkeys(names, initial)
    best: dict[str, Candidate] = {}
    asking = Run(config, run.output_dir, run.run_id)
    for round in range(1, config.federation.rounds + 1):
        run.tell(PhaseBegan(round=round, name=what))
        asked = [_asking(asking, round, "fit", name, adapter) for name, adapter in current.items()]
        trained = _answers(site, asked, failed)
        current = {name: initial.updated(update.arrays) for name, update in trained.items()}
        if round % config.evaluation.every and round != config.federation.rounds:
            continue
        asked = [
            _asking(asking, round, "evaluate", name, adapter, "validation")
            for name, adapter in current.items()
        ]
        answered = _answers(site, asked, failed)
        current = {name: current[name] for name in answered}
        for name, update in answered.items():
            scored = value(run.config, update.header.outcomes)
            # Without validation rows the last round stands, as it does for the federation.
            if name not in best or scored > best[name].value or scored == UNKNOWN:
                best[name] = Candidate(round, current[name], scored)
    return {name: best[name] for name in current}


def _measure(
    run: Run,
    site: Site,
    rows: Mapping[str, SiteRows],
    whose: str,
    candidate: Candidate,
    failed: dict[str, Exclusion],
) -> dict[str, Outcomes] | None:
    """Return an adapter's test outcomes on every site's rows; None, and `whose` in `failed`, if one fails."""
    asking = Run(single(run.config), run.output_dir, run.run_id)
    asked = [_asking(asking, candidate.round, "evaluate", name, candidate.adapter, "test") for name in rows]
    wrong: dict[str, Exclusion] = {}
    answers = _answers(site, asked, wrong)
    if wrong:
        failed[whose] = next(iter(wrong.values()))
        return None
    return {name: update.header.outcomes or Outcomes() for name, update in answers.items()}


def _asking(
    run: Run, round: int, phase: Phase, name: str, adapter: Adapter, split: Split | None = None
) -> RoundRequest:
    """Return a request that starts from `adapter`, of which it brings what the run's rule sends."""
    return request(run, round, phase, name, downloaded(run.config, GlobalState(adapter), round), split)


def _answers(site: Site, requests: list[RoundRequest], failed: dict[str, Exclusion]) -> dict[str, Update]:
    """Return the good answers by site; the others go to `failed`."""
    good = {}
    for update in site.handle(requests):
        if update.header.error is None:
            good[update.header.site] = update
        else:
            failed[update.header.site] = exclusion(update.header.error)
    return good


def _all_steps(config: RunConfig, rows: Mapping[str, SiteRows]) -> RunConfig:
    """Return the configuration for all rows in one place, with the steps of all sites together."""
    training = config.training
    if training.max_steps is not None:
        # Sites asked in a round, not sites there are: the budget is that of the federated run.
        asked = min(config.federation.sites_per_round or len(rows), len(rows))
        training = training.model_copy(update={"max_steps": training.max_steps * asked})
    return single(config.model_copy(update={"training": training}))
