"""What end-to-end tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_input import command, workplace
from tiny_runs import TinyRuns


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[TinyRuns]:
    """Tiny runs as processes that can be stopped at any moment."""
    runs = TinyRuns(tmp_path_factory.mktemp("runs"), tiny_bert)
    yield runs
    runs.close()


@pytest.fixture(scope="session")
def finished(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a finished run."""
    with workplace(tmp_path_factory.mktemp("finished"), tiny_bert) as folder:
        assert command("simulate", "tiny.yaml").code == 0
    return folder / "runs"


@pytest.fixture
def folder(tmp_path: Path, tiny_bert: Path, finished: Path) -> Iterator[Path]:
    """A working directory with a run that works, and its output."""
    with workplace(tmp_path, tiny_bert) as folder:
        shutil.copytree(finished, folder / "runs")
        yield folder
