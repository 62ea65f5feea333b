"""The real site process while its people change site.yaml and data, look at its runs, and limit them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from site_folder import RUN_ID, SiteProcess, request, sha256_of, write_folder

from quorate.client.process.grpc_client import RemoteSite
from quorate.deploy.cli import run as quorate
from quorate.shared.protocol.messages import RoundRequest, Update

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def process(tiny_bert: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiteProcess]:
    process = SiteProcess(write_folder(tmp_path_factory.mktemp("site"), tiny_bert))
    yield process
    if process.process.poll() is None:
        process.kill()


def configure(process: SiteProcess, **policy: Any) -> None:
    path = process.folder.path / "site.yaml"
    content = yaml.safe_load(path.read_text())
    content["policy"] |= policy
    path.write_text(yaml.safe_dump(content))


def test_a_site_goes_by_what_is_on_disk(
    process: SiteProcess, tiny_bert: Any, make_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = process.folder
    run = make_run(
        model={"model_name_or_path": "/nowhere", "sha256": sha256_of(tiny_bert)},
        federation={"rounds": 4},
        training={"max_steps": 400},
    )

    def listed() -> list[dict[str, Any]]:
        assert quorate(["site", "runs", str(folder.path), "--json"]) == 0
        return list(json.loads(capsys.readouterr().out)["runs"])

    with RemoteSite(folder.socket) as remote:

        def ask(asked: RoundRequest) -> Update:
            return Update.decode(remote.ask(asked.encoded, 300))

        joined = ask(request(run, "join", 0)).header.description
        assert joined is not None and joined.rows["train"] == 58
        assert ask(request(run)).header.error is None

        # A rule is tightened, a file broken, a patient withdrawn: without a restart, and it is said.
        configure(process, max_rank=3)
        assert ask(request(run, round=2)).header.error == "policy-rank"
        assert "policy.max_rank: 64, now 3" in process.log
        good = (folder.path / "site.yaml").read_text()
        (folder.path / "site.yaml").write_text("policy: [\n")
        assert ask(request(run, round=2)).header.error == "site-file"
        (folder.path / "site.yaml").write_text(good)
        configure(process, max_rank=64)
        lines = (folder.path / "notes.csv").read_text().splitlines()
        (folder.path / "notes.csv").write_text("\n".join(lines[:-6]) + "\n")
        rejoined = ask(request(run, "join", 0, run_id="f" * 16)).header.description
        assert rejoined is not None and sum(rejoined.rows.values()) == 84

        # A round that takes too long ends at a step, and the process goes on.
        configure(process, max_minutes_per_round=0.0005)
        assert ask(request(run, round=2)).header.error == "policy-minutes"
        assert "step 400," not in process.log.split("now 0.0005")[-1]
        configure(process, max_minutes_per_round=120)

        # What is done here can be seen while it is done, and after a kill.
        (first,) = [each for each in listed() if each["run_id"] == RUN_ID]
        assert (first["trained"], first["rounds"], first["rows"]) == (1, 4, 58)
        assert first["refusal"]["code"] == "policy-minutes" and first["left"]["arrays"] > 0
        process.kill()
        assert [each for each in listed() if each["run_id"] == RUN_ID] == [first]
        process.restart()
        assert ask(request(run, round=2)).header.error is None
        deadline = time.monotonic() + 60
        while listed()[0]["trained"] != 2:
            assert time.monotonic() < deadline
    assert f"run {RUN_ID} (test), round 2, fit: answered" in process.log
    assert "Traceback" not in process.log
