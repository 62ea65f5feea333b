"""The two reference runs that say what a federation was worth.

*Local only*: each site alone, from the same start, as many rounds of as many steps, its best round picked on
its own validation rows. *Centralised*: all rows in one place, with as many steps a round as all sites took
together, its best round picked on all validation rows. Both go through the sites' own trainer.

A reference that fails (its training diverges, say) is left out and named; the federated result stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from quorate.client.site.data_source import SiteRows
from quorate.client.site.engine import Engine
from quorate.client.site.local_baseline import UNKNOWN, single, value
from quorate.client.site.request import Request
from quorate.client.trainer.sampling import few_shot
from quorate.server.exchange.exclusions import exclusion
from quorate.server.exchange.join import request
from quorate.server.results.local_reference import Compared
from quorate.server.rounds.evaluation import local_gain, summarise
from quorate.server.rounds.run import Run
from quorate.server.tracking.events import PhaseBegan
from quorate.server.tracking.records import Exclusion, LocalGain, Measured, References
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.linear_head import find_head
from quorate.shared.adapters.selection import downloaded
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.run_config import RunConfig
from quorate.shared.metrics.head_sums import SUMMED, HeadSums
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.metrics.ridge import solve_best
from quorate.shared.protocol.messages import Split, Update
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
    engine: Engine,
    initial: Adapter,
    federated: Mapping[str, Outcomes],
) -> Compared:
    """Run the references that the configuration asks for.

    Args:
        rows: site name -> split -> rows.
        engine: answers for these sites and, under the name POOL, for all their rows together.
        initial: the adapter's seeded start.
        federated: test outcomes of the federated model per site.
    Returns: the references, and (with local_only) what the federation was worth to each site.
    """
    config, wanted = run.config, run.config.evaluation.references
    local_only, pooled = (_Reference(run, engine, tuple(rows), initial) for _ in range(2))
    local: dict[str, Measured] = {}
    gains: dict[str, LocalGain] = {}
    if "local_only" in wanted:
        for name, (measured, outcomes) in local_only.best(single(config), list(rows), "local only").items():
            local[name] = measured
            if federated.get(name, Outcomes()).rows:
                intervals = config.evaluation.bootstrap_samples > 0
                gains[name] = local_gain(
                    config.task, run.metric, federated[name], outcomes[name], intervals=intervals
                )
    centralised = None
    if "centralised" in wanted:
        found = pooled.best(_all_steps(config, rows), [POOL], "centralised")
        centralised = found[POOL][0] if found else None
    failed = local_only.failed | pooled.failed
    return Compared(References(local_only=local, centralised=centralised, failed=failed), gains)


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


@dataclass
class _Reference:
    """One kind of training without the others.

    Args:
        sites: those whose test rows an adapter is measured on.
        failed: who gave no figures, and why.
    """

    run: Run
    engine: Engine
    sites: tuple[str, ...]
    initial: Adapter
    failed: dict[str, Exclusion] = field(default_factory=dict)

    def best(
        self, config: RunConfig, names: Sequence[str], what: str
    ) -> dict[str, tuple[Measured, dict[str, Outcomes]]]:
        """Train each of `names`, and measure its best round on all sites' test rows.

        Args:
            config: how they train.
            names: who trains; whoever fails goes to `failed`.
            what: said of it while it goes on.
        Returns: name -> figures, and the outcomes per site that they were made of.
        """
        run, found = self.run.config, {}
        for name, candidate in self._trained(config, names, what).items():
            starts = dict.fromkeys(self.sites, candidate.adapter)
            answers, wrong = self._ask(single(run), candidate.round, "evaluate", starts, "test")
            if wrong:
                self.failed[name] = next(iter(wrong.values()))
                continue
            outcomes = {site: update.header.outcomes or Outcomes() for site, update in answers.items()}
            intervals = run.evaluation.bootstrap_samples > 0
            test = summarise(run.task, "test", outcomes, intervals=intervals)
            found[name] = Measured(round=candidate.round, test=test), outcomes
        return found

    def _trained(self, config: RunConfig, names: Sequence[str], what: str) -> dict[str, Candidate]:
        """Train each of `names` on its own rows for all rounds, without anyone else; return its best round.

        They share the trainer's passes but no arrays. One that fails has no best round: after fewer steps
        than the others it would be no comparison.
        """
        current = self._starts(config, names)
        best: dict[str, Candidate] = {}
        for round in range(1, config.federation.rounds + 1):
            self.run.tell(PhaseBegan(round=round, name=what))
            trained, wrong = self._ask(config, round, "fit", current)
            self.failed |= wrong
            current = {name: self.initial.updated(update.arrays) for name, update in trained.items()}
            if round % config.evaluation.every and round != config.federation.rounds:
                continue
            answered, wrong = self._ask(config, round, "evaluate", current, "validation")
            self.failed |= wrong
            current = {name: current[name] for name in answered}
            for name, update in answered.items():
                scored = value(self.run.config, update.header.outcomes)
                # Without validation rows the last round stands, as it does for the federation.
                if name not in best or scored > best[name].value or scored == UNKNOWN:
                    best[name] = Candidate(round, current[name], scored)
        return {name: best[name] for name in current}

    def _starts(self, config: RunConfig, names: Sequence[str]) -> dict[str, Adapter]:
        """Return what each of `names` begins from: the seeded start, or that with a head solved on its rows.

        One that cannot have it goes to `failed`.
        """
        if not config.solves_head:
            return dict.fromkeys(names, self.initial)
        head = find_head(config, self.initial.schema)
        answered, wrong = self._ask(config, 0, "statistics", dict.fromkeys(names, Adapter({})))
        self.failed |= wrong
        starts = {}
        for name, update in answered.items():
            train, validation = (HeadSums.read(update.arrays, split) for split in SUMMED)
            solved = solve_best(train, validation).head(config.task.logit_scale)
            starts[name] = self.initial.updated(head.arrays(solved))
        return starts

    def _ask(
        self,
        config: RunConfig,
        round: int,
        phase: Phase,
        starts: Mapping[str, Adapter],
        split: Split | None = None,
    ) -> tuple[dict[str, Update], dict[str, Exclusion]]:
        """Ask sites to start from an adapter each, of which they are sent what the run's rule sends.

        With an empty one nothing is sent.

        Returns: the good answers by site, and why the others are not.
        """
        run = Run(config, self.run.output_dir, self.run.run_id)
        requests = []
        for name, adapter in starts.items():
            arrays = downloaded(config, GlobalState(adapter), round) if len(adapter) else adapter
            requests.append(Request(config, request(run, round, phase, name, split=split).header, arrays))
        good, wrong = {}, {}
        for update in self.engine.handle_many(requests):
            if update.header.error is None:
                good[update.header.site] = update
            else:
                wrong[update.header.site] = exclusion(update.header.error)
        return good, wrong


def _all_steps(config: RunConfig, rows: Mapping[str, SiteRows]) -> RunConfig:
    """Return the configuration for all rows in one place, with the steps of all sites together."""
    training = config.training
    if training.max_steps is not None:
        # Sites asked in a round, not sites there are: the budget is that of the federated run.
        asked = min(config.federation.sites_per_round or len(rows), len(rows))
        training = training.model_copy(update={"max_steps": training.max_steps * asked})
    return single(config.model_copy(update={"training": training}))
