"""The end of a run at its sites: adapter and report, nothing of other sites, and no run that fails by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import ClientAppGrid, answer_all
from flwr.app import Error, Message

from quorate.client.site.delivered import report
from quorate.client.site.site import Site
from quorate.server.exchange import patience
from quorate.server.exchange.join import request
from quorate.server.results.deliver import deliver, delivery
from quorate.server.results.outputs import measure, write_outputs
from quorate.server.rounds.loop import Result, run_rounds
from quorate.server.rounds.run import Run
from quorate.server.tracking.records import Evaluation, LocalGain, Measured, Summary
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.privacy.rounding import at_most
from quorate.shared.protocol.messages import Delivery, RoundRequest
from quorate.simulations.in_process_grid import InProcessGrid

FILES = ("adapter_model.safetensors", "adapter_config.json", "run.yaml")


def finished(run: Run, site: Site) -> tuple[InProcessGrid, Result, Summary]:
    grid = InProcessGrid(site, site.names)
    result = run_rounds(grid, run)
    final, best, _ = measure(grid, run, result)
    return grid, result, write_outputs(run, result, final, best)


@pytest.mark.parametrize("rule", ["fedavg", "fedex", "ffa"])
def test_a_site_gets_the_very_adapter_that_the_run_exports(
    make_run: Any, make_sites: Any, tmp_path: Path, rule: str
) -> None:
    site = Site(make_sites(north=9, south=7, west=6), received=tmp_path / "received")
    run = Run.open(site.prepare(make_run(aggregation={"name": rule})), tmp_path / "out")
    grid, result, summary = finished(run, site)
    assert deliver(grid, run, result, summary) == {}
    kept = tmp_path / "received" / run.run_id
    for name in FILES:
        assert (kept / "adapter" / name).read_bytes() == (tmp_path / "out" / "adapter" / name).read_bytes()
    assert (tmp_path / "received").stat().st_mode & 0o077 == 0
    text = (kept / "report.md").read_text()
    assert summary.best is not None and summary.best.test is not None
    # One process holds all three here, so the last of them has written the report.
    own, pooled = summary.best.test.sites["west"]["macro_f1"], summary.best.test.pooled["macro_f1"]
    assert f"| macro_f1 | {own:.4f} | {pooled:.4f} |" in text
    assert "| test rows | this site (11) | 3 sites together (33) |" in text
    assert "north" not in text and "south" not in text


@pytest.mark.parametrize(
    ("privacy", "says"),
    [
        (None, "None is claimed: no noise was added"),
        (
            {"unit": "record", "target_epsilon": 5, "delta": 1e-3},
            "This site's own claim, by noise added here: (5, 0.001)-differential privacy for each of 6 rec",
        ),
        (
            {"unit": "client", "noise_multiplier": 1.5, "delta": 1e-3},
            "For each whole site, as the coordinator claims: epsilon {epsilon}, delta 0.001",
        ),
    ],
)
def test_a_site_is_told_of_its_privacy(
    make_run: Any, make_sites: Any, tmp_path: Path, privacy: dict[str, Any] | None, says: str
) -> None:
    rows = make_sites(north=9, west=6)
    site = Site(rows, received=tmp_path / "received")
    rule = {"name": "fedavg", "weighting": "uniform"}
    run = Run.open(site.prepare(make_run(privacy=privacy, aggregation=rule)), tmp_path / "out")
    grid, result, summary = finished(run, site)
    assert deliver(grid, run, result, summary) == {}
    text = (tmp_path / "received" / run.run_id / "report.md").read_text()
    claimed = at_most(summary.client_privacy.epsilon) if summary.client_privacy else ""
    assert says.format(epsilon=claimed) in text
    assert ("by privacy loss distributions" in text) == ("all rounds of this run" in text) == bool(privacy)

    if privacy and privacy["unit"] == "record":  # rows that are gone at the end do not cost the result
        rows["west"] = {}
        assert deliver(grid, run, result, summary) == {}
        text = (tmp_path / "received" / run.run_id / "report.md").read_text()
        assert "could not be worked out again now" in text and "own claim" not in text


def test_a_site_that_cannot_take_the_result_answers_with_a_code_and_the_run_stands(
    make_run: Any, make_sites: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    site = Site(make_sites(north=9, south=7), received=tmp_path / "file" / "received")
    run = Run.open(site.prepare(make_run(federation={"rounds": 1})), tmp_path / "out")
    grid, result, summary = finished(run, site)
    failed = deliver(grid, run, result, summary)
    assert {name: why.code for name, why in failed.items()} == {"north": "output", "south": "output"}
    assert "north did not take the result" in caplog.text

    site._received_dir = None
    assert {why.code for why in deliver(grid, run, result, summary).values()} == {"refused"}


def test_a_site_that_is_away_at_the_end_is_asked_again(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_FIRST_REASK", 0.05)
    site = Site(make_sites(north=9, south=7), received=tmp_path / "received")
    federation = {"rounds": 1, "reask_seconds": 60}
    run = Run.open(site.prepare(make_run(federation=federation)), tmp_path / "out")
    _, result, summary = finished(run, site)

    class Away(InProcessGrid):
        """Its first messages reach nobody, as while a SuperNode starts again."""

        away = True

        def push_messages(self, messages: Any) -> Any:
            self.asked = list(messages)
            return super().push_messages(self.asked)

        def pull_messages(self, message_ids: Any) -> Any:
            if not self.away:
                return super().pull_messages(message_ids)
            self.away = False
            return [Message(Error(3, "node is not available"), reply_to=each) for each in self.asked]

    assert deliver(Away(site, site.names), run, result, summary) == {}
    assert (tmp_path / "received" / run.run_id / "report.md").is_file()


@pytest.mark.parametrize("run_id", ["../../../../tmp/evil", "0123456789abcdeF", "", "/etc"])
def test_a_run_id_from_elsewhere_names_no_other_folder(
    make_run: Any, make_sites: Any, tmp_path: Path, run_id: str
) -> None:
    site = Site(make_sites(north=9), received=tmp_path / "received")
    run = Run(site.prepare(make_run()), tmp_path / "out", run_id)
    (joined,) = answer_all(site, [request(run, 0, "join", "north", Adapter({}))])
    asked = request(run, 1, "finish", "north", joined.arrays)
    header = asked.header.model_copy(update={"delivery": Delivery(rounds=1, best_round=1, metric="loss")})
    (answer,) = answer_all(site, [RoundRequest(header, joined.arrays)])
    assert answer.header.error == "protocol"
    assert list(tmp_path.iterdir()) == []


def measured(sites: tuple[str, ...]) -> Measured:
    return Measured(
        round=2,
        test=Evaluation(
            split="test",
            pooled={"accuracy": 0.5, "loss": float("nan"), "confusion": [[1, 2], [3, 4]]},
            mean={"accuracy": 0.5},
            sites={name: {"accuracy": 0.1 * (index + 1)} for index, name in enumerate(sites)},
            rows=dict.fromkeys(sites, 10),
        ),
    )


def summary_of(*sites: str, **fields: Any) -> Summary:
    return Summary.model_validate(
        {
            "name": "trial",
            "run_id": "0" * 16,
            "status": "done",
            "rounds": 3,
            "metric": "accuracy",
            "seed": 0,
            "config_hash": "0" * 64,
            "best": measured(sites),
            "bytes": {"total": 0},
            "seconds": {"total": 0},
            "versions": {},
            **fields,
        }
    )


def test_a_site_is_told_pooled_figures_and_its_own_and_two_sites_no_pooled_ones() -> None:
    told = delivery(summary_of("a", "b", "c"), "b")
    assert (told.own, told.own_rows) == ({"accuracy": 0.2}, 10)
    assert (told.pooled, told.pooled_rows, told.sites) == ({"accuracy": 0.5}, 30, 3)  # no NaN, no confusion
    two = delivery(summary_of("a", "b"), "b")
    assert (two.own, two.pooled, two.pooled_rows) == ({"accuracy": 0.2}, {}, 0)
    away = delivery(summary_of("a", "b", "c"), "d")
    assert (away.own, away.own_rows, away.pooled) == ({}, 0, {"accuracy": 0.5})
    assert delivery(summary_of(best=None), "a").split is None


def test_the_report_says_what_the_federation_brought(make_run: Any) -> None:
    worth = LocalGain(metric="accuracy", federated=0.2, local_only=0.15, gain=0.05, interval=(-0.01, 0.11))
    told = delivery(summary_of("a", "b", worth={"b": worth}), "b")
    text = report(make_run(), "0" * 16, "b", told)
    assert "on the rows of b alone: accuracy 0.1500" in text
    assert "+0.0500 (95 % interval -0.0100 to +0.1100)" in text
    assert "work out the other's" in text


def test_clients_app_takes_the_phase(make_run: Any, make_sites: Any, tmp_path: Path) -> None:
    """As in production, where every message goes through the ClientApp as a query."""
    site = Site(make_sites(north=9), received=tmp_path / "received")
    run = Run.open(site.prepare(make_run(federation={"rounds": 1})), tmp_path / "out")
    _, result, summary = finished(run, site)
    assert deliver(ClientAppGrid(site, site.names), run, result, summary) == {}
    assert (tmp_path / "received" / run.run_id / "adapter" / FILES[0]).is_file()
