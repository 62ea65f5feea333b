"""The ServerApp as a SuperExec starts it, over the in-process grid: what it writes, however it ends."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.supercore.run import RunNotRunningException
from refusals import refuses

from quorate.client.site.site import Site
from quorate.server.federation.flower_app import FEDERATION, LOG_FILE, app
from quorate.server.federation.folder import FederationFolder
from quorate.server.federation.nodes import Nodes, SiteNode
from quorate.server.rounds.run import locked_output
from quorate.server.tracking.events import EVENTS_FILE, Event, EventsReader, PhaseBegan
from quorate.server.tracking.run_status import RunStatus
from quorate.shared.config.read import dump_yaml
from quorate.shared.errors import ConfigError, QuorateError, QuorumNotMet
from quorate.simulations.in_process_grid import FIRST_SITE_NODE, InProcessGrid
from quorate.simulations.runner import simulate

RUN_ID = "0123456789abcdef"
FLOWER_RUN = 77
SITES = {"north": 12, "south": 7, "west": 4}


class Submitted:
    """A run in a federation's folder, and the sites that answer it."""

    def __init__(self, folder: FederationFolder, site: Site) -> None:
        self.folder, self.site = folder, site
        self.run_dir = folder.runs / RUN_ID

    def run(self, grid: type[InProcessGrid] = InProcessGrid, run_id: str = RUN_ID) -> RunStatus | None:
        app(grid(self.site, self.site.names), Context(FLOWER_RUN, 0, {}, RecordDict(), {"run": run_id}))
        return RunStatus.read(self.run_dir)

    def adapter(self) -> bytes:
        return (self.run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def submit(make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(name: str = "one", **changes: Any) -> Submitted:
        site = Site(make_sites(**SITES), received=tmp_path / name / "received")
        submitted = Submitted(FederationFolder(tmp_path / name), site)
        submitted.run_dir.mkdir(parents=True)
        config = site.prepare(make_run(**changes))
        (submitted.run_dir / "run.yaml").write_text(dump_yaml(config))
        nodes = {
            FIRST_SITE_NODE + index: SiteNode(site=each, key="0" * 64)
            for index, each in enumerate(site.names)
        }
        Nodes(nodes=nodes).write(submitted.folder)
        monkeypatch.setenv(FEDERATION, str(submitted.folder.path))
        return submitted

    return make


def test_a_run_is_carried_out_in_its_folder_under_its_own_id(submit: Any) -> None:
    submitted = submit()
    assert submitted.run() == RunStatus(state="done", exit_code=0, flower_run_id=FLOWER_RUN)
    summary = json.loads((submitted.run_dir / "summary.json").read_text())
    assert (summary["status"], summary["run_id"]) == ("done", RUN_ID)
    assert summary["best"]["test"] is not None
    events = [event.event for event in EventsReader(submitted.run_dir / EVENTS_FILE).read()]
    assert events.count("round") == summary["rounds"]
    assert events[-2:] == ["finish", "phase"]  # and every site takes its result without a word


def test_a_simulation_tells_the_events_that_the_serverapp_tells(
    submit: Any, make_run: Any, make_sites: Any, tmp_path: Path
) -> None:
    chances = {"federation": {"rounds": 3, "sites_per_round": 2, "quorum": 2}}
    submitted = submit(**chances)
    submitted.run()
    out, rows = tmp_path / "simulated", make_sites(**SITES)
    heard: list[Event] = []

    def toy(event: Event) -> None:
        """A tracker is any function that takes an event."""
        heard.append(event)

    simulate(make_run(**chances), rows, out, trackers=[toy])
    simulated = EventsReader(out / EVENTS_FILE).read()
    assert [each.model_dump_json() for each in simulated] == [each.model_dump_json() for each in heard]
    *served, delivery = EventsReader(submitted.run_dir / EVENTS_FILE).read()
    assert isinstance(delivery, PhaseBegan) and delivery.name == "deliver", "a simulation delivers to nobody"
    assert [lasting(each) for each in simulated] == [lasting(each) for each in served]
    assert {each.event for each in served} == {"phase", "start", "round", "finish"}
    assert stat.S_IMODE((out / EVENTS_FILE).stat().st_mode) == 0o600


def test_a_head_is_solved_before_round_1_and_told_alike(
    submit: Any, make_run: Any, make_sites: Any, tmp_path: Path
) -> None:
    analytic = {"adapter": {"head": {"init": "analytic"}}}
    submitted = submit(**analytic)
    assert submitted.run() == RunStatus(state="done", exit_code=0, flower_run_id=FLOWER_RUN)
    out = tmp_path / "simulated"
    simulate(make_run(**analytic), make_sites(**SITES), out)
    (served, _, summary), simulated = (
        [
            {**head, "seconds": 0.0, "bytes_up": {}}
            for head in (
                *(json.loads(line).get("head") for line in (folder / EVENTS_FILE).read_text().splitlines()),
                *(json.loads(line)["head"] for line in (folder / "record.jsonl").read_text().splitlines()),
                json.loads((folder / "summary.json").read_text())["head"],
            )
            if head is not None
        ]
        for folder in (submitted.run_dir, out)
    )
    assert served == summary == simulated[0] and served["rows"] == SITES
    kinds = [event.event for event in EventsReader(submitted.run_dir / EVENTS_FILE).read()]
    assert kinds.index("start") < kinds.index("head") < kinds.index("round") and kinds.count("head") == 1


def lasting(event: Event) -> dict[str, Any]:
    """Return an event without times, ids and places (updates travel with their seconds)."""
    told = json.loads(event.model_dump_json(exclude={"at", "run_id", "output_dir"}))
    for name in ("record", "summary"):
        for varying in ("run_id", "seconds", "bytes_up", "bytes"):
            told.get(name, {}).pop(varying, None)
    return told


@pytest.mark.parametrize("run_id", ["", "../../etc", "0123456789ABCDEF", "0123456789abcdef0"])
def test_what_is_no_run_id_names_no_folder(submit: Any, run_id: str) -> None:
    submitted = submit()
    with refuses(ConfigError, where="run") as caught:
        submitted.run(run_id=run_id)
    assert repr(run_id) in str(caught.value)
    assert RunStatus.read(submitted.run_dir) is None


def test_a_run_that_was_stopped_is_written_and_goes_on_where_it_was(submit: Any) -> None:
    class Stopped(InProcessGrid):
        """Flower stops the run in its second round."""

        def push_messages(self, messages: Any) -> Any:
            pushed = list(messages)
            if pushed and pushed[0].metadata.group_id == "2":
                raise RunNotRunningException
            return super().push_messages(pushed)

    submitted = submit()
    with refuses(QuorateError, "run-stopped"):
        submitted.run(Stopped)
    status = RunStatus.read(submitted.run_dir)
    assert status is not None and (status.state, status.exit_code) == ("interrupted", 130)
    assert json.loads((submitted.run_dir / "summary.json").read_text())["rounds"] == 1
    whole = submit("two")
    assert whole.run() == submit_again(submitted, whole)
    assert submitted.adapter() == whole.adapter()


def submit_again(submitted: Submitted, other: Submitted) -> RunStatus | None:
    os.environ[FEDERATION] = str(submitted.folder.path)
    return submitted.run()


def test_sigterm_interrupts_and_flowers_handlers_come_back(submit: Any) -> None:
    class Terminated(InProcessGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return super().pull_messages(message_ids)

    submitted, before = submit(), signal.getsignal(signal.SIGTERM)
    with refuses(QuorateError, "run-stopped"):
        submitted.run(Terminated)
    assert signal.getsignal(signal.SIGTERM) == before
    status = RunStatus.read(submitted.run_dir)
    assert status is not None and status.state == "interrupted"


def test_without_its_superexec_it_ends_by_flowers_handler_and_stays_running(
    submit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Orphaned(InProcessGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            monkeypatch.setattr(os, "getppid", lambda: -1)  # as no parent ever is
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("Flower's handler ends the process")

    def flowers(number: int, frame: Any) -> None:
        raise SystemExit(5)

    submitted, before = submit(), signal.signal(signal.SIGINT, flowers)
    try:
        with pytest.raises(SystemExit):
            submitted.run(Orphaned)
    finally:
        signal.signal(signal.SIGINT, before)
    status = RunStatus.read(submitted.run_dir)
    assert status is not None and (status.state, status.exit_code) == ("running", None)
    with locked_output(submitted.run_dir):  # nobody is in the folder: a new submission can go on
        pass


def test_too_few_sites_are_told(submit: Any) -> None:
    submitted = submit(federation={"rounds": 1, "quorum": 4})
    with pytest.raises(QuorumNotMet):
        submitted.run()
    status = RunStatus.read(submitted.run_dir)
    assert status is not None and (status.state, status.exit_code) == ("quorum-not-met", 3)
    assert "the run needs 4 sites" in status.message


def test_the_words_of_an_internal_error_stay_in_the_log(submit: Any) -> None:
    class Broken(InProcessGrid):
        def get_node_ids(self) -> Any:
            raise ValueError("words of a library")

    submitted = submit()
    with pytest.raises(ValueError):
        submitted.run(Broken)
    status = RunStatus.read(submitted.run_dir)
    assert status is not None and (status.state, status.exit_code) == ("failed", 1)
    assert "ValueError" in status.message and "words of a library" not in status.message
    assert "words of a library" in (submitted.run_dir / LOG_FILE).read_text()
