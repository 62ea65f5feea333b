"""What end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import TinyRuns


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[TinyRuns]:
    """Tiny runs as processes that can be stopped at any moment."""
    runs = TinyRuns(tmp_path_factory.mktemp("runs"), tiny_bert)
    yield runs
    runs.close()
