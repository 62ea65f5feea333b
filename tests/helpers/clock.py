"""A clock for exchanges that runs only while somebody sleeps: hours of waiting take no time."""

from __future__ import annotations

import pytest

from quorate.server.exchange import exchange, join, latecomers, patience, presence


class Clock:
    """In the place of the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    @property
    def waited(self) -> float:
        """Seconds that were slept."""
        return self.now - 1000.0


def installed(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put a clock into all modules that wait."""
    clock = Clock()
    for module in (exchange, join, latecomers, patience, presence):
        monkeypatch.setattr(module, "time", clock)
    return clock
