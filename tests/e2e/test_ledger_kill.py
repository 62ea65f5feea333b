"""Killed 200 times at any moment, a site never counts less than what left it, nor twice what left once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ledgers import EVENT

from quorate.shared.privacy.accounting import epsilon

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
HELPERS = Path(__file__).resolve().parents[1] / "helpers"
KILLS = 200
WINDOWS = {
    "nothing of the next round",
    "reserved, not stored",
    "stored, not committed",
    "committed, not sent",
    "written, not anchored",
}


def test_what_left_is_counted_once_whenever_the_site_is_killed(tmp_path: Path) -> None:
    path = os.pathsep.join([str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(HELPERS / "ledger_killed.py"), str(tmp_path), str(KILLS), "7"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert sum(told["ends"].values()) == KILLS and set(told["windows"]) == WINDOWS
    assert told["events"] == told["answers_left"] > KILLS / 4, "one event for each answer that left"
    long = EVENT.model_copy(update={"steps": told["answers_left"] * EVENT.steps})
    assert told["epsilon"] == epsilon([long], 1e-5), "all those processes cost what one job costs"
