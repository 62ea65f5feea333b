"""The privacy ledger before a real site: what it pays for, what it refuses, what an interruption costs."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from site_folder import RUN_ID, request, sha256_of, write_folder

from quorate.client.health.site_check import Line, check
from quorate.client.node.folder import SiteFolder
from quorate.client.policy.answer_store import ANSWERS_FILE
from quorate.client.policy.gate import Gate
from quorate.client.privacy.ledger import Ledger
from quorate.client.privacy.ledger_records import Commit, Reservation
from quorate.client.privacy.ledger_verify import Anchor, verify
from quorate.client.process.chain import build_chain
from quorate.client.site.device_errors import OUT_OF_MEMORY
from quorate.client.site.request import Request
from quorate.client.site.site import Site
from quorate.client.site.site_data import SiteData
from quorate.server.exchange.exclusions import REASONS
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.read import dump_yaml
from quorate.shared.errors import NonFiniteUpdate
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.progress import StepEvent
from quorate.shared.protocol.messages import RoundRequest, Update

STEPS = 3
PRIVATE = {"unit": "record", "noise_multiplier": 1.0}
DELTA = 1e-5


class Interrupted(BaseException):
    """A process that ends here and now, as `Stopped` and a kill do."""


class World:
    """A site's folder, and the handlers before a real site as `serve` nests them."""

    def __init__(self, folder: SiteFolder) -> None:
        self.folder = folder
        self.steps = 0
        self.on_step: Callable[[], None] = lambda: None
        self.start()

    def start(self) -> None:
        at_site = SiteData(self.folder)
        self.site = Site(at_site, on_step=self._step)
        self.chain = build_chain(self.folder, at_site, self.site)
        self.gate = Gate(self.folder.config, self.folder.state, self.chain.accounted)

    def stop(self) -> None:
        self.chain.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def configure(self, **fields: Any) -> None:
        """Change site.yaml, and start again."""
        path = self.folder.path / "site.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **fields}))
        self.stop()
        self.folder = SiteFolder.find(self.folder.path)
        self.start()

    def _step(self, event: StepEvent) -> None:
        self.steps += event.taken
        if event.taken:
            self.on_step()

    def ask(self, asked: RoundRequest) -> Update:
        return self.gate.handle(Request.decode(asked.encoded))

    def rows(self) -> tuple[Reservation | Commit, ...]:
        """The ledger as somebody else sees it."""
        verdict = verify(self.folder.ledger / "ledger.db", Anchor(self.folder.anchor / "ledger.head"))
        assert not verdict.findings
        return verdict.rows

    def counts(self) -> tuple[int, int]:
        """Reservations and commits."""
        spent = sum(isinstance(row, Reservation) for row in self.rows())
        return spent, len(self.rows()) - spent


def budget(**fields: Any) -> dict[str, Any]:
    return {"privacy_budgets": [{"data": "notes", "delta": DELTA, "max_epsilon": 1000.0, **fields}]}


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path) -> Iterator[Any]:
    worlds: list[World] = []

    def make(**policy: Any) -> World:
        folder = write_folder(tmp_path / "kit", tiny_bert, **policy)
        folder.state.mkdir()
        worlds.append(World(folder))
        return worlds[0]

    yield make
    for each in worlds:
        each.stop()


@pytest.fixture
def private(tiny_bert: Path, make_run: Any) -> Any:
    def make(rounds: int = 3, **sections: Any) -> Any:
        model = {"sha256": sha256_of(tiny_bert)}
        sections = {"privacy": PRIVATE, **sections}
        return make_run(federation={"rounds": rounds}, model=model, **sections)

    return make


def start(value: float) -> Adapter:
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"
    return Adapter({name: np.full((32, 4), value, np.float32)})


def test_it_is_reserved_before_the_first_step_and_committed_before_it_goes(world: Any, private: Any) -> None:
    site, seen = world(), []
    site.on_step = lambda: seen.append(site.counts())
    update = site.ask(request(private()))
    assert update.header.error is None
    assert seen == [(1, 0)] * STEPS and site.counts() == (1, 1)
    reserved, committed = site.rows()
    assert reserved.request.run_id == RUN_ID and reserved.request.round == 1
    assert (reserved.event.steps, reserved.event.noise_multiplier) == (STEPS, 1.0)
    assert reserved.protects.places == (str(site.folder.path / "notes.csv"),)
    assert committed.answer == hashlib.sha256(update.encoded).hexdigest()


def test_the_same_request_costs_once(world: Any, private: Any) -> None:
    site = world()
    first = site.ask(request(private()))
    site.restart()
    assert site.ask(request(private())).encoded == first.encoded
    assert site.counts() == (1, 1) and site.steps == STEPS


def test_what_trains_nothing_costs_nothing(world: Any, private: Any) -> None:
    site = world()
    assert site.ask(request(private(), "join", 0)).header.error is None
    assert site.ask(request(private(), "evaluate", split="test")).header.error is None
    assert site.ask(request(private(), arrays=Adapter({"elsewhere": np.zeros(2, np.float32)}))).header.error
    assert site.counts()[1] == 0 and site.steps == 0
    site.ask(request(private(), round=2))
    before = site.counts()
    assert site.ask(request(private(), round=1)).header.error == "outdated"
    assert site.ask(request(private(), round=2, arrays=start(1))).header.error == "conflict"
    assert site.ask(request(private(rounds=4), round=2)).header.error == "other-config"
    assert site.counts() == before, "nor does what is refused"


def test_a_run_without_privacy_makes_no_ledger(world: Any, private: Any) -> None:
    site = world()
    assert site.ask(request(private(privacy=None))).header.error is None
    assert not site.folder.ledger.exists() and not site.folder.anchor.exists()


# Interruptions


def test_a_training_cut_short_is_paid_for_once(world: Any, private: Any) -> None:
    site = world()

    def stop() -> None:
        raise Interrupted

    site.on_step = stop
    with pytest.raises(Interrupted):
        site.ask(request(private()))
    assert site.counts() == (1, 0), "it counts until it is known what comes of it"
    site.on_step = lambda: None
    site.restart()
    assert site.ask(request(private())).header.error is None
    assert site.counts() == (1, 1)


def test_a_training_that_fails_keeps_its_reservation(world: Any, private: Any) -> None:
    site = world()

    def fail() -> None:
        raise MemoryError("no more")

    site.on_step = fail
    for _ in range(3):
        assert site.ask(request(private())).header.error == OUT_OF_MEMORY
        assert site.counts() == (1, 0)
    site.on_step = lambda: None
    assert site.ask(request(private())).header.error is None
    assert site.counts() == (1, 1)


def test_a_kill_between_storing_and_committing(world: Any, private: Any, monkeypatch: Any) -> None:
    site = world()

    def stop(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "commit", stop)
        with pytest.raises(Interrupted):
            site.ask(request(private()))
    assert site.counts() == (1, 0) and site.steps == STEPS
    site.restart()
    update = site.ask(request(private()))
    assert site.counts() == (1, 1) and site.steps == STEPS, "the stored answer, paid for once"
    with sqlite3.connect(site.folder.state / ANSWERS_FILE) as db:
        assert db.execute("SELECT message FROM answers").fetchall() == [(update.encoded,)]


def test_a_diverged_training_says_something_and_is_paid_for(world: Any, private: Any) -> None:
    site = world()

    def diverge() -> None:
        raise NonFiniteUpdate("training diverged.")

    site.on_step = diverge
    assert site.ask(request(private())).header.error == "non-finite"
    assert site.counts() == (1, 1)
    site.on_step = lambda: None
    assert site.ask(request(private())).header.error is None
    assert site.counts() == (2, 2), "a second training of the same request is a second look at the data"


def test_without_its_stored_answers_a_site_pays_again(world: Any, private: Any) -> None:
    site = world()
    site.ask(request(private()))
    site.stop()
    for path in site.folder.state.glob(f"{ANSWERS_FILE}*"):
        path.unlink()
    site.start()
    assert site.ask(request(private())).header.error is None
    assert site.counts() == (2, 2) and site.steps == 2 * STEPS


def test_without_its_ledger_a_stored_answer_is_paid_for(world: Any, private: Any) -> None:
    site = world()
    first = site.ask(request(private()))
    site.stop()
    for path in (*site.folder.ledger.iterdir(), site.folder.anchor / "ledger.head"):
        path.unlink()
    site.start()
    assert site.ask(request(private())).encoded == first.encoded
    assert site.counts() == (1, 1) and site.steps == STEPS


def test_no_training_beyond_the_claim(world: Any, private: Any, caplog: Any) -> None:
    """Without any budget, too: a site said what all rounds cost, and one that diverged is one of them."""
    site = world()

    def diverge() -> None:
        raise NonFiniteUpdate("training diverged.")

    site.on_step = diverge
    assert site.ask(request(private(2))).header.error == "non-finite"
    site.on_step = lambda: None
    assert site.ask(request(private(2))).header.error is None
    assert site.ask(request(private(2), round=2)).header.error == "policy-privacy"
    assert "has trained 2 times for the run, and its claim counts 2" in caplog.text
    assert site.counts() == (2, 2)
    assert site.ask(request(private(2))).header.error is None, "what was answered is given again"
    assert site.ask(request(private(2), run_id="another")).header.error is None


def test_no_training_on_other_rows_than_the_claim_is_of(world: Any, private: Any, caplog: Any) -> None:
    """Fewer rows are drawn oftener: what rounds cost together is then no longer what the site said."""
    site = world()
    assert site.ask(request(private(2), "join", 0)).header.error is None
    assert site.ask(request(private(2))).header.error is None
    path = site.folder.path / "notes.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:46]))
    site.restart()
    assert site.ask(request(private(2), "join", 0)).header.error == "policy-privacy"
    assert site.ask(request(private(2), round=2)).header.error == "policy-privacy"
    assert "another number of training rows" in caplog.text
    assert site.counts() == (1, 1)
    assert site.ask(request(private(2))).header.error is None, "what was answered is given again"
    assert site.ask(request(private(2), "join", 0, run_id="another")).header.error is None
    assert site.ask(request(private(2), run_id="another")).header.error is None


# Budgets


def cost(site: World, run: Any, rounds: int) -> float:
    """Epsilon of some rounds of a run at the site."""
    event = SiteData(site.folder).spending(run).over(rounds)
    return epsilon([event], DELTA)


def test_a_run_that_fits_to_the_last_round_and_one_round_more_does_not(
    world: Any, private: Any, caplog: Any
) -> None:
    site = world(**budget())
    site.configure(policy=budget(max_epsilon=cost(site, private(3), 3)))
    assert site.ask(request(private(4), "join", 0)).header.error == "policy-budget"
    assert "policy.privacy_budgets: data.notes may spend epsilon" in caplog.text
    assert "0 is spent, and with the 12 steps asked for" in caplog.text
    assert site.ask(request(private(3), "join", 0, run_id="a")).header.error is None
    for round in (1, 2, 3):
        assert site.ask(request(private(3), round=round, run_id="a")).header.error is None
        assert site.ask(request(private(3), "join", 0, run_id="a")).header.error is None, "as if resumed"
    assert site.steps == 3 * STEPS
    for phase, round in (("join", 0), ("fit", 1)):
        assert site.ask(request(private(1), phase, round, run_id="b")).header.error == "policy-budget"
    assert site.steps == 3 * STEPS and site.counts() == (3, 3), "refused before training"
    assert "policy-budget" in REASONS and "ledger" in REASONS and "policy-privacy" in REASONS


def test_a_run_that_does_not_join_is_held_against_the_budget_as_a_whole(world: Any, private: Any) -> None:
    site = world(**budget())
    site.configure(policy=budget(max_epsilon=cost(site, private(3), 2)))
    assert site.ask(request(private(3))).header.error == "policy-budget", "before anything is spent"
    assert site.steps == 0 and site.counts() == (0, 0)
    assert site.ask(request(private(2), run_id="b")).header.error is None


def test_aliases_of_one_source_share_its_budget(world: Any, private: Any) -> None:
    site = world(**budget())
    (site.folder.path / "link.csv").symlink_to("notes.csv")
    same = {"source": "notes.csv"}
    site.configure(
        data={"notes": same, "again": {"source": "./notes.csv"}, "link": {"source": "link.csv"}},
        policy=budget(max_epsilon=cost(site, private(2), 2)),
    )
    assert site.ask(request(private(1), run_id="a")).header.error is None
    assert site.ask(request(private(1, data="again"), run_id="b")).header.error is None
    assert site.ask(request(private(1, data="link"), run_id="c")).header.error == "policy-budget"
    assert site.counts() == (2, 2)


def test_data_with_a_budget_are_closed_to_runs_that_no_budget_covers(
    world: Any, private: Any, caplog: Any
) -> None:
    site = world(**budget())
    for phase, round in (("join", 0), ("fit", 1)):
        assert site.ask(request(private(privacy=None), phase, round)).header.error == "policy-privacy"
    group = {"unit": "group", "noise_multiplier": 1.0}
    assert site.ask(request(private(privacy=group), "join", 0, run_id="g")).header.error == "policy-budget"
    assert "has budgets for data.notes by record, the run protects by group" in caplog.text
    assert site.steps == 0


@pytest.mark.parametrize("policy", [budget(), {"require_privacy": True}], ids=["budget", "required"])
def test_noise_at_the_server_is_none_at_the_site(world: Any, private: Any, policy: Any) -> None:
    client = {"unit": "client", "delta": 0.01, "noise_multiplier": 1.0}
    run = private(privacy=client, aggregation={"name": "fedavg", "weighting": "uniform"})
    site = world(**policy)
    for phase, round in (("join", 0), ("fit", 1)):
        assert site.ask(request(run, phase, round)).header.error == "policy-privacy"
    assert site.steps == 0


def test_a_site_may_ask_for_privacy(world: Any, private: Any) -> None:
    site = world(require_privacy=True)
    assert site.ask(request(private(privacy=None), "join", 0)).header.error == "policy-privacy"
    assert site.ask(request(private(), run_id="p")).header.error is None


def test_a_cap_that_is_lowered_stops_what_was_reserved(world: Any, private: Any) -> None:
    site = world(**budget())

    def stop() -> None:
        raise Interrupted

    site.on_step = stop
    with pytest.raises(Interrupted):
        site.ask(request(private(1)))
    site.on_step = lambda: None
    site.configure(policy=budget(max_epsilon=cost(site, private(1), 1) * 0.99))
    assert site.ask(request(private(1))).header.error == "policy-budget"
    site.configure(policy=budget(max_epsilon=cost(site, private(1), 1)))
    assert site.ask(request(private(1))).header.error is None
    assert site.counts() == (1, 1)


# Ledgers that are not as they should be


def test_a_ledger_that_was_tampered_with_refuses_private_runs_alone(
    world: Any, private: Any, caplog: Any
) -> None:
    site = world()
    site.ask(request(private()))
    site.stop()
    for path in site.folder.ledger.iterdir():
        path.unlink()
    caplog.clear()
    site.start()
    assert "rows 1 to 2 are missing" in caplog.text, "said at the start"
    assert site.ask(request(private(), "join", 0)).header.error == "ledger"
    assert site.ask(request(private(), round=2)).header.error == "ledger"
    assert site.steps == STEPS
    assert site.ask(request(private(privacy=None), run_id="open")).header.error is None
    (site.folder.anchor / "ledger.head").unlink()
    assert site.ask(request(private(), round=2)).header.error is None, "people began a new one"


def test_what_cannot_be_written_down_does_not_leave(world: Any, private: Any) -> None:
    site = world()
    site.ask(request(private()))
    with sqlite3.connect(site.folder.ledger / "ledger.db") as db:
        db.execute("CREATE TRIGGER full BEFORE INSERT ON rows BEGIN SELECT RAISE(FAIL, 'disk full'); END")
    update = site.ask(request(private(), round=2))
    assert update.header.error == "output" and len(update.arrays) == 0 and site.steps == STEPS
    with sqlite3.connect(site.folder.ledger / "ledger.db") as db:
        db.execute("DROP TRIGGER full")
    assert site.ask(request(private(), round=2)).header.error is None
    assert site.counts() == (2, 2)


def test_the_anchor_must_be_elsewhere_and_there(world: Any, private: Any, caplog: Any) -> None:
    site = world()
    site.configure(anchor="state/heads")
    assert site.ask(request(private())).header.error == "config"
    assert "puts back its heads too; name a folder elsewhere" in caplog.text
    site.configure(anchor="chosen")
    assert site.ask(request(private())).header.error == "config"
    assert "there is no folder" in caplog.text and site.steps == 0
    (site.folder.path / "chosen").mkdir()
    assert site.ask(request(private())).header.error is None
    assert (site.folder.path / "chosen" / "ledger.head").is_file()


def test_site_check_holds_a_run_against_ledger_and_budgets(world: Any, private: Any, tmp_path: Path) -> None:
    site = world(**budget())
    site.configure(policy=budget(max_epsilon=cost(site, private(2), 2)))

    def found(run: Any) -> dict[str, Line]:
        (tmp_path / "run.yaml").write_text(dump_yaml(run))
        return {line.what: line for line in check(site.folder.path, tmp_path / "run.yaml")}

    fits, too_long, bare = found(private(2)), found(private(3)), found(private(privacy=None))
    assert fits["ledger"].ok and fits["run run.yaml"].ok, fits
    assert "1 privacy budgets; 0 rows in the ledger" in fits["ledger"].found
    assert not too_long["run run.yaml"].ok and "9 steps asked for" in too_long["run run.yaml"].found
    assert not bare["run run.yaml"].ok and "no budget covers" in bare["run run.yaml"].found
    site.ask(request(private(2)))
    site.stop()
    (site.folder.ledger / "ledger.db").unlink()
    assert "rows 1 to 2 are missing" in found(private(2))["ledger"].found
