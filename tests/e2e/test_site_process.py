"""The real site process behind its real socket: one base model, one answer per request, whatever kills it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engines import answer_all
from site_folder import SITE, SiteProcess, request, sha256_of, write_folder

from quorate.client.process.grpc_client import RemoteSite
from quorate.client.process.grpc_server import check_health
from quorate.client.site.site import Site
from quorate.client.site.site_data import SiteData
from quorate.shared.protocol.messages import RoundRequest, Update

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LOADED = "base model"


@pytest.fixture
def process(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiteProcess]:
    process = SiteProcess(write_folder(tmp_path_factory.mktemp("site"), tiny_bert, min_rows=10, max_rank=4))
    yield process
    if process.process.poll() is None:
        process.kill()


@pytest.fixture
def run(tiny_bert: Path, make_run: Any) -> Any:
    """Long rounds: a test that kills in the middle of one must find it there."""
    model = {"model_name_or_path": "/nowhere", "sha256": sha256_of(tiny_bert)}
    return make_run(model=model, training={"max_steps": 400}, federation={"rounds": 3})


def test_a_run_at_a_site_that_dies(process: SiteProcess, run: Any, make_run: Any) -> None:
    with RemoteSite(process.folder.socket) as remote:

        def ask(asked: RoundRequest) -> tuple[bytes, Update]:
            reply = remote.ask(asked.encoded, 300)
            return reply, Update.decode(reply)

        _, joined = ask(request(run, "join", 0, site=""))
        assert check_health(process.folder.socket)
        description = joined.header.description
        assert joined.header.site == SITE and description is not None
        assert description.rows == {"train": 58, "validation": 14, "test": 18}
        refused = make_run(model=run.model.model_dump(), adapter={"r": 5})
        assert ask(request(refused, run_id="f" * 16))[1].header.error == "policy-rank"
        assert "policy.max_rank is 4" in process.log

        first, update = ask(request(run))
        assert (update.header.error, update.header.num_steps) == (None, 400)
        evaluated, _ = ask(request(run, "evaluate", 1, update.arrays, split="test"))
        assert process.log.count(LOADED) == 1, "loaded once, for all that a run asks"
        process.kill()

        process.restart()
        assert ask(request(run))[0] == first, "the answer that was given, byte for byte"
        assert ask(request(run, "evaluate", 1, update.arrays, split="test"))[0] == evaluated
        assert ask(request(run, arrays=update.arrays))[1].header.error == "conflict"
        assert process.log.count(LOADED) == 1 and "step" not in process.log.split("ready at")[-1]

        # Killed in the middle of a round: who asked waits, and is served by the next process.
        second = request(run, round=2, arrays=update.arrays)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask, second)
            process.wait("round 2, step 10")
            process.kill()
            process.restart()
            again, after = asking.result(300)
            assert after.arrays.content_hash == _undisturbed(process, second), "as if nothing had happened"

            # Told to end in the middle of a round: at once, cleanly, and the next process does the rest.
            third = request(run, round=3, arrays=after.arrays)
            asking = pool.submit(ask, third)
            process.wait("round 3, step 10")
            process.process.send_signal(signal.SIGTERM)
            assert process.process.wait(60) == 0
            assert not process.folder.socket.exists() and "round 3, step 399" not in process.log
            process.restart()
            assert asking.result(300)[1].header.error is None
        assert ask(second)[0] == again

        # One line of a run file that backtracks for ever where nothing bounds it.
        hostile = make_run(model=run.model.model_dump(), adapter={"target_modules": "(.+)+X"})
        assert ask(request(hostile, "join", 0, run_id="e" * 16))[1].header.error == "config"
        assert "'(.+)+X' takes more than 0.5 s to match" in process.log
        assert ask(request(run, "evaluate", 3, after.arrays, split="test"))[1].header.error is None
    assert "Traceback" not in process.log


def _undisturbed(process: SiteProcess, asked: RoundRequest) -> str:
    """What a site gives that was never killed."""
    (update,) = answer_all(Site(SiteData(process.folder)), [asked])
    return update.arrays.content_hash


def test_what_keeps_a_site_from_starting(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tiny_bert)
    path = tmp_path / "site.yaml"
    path.write_text(path.read_text().replace("device: cpu", "device: cuda:77"))
    process = SiteProcess(folder)
    assert process.process.wait(200) == 2
    assert (
        "device: this machine cannot compute on 'cuda:77'" in process.log and "Traceback" not in process.log
    )


def test_the_client_app_is_light() -> None:
    heavy = ["torch", "transformers", "peft", "pandas", "pyarrow"]
    code = "import sys, quorate.client.process.flower_app; "
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
