"""The local-only reference of a federation: figures as in a simulation, and no adapter leaves its site."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import answer_all
from flwr.app import Context, RecordDict

from quorate.client.site.request import Request, failed
from quorate.client.site.site import Site
from quorate.server.exchange.join import request
from quorate.server.federation.flower_app import FEDERATION, LOG_FILE, app
from quorate.server.federation.folder import FederationFolder
from quorate.server.federation.nodes import Nodes, SiteNode
from quorate.server.report import write_report
from quorate.server.rounds.run import Run
from quorate.server.tracking.records import Summary
from quorate.shared.config.read import dump_yaml
from quorate.shared.errors import RequestRefused
from quorate.shared.protocol.messages import RECORD, RoundRequest, Update
from quorate.simulations.in_process_grid import FIRST_SITE_NODE, InProcessGrid
from quorate.simulations.runner import simulate

RUN_ID = "0123456789abcdef"
BOTH = {"references": ["local_only", "centralised"]}


class Watched(InProcessGrid):
    """Notes every message that goes to a site, and every reply."""

    sent: list[Any]
    received: list[Any]

    def push_messages(self, messages: Any) -> Any:
        pushed = list(messages)
        Watched.sent += pushed
        return super().push_messages(pushed)

    def pull_messages(self, message_ids: Any) -> Any:
        for message in super().pull_messages(message_ids):
            Watched.received.append(message)
            yield message


@pytest.fixture
def federated(make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Carry out a run as a SuperExec would; returns its folder, its configuration and the sites' rows."""

    def make(kind: type[Site] = Site, **changes: Any) -> tuple[Path, Any, Any]:
        Watched.sent, Watched.received = [], []
        rows = make_sites(north=12, south=7, west=4)
        site = kind(rows, received=tmp_path / "received")
        folder = FederationFolder(tmp_path / "federation")
        run_dir = folder.runs / RUN_ID
        run_dir.mkdir(parents=True)
        config = site.prepare(make_run(**changes))
        (run_dir / "run.yaml").write_text(dump_yaml(config))
        nodes = {
            FIRST_SITE_NODE + index: SiteNode(site=each, key="0" * 64)
            for index, each in enumerate(site.names)
        }
        Nodes(nodes=nodes).write(folder)
        monkeypatch.setenv(FEDERATION, str(folder.path))
        app(Watched(site, site.names), Context(7, 0, {}, RecordDict(), {"run": RUN_ID}))
        return run_dir, config, rows

    return make


def summary_in(folder: Path) -> Summary:
    return Summary.model_validate_json((folder / "summary.json").read_text())


@pytest.mark.parametrize(
    "rule", ["fedex", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("fedavg", "ffa"))]
)
def test_figures_are_those_of_the_simulation_at_home(federated: Any, tmp_path: Path, rule: str) -> None:
    changes = {"aggregation": {"name": rule}, "federation": {"rounds": 3}, "evaluation": {**BOTH, "every": 2}}
    run_dir, config, rows = federated(**changes)
    simulated = simulate(config, rows, tmp_path / "simulated").references
    found = summary_in(run_dir)
    assert simulated is not None and found.references is not None
    assert found.references.failed == {} and found.references.centralised is None
    assert "centralised: only a simulation has all rows" in (run_dir / LOG_FILE).read_text()
    for site in rows:
        ours, theirs = found.references.local_only[site], simulated.local_only[site]
        assert ours.round == theirs.round and ours.test is not None and theirs.test is not None
        assert list(ours.test.sites) == [site]
        here, there = ours.test.sites[site], theirs.test.sites[site]
        assert here["confusion"] == there["confusion"]
        assert here["loss"] == pytest.approx(there["loss"], abs=1e-5)  # there all sites are stacked
    assert found.worth.keys() == rows.keys()
    page = write_report(run_dir).read_text()
    assert "Gain of federating" in page and "Every adapter on everybody" not in page
    text = (tmp_path / "received" / RUN_ID / "report.md").read_text()
    assert "An adapter trained on the rows of west alone" in text
    assert "The federation's: " in text and found.worth["west"].interval is None, "of a few rows"


def test_no_adapter_of_a_site_alone_travels(federated: Any) -> None:
    federated(evaluation=BOTH)
    asked = [
        RoundRequest.decode(bytes(m.content.array_records[RECORD]["message"].data)) for m in Watched.sent
    ]
    alone = [each for each in asked if each.header.phase == "alone"]
    assert sorted(each.header.site for each in alone) == ["north", "south", "west"]
    assert all(not each.arrays for each in alone)
    phases: dict[str, list[Update]] = {}
    for message in Watched.received:
        update = Update.decode(bytes(message.content.array_records[RECORD]["message"].data))
        phases.setdefault(update.header.phase, []).append(update)
    assert len(phases["alone"]) == 3
    for update in phases["alone"]:
        assert (
            not update.arrays
            and update.header.outcomes is not None
            and update.header.metrics.keys() == {"best_round"}
        )


def test_a_site_that_cannot_is_left_out_and_named(federated: Any) -> None:
    class Withdrawn(Site):
        """People at one site have taken it out of the run after its rounds."""

        def handle_many(self, requests: Sequence[Request]) -> list[Update]:
            return [answer for asked in requests for answer in self._one(asked)]

        def _one(self, asked: Request) -> list[Update]:
            if (asked.header.phase, asked.header.site) == ("alone", "south"):
                return [failed(asked, RequestRefused("withdrawn", code="withdrawn"))]
            return super().handle_many([asked])

    run_dir, _, _rows = federated(Withdrawn, evaluation={"references": ["local_only"]})
    found = summary_in(run_dir)
    assert found.references is not None
    assert found.references.local_only.keys() == found.worth.keys() == {"north", "west"}
    assert found.references.failed["south"].code == "withdrawn"
    assert "south has no local-only reference" in (run_dir / LOG_FILE).read_text()


def test_training_alone_is_not_asked_of_a_private_run(make_run: Any, make_sites: Any, tmp_path: Path) -> None:
    site = Site(make_sites(north=9))
    private = make_run(
        privacy={"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3},
        aggregation={"name": "fedavg", "weighting": "uniform"},
    )
    run = Run(site.prepare(private), tmp_path, RUN_ID)
    (answer,) = answer_all(site, [request(run, 0, "alone", "north")])
    assert answer.header.error == "policy-privacy"
