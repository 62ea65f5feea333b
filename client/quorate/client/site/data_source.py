"""What the organisations of one process hold: their rows, and the base model under their own path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from quorate.client.site.request_checks import BaseLimits
from quorate.shared.config.run_config import RunConfig
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row

SiteRows = Mapping[Split, Sequence[Row]]


class DataSource(Protocol):
    """Finds for a run what a site holds."""

    @property
    def names(self) -> tuple[str, ...]:
        """The sites of this process."""
        ...

    @property
    def readings(self) -> int:
        """How often rows were let go of, to be read again; what was made of earlier ones goes too."""
        ...

    def rows(self, run: RunConfig, site: str) -> SiteRows:
        """Return the rows that the run's data alias stands for at `site`; the same ones until a run begins.

        Raises: DataError: they cannot be read. RequestRefused: the site does not give them for this run.
        """
        ...

    @property
    def base_limits(self) -> BaseLimits:
        """How far a rule may move the base model here."""
        ...

    @property
    def fewest_for_statistics(self) -> int | None:
        """Fewest rows over which sums for the head leave; None for as many as features and their constant."""
        ...

    def at_hand(self, run: RunConfig) -> RunConfig:
        """Return the run with its base model named as it lies here.

        Raises: ModelError: it is not here.
        """
        ...


@dataclass(frozen=True)
class InMemory:
    """Rows of one run's data, as a simulation holds them; its base model is where the run file says.

    Args:
        of: site name -> split -> rows.
    """

    of: Mapping[str, SiteRows]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.of)

    @property
    def readings(self) -> int:
        return 0

    def rows(self, run: RunConfig, site: str) -> SiteRows:
        return self.of[site]

    @property
    def base_limits(self) -> BaseLimits:
        """Return no limits: whoever simulates is coordinator and sites at once."""
        return BaseLimits()

    @property
    def fewest_for_statistics(self) -> int | None:
        """Return one, for the same reason: nothing leaves."""
        return 1

    def at_hand(self, run: RunConfig) -> RunConfig:
        return run
