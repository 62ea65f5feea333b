"""Killed 200 times at any moment, a site never counts less than what left it, nor twice what left once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ledgers import EVENT
from site_folder import SiteProcess, request, sha256_of, write_folder

from quorate.client.privacy.ledger import DATABASE, HEADS
from quorate.client.privacy.ledger_verify import Anchor, verify
from quorate.client.process.grpc_client import RemoteSite
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.protocol.messages import Update

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


@pytest.fixture
def process(tiny_bert: Path, tmp_path: Path) -> Iterator[SiteProcess]:
    budget = {"data": "notes", "max_epsilon": 100, "delta": 1e-5}
    process = SiteProcess(write_folder(tmp_path / "north", tiny_bert, privacy_budgets=[budget]))
    yield process
    if process.process.poll() is None:
        process.kill()


def test_a_real_site_that_dies_in_a_private_round(
    process: SiteProcess, tiny_bert: Path, make_run: Any
) -> None:
    run = make_run(
        model={"model_name_or_path": "/nowhere", "sha256": sha256_of(tiny_bert)},
        training={"max_steps": 100},
        federation={"rounds": 2},
        privacy={"unit": "record", "noise_multiplier": 1.0},
    )

    def kinds() -> list[str]:
        verdict = verify(process.folder.ledger / DATABASE, Anchor(process.folder.anchor / HEADS))
        assert not verdict.findings
        return [row.kind for row in verdict.rows]

    with RemoteSite(process.folder.socket) as remote, ThreadPoolExecutor(1) as pool:
        assert Update.decode(remote.ask(request(run, "join", 0).encoded, 300)).header.error is None
        for end in (signal.SIGKILL, signal.SIGTERM):
            asking = pool.submit(remote.ask, request(run).encoded, 300)
            process.wait("round 1, step 10 ")
            assert kinds() == ["reserve"], "before anything left"
            process.process.send_signal(end)
            process.process.wait(60)
            process.folder.path.joinpath("process.log").write_text("")
            process.restart()
        first = asking.result(300)
        assert Update.decode(first).header.error is None
        assert kinds() == ["reserve", "commit"], "three trainings, one answer"
        process.kill()
        process.restart()
        assert remote.ask(request(run).encoded, 300) == first
        second = request(run, round=2, arrays=Update.decode(first).arrays)
        assert Update.decode(remote.ask(second.encoded, 300)).header.error is None
        assert kinds() == ["reserve", "commit"] * 2
