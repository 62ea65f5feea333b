"""Steps 2 to 4 of a round: send, collect, check; what comes out counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from quorate.server.exchange.exchange import Answers, in_order
from quorate.server.rounds.checkpoint import Progress
from quorate.server.rounds.round import Round
from quorate.server.rounds.screening import Passed, Screen, room
from quorate.server.rounds.update_checks import check_trained
from quorate.shared.adapters.selection import downloaded, upload_schema
from quorate.shared.aggregation import GlobalState
from quorate.shared.protocol.messages import RoundRequest, Update
from quorate.shared.protocol.phases import Phase


@dataclass
class Collection:
    """The updates of one exchange of a round that count, in the order of the cohort's names, as they arrive.

    Args:
        state: what the sites start from.
        before: the round before, whose norms say what is usual.
        answers: traffic, and who does not count; complete once all updates were taken.
        screen: holds updates against each other.
    """

    round: Round
    phase: Phase
    state: GlobalState
    cohort: Sequence[str]
    before: Progress | None
    answers: Answers = field(init=False)
    screen: Screen = field(init=False)

    def __post_init__(self) -> None:
        # With coins a cohort may be smaller than the quorum, and even empty, without anybody's fault.
        quorum = min(self.round.run.config.federation.quorum, len(self.cohort))
        self.answers = self.round.answers(quorum=quorum)
        self.screen = self._screen()

    def __iter__(self) -> Iterator[Passed]:
        config, members = self.round.run.config, self.round.members
        sent, rule = downloaded(config, self.state, self.round.number), config.aggregation
        shares = {site: sent.cropped(rule.site_schema(sent.schema, site)) for site in self.cohort}
        asked = dict(self.round.request(self.phase, site, arrays) for site, arrays in shares.items())
        arriving = self.answers.ask(self.round.grid, asked, self._passed)
        if config.private_clients:
            # Whom another site's update would set aside, no noise hides; updates are clipped instead. Order
            # decides the last bits of a sum, which noise drowns; without it no update is held for another.
            yield from (replace(each, weight=1.0) for _, each in arriving)
        else:
            yield from self.screen.passed(in_order(self.cohort, self.answers, arriving))
            self.answers.excluded.update(self.screen.excluded)
        members.pace = max(members.pace, self.answers.longest)

    def _passed(self, _request: RoundRequest, update: Update) -> Passed:
        """Check an update by itself. Raises: as `check_trained`."""
        config, site = self.round.run.config, update.header.site
        rule, federation = config.aggregation, config.federation
        whole = upload_schema(config, self.round.members.initial.schema, self.round.number)
        schema = rule.site_schema(whole, site)
        norm = check_trained(
            update,
            schema,
            self.state.adapter.cropped(schema),
            self._rows(site),
            federation.max_update_norm,
            rule,
        )
        weight = rule.weight(update.header.num_examples, update.header.num_tokens)
        passed = Passed(site, update.header, update.arrays.padded(whole), weight, norm)
        self.screen.see(passed)
        return passed

    def _screen(self) -> Screen:
        config = self.round.run.config
        moving = upload_schema(config, self.state.adapter.schema, self.round.number)
        return Screen(
            config.federation,
            len(self.cohort),
            self.state.adapter.subset(moving).l2_norm,
            list(self.before.record.update_norms.values()) if self.before else [],
            room(config.training, {site: self._rows(site) for site in self.cohort}),
        )

    def _rows(self, site: str) -> int:
        return self.round.members.sites[site].rows.get("train", 0)
