"""What unit tests share: rounds over a grid that can be tampered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tampered import SIZES, Change, Tampered, untouched

from quorate.client.site.site import Site
from quorate.server.rounds.loop import Result, run_rounds
from quorate.server.rounds.run import RECORD_FILE, Run, read_jsonl
from quorate.server.tracking.records import RoundRecord


@pytest.fixture
def play(make_run: Any, make_sites: Any, tmp_path: Path) -> Any:
    """Run rounds over a tampered grid; returns the result, the records and the grid."""

    def run_it(
        change: Change = untouched,
        *,
        sites: dict[str, int] | None = None,
        rows: Any = None,
        late: dict[str, int] | None = None,
        out: str = "out",
        names: dict[int, str] | None = None,
        **sections: Any,
    ) -> tuple[Result, list[Any], Tampered, Run]:
        site = Site(rows or make_sites(**(sites or SIZES)))
        sections["federation"] = {"rounds": 1, **sections.get("federation", {})}
        run = Run.open(site.prepare(make_run(**sections)), tmp_path / out)
        grid = Tampered(site, change, late)
        result = run_rounds(grid, run, names)
        return result, read_jsonl(run.output_dir / RECORD_FILE, RoundRecord), grid, run

    return run_it
