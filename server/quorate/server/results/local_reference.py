"""The local-only reference in a federation: each site trains its own adapter and says what that is worth.

A simulation measures such adapters on every site's rows. Here they never leave their sites, so each is
measured at home alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from quorate.server.exchange.exchange import Answers
from quorate.server.exchange.join import Members, answers_of, request
from quorate.server.rounds.evaluation import local_gain, summarise
from quorate.server.rounds.loop import Result
from quorate.server.rounds.run import RECORD_FILE, Run, read_jsonl
from quorate.server.rounds.update_checks import check_measured
from quorate.server.tracking.events import PhaseBegan
from quorate.server.tracking.records import LocalGain, Measured, References, RoundRecord
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.protocol.messages import BEST_ROUND, RoundRequest, Update

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """What the federation was worth.

    Args:
        references: the sites' own adapters; None where none were asked for.
        worth: site -> what the federation brought it on its test rows.
    """

    references: References | None = None
    worth: dict[str, LocalGain] = field(default_factory=dict)


def left_out(config: RunConfig) -> str | None:
    """Return which of the asked references a federation leaves out, and why; None where it has all."""
    asked = config.evaluation.references
    if config.privacy is not None and asked:
        return f"{', '.join(asked)}: training alone would spend privacy that nothing accounts for"
    if "centralised" in asked:
        return "centralised: only a simulation has all rows in one place"
    return None


def compare(grid: Grid, run: Run, result: Result, federated: Mapping[str, Outcomes]) -> Compared:
    """Have every site train alone, if the run asks for that, and compare.

    Args:
        federated: test outcomes of the federated model per site.
    """
    config = run.config
    asked = "local_only" in config.evaluation.references and config.privacy is None
    if not asked or result.stopped is not None or result.progress is None:
        return Compared()
    run.tell(PhaseBegan(round=result.progress.round, name="local only"))
    answers, found = _ask(grid, run, result.members)
    intervals, local, gains = config.evaluation.bootstrap_samples > 0, {}, {}
    for site, (round, outcomes) in sorted(found.items()):
        test = summarise(config.task, "test", {site: outcomes}, intervals=intervals)
        local[site] = Measured(round=round, test=test)
        theirs = federated.get(site, Outcomes())
        if theirs.rows and outcomes.rows:
            gains[site] = local_gain(config.task, run.metric, theirs, outcomes, intervals=intervals)
    return Compared(References(local_only=local, failed=answers.excluded), gains)


def _ask(grid: Grid, run: Run, members: Members) -> tuple[Answers, dict[str, tuple[int, Outcomes]]]:
    """Return the account of the exchange, and site -> round and test outcomes of its own adapter."""
    rounds = run.config.federation.rounds
    # All rounds in one answer: a site needs about as long for them as all sites together took.
    records = read_jsonl(run.output_dir / RECORD_FILE, RoundRecord)
    taken = sum(sum(each.seconds.values()) for each in records if isinstance(each, RoundRecord))
    answers = answers_of(run, members.by_node, members.presence, expected=taken)
    asked = {node: request(run, 0, "alone", site) for site, node in members.nodes.items()}

    def check(_request: RoundRequest, update: Update) -> tuple[int, Outcomes]:
        check_measured(run.config.task, update, members.sites[update.header.site].rows.get("test", 0))
        if not 1 <= update.header.metrics.get(BEST_ROUND, 0) <= rounds:
            raise ProtocolError("trained alone and does not say which round was the best.")
        return int(update.header.metrics[BEST_ROUND]), update.header.outcomes or Outcomes()

    found = dict(answers.ask(grid, asked, check))
    for site, why in sorted(answers.excluded.items()):
        log.warning("%s has no local-only reference: %s", site, why.reason)
    return answers, found
