"""Privacy in a run file and at a site: what is refused, what is said, what stays."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
from engines import answer_all
from pydantic import ValidationError
from refusals import refuses
from tampered import described

from quorate.client.data.mapping import LoadedRow
from quorate.client.data.splits import load_splits
from quorate.client.site.site import Site
from quorate.deploy.cli import run as run_command
from quorate.server.exchange.join import request
from quorate.server.privacy import central_plan
from quorate.server.rounds.run import Run
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.aggregation import FedAvg
from quorate.shared.config.evaluation_config import EvaluationConfig
from quorate.shared.config.load import load_run
from quorate.shared.config.privacy_config import ClientPrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.config.sites_config import SitesConfig, SourceConfig
from quorate.shared.errors import ConfigError, DataError, QuorumNotMet
from quorate.shared.protocol.messages import RoundRequest
from quorate.shared.protocol.phases import Phase
from quorate.shared.tasks.task import Row
from quorate.simulations.baselines import pool
from quorate.simulations.runner import SimulationOptions, simulate
from quorate.simulations.simulated_sites import load_sites

RECORD = {"unit": "record", "noise_multiplier": 1.0}
GROUP = {"unit": "group", "noise_multiplier": 1.0, "max_records_per_group": 2}


# What is refused beside privacy, with the remedy.


def assert_refused(error: ValidationError, *facts: str) -> None:
    """Assert that a rule for the run as a whole refused, and that it names these."""
    (found,) = error.errors()
    assert (found["loc"], found["type"]) == ((), "value_error")
    assert all(fact in found["msg"] for fact in facts), found["msg"]


@pytest.mark.parametrize("unit", [RECORD, GROUP], ids=["record", "group"])
@pytest.mark.parametrize(
    ("sections", "setting", "instead"),
    [
        ({"training": {"sampling": "balanced"}}, "training.sampling balanced", "shuffle"),
        ({"training": {"examples_per_class": 5}}, "training.examples_per_class", ""),
        ({"training": {"base_dropout": True}}, "training.base_dropout", "adapter.lora_dropout"),
        ({"task": {"class_weights": "balanced"}}, "task.class_weights balanced", "none"),
        ({"model": {"load_in_8bit": True}}, "model.load_in_8bit", "load_in_4bit"),
    ],
)
def test_settings_that_break_the_claim_are_refused(
    make_run: Any, unit: Any, sections: Any, setting: str, instead: str
) -> None:
    make_run(**sections)
    with pytest.raises(ValidationError) as caught:
        make_run(**sections, privacy=unit)
    assert_refused(caught.value, f"privacy.unit {unit['unit']}: {setting} ", instead)


@pytest.mark.parametrize(
    ("sections", "setting", "instead"),
    [
        ({}, "task.loss_weighting tokens", "examples"),
        ({"task": {"loss_weighting": "examples", "packing": True}}, "task.packing", "false"),
        (
            {
                "task": {"loss_weighting": "examples"},
                "aggregation": {"name": "fedavg", "weighting": "tokens"},
            },
            "aggregation.weighting tokens",
            "examples or uniform",
        ),
    ],
)
def test_settings_of_language_models_that_break_the_claim_are_refused(
    sections: Any, setting: str, instead: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        tiny_lm.lm_run(Path("x"), **sections, privacy=RECORD)
    assert_refused(caught.value, f"privacy.unit record: {setting} ", instead)
    tiny_lm.lm_run(Path("x"), task={"loss_weighting": "examples"}, privacy=RECORD)


def test_weights_of_tags_are_refused(make_run: Any) -> None:
    task = {
        "name": "token_classification",
        "labels": ["O", "B-x"],
        "class_weights": "balanced",
        "max_length": 9,
    }
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({**make_run().model_dump(), "task": task, "privacy": RECORD})
    assert_refused(caught.value, "privacy.unit record: task.class_weights balanced ", "none")


@pytest.mark.parametrize(
    ("privacy", "setting"),
    [
        ({**RECORD, "max_records_per_group": 2}, "privacy.max_records_per_group "),
        (
            {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3},
            "privacy.unit client: aggregation.weighting examples ",
        ),
    ],
)
def test_privacy_that_does_not_fit_the_run_is_refused(make_run: Any, privacy: Any, setting: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_run(privacy=privacy)
    assert_refused(caught.value, setting)


@pytest.mark.parametrize(
    ("privacy", "place", "kind"),
    [
        ({**RECORD, "target_epsilon": 3}, (), "value_error"),
        ({"unit": "record"}, (), "value_error"),
        ({"unit": "record", "noise_multiplier": 1e30}, ("noise_multiplier",), "less_than_equal"),
        ({**RECORD, "delta": 1e-300}, ("delta",), "greater_than_equal"),
        ({**RECORD, "max_grad_norm": 1e30}, ("max_grad_norm",), "less_than_equal"),
    ],
)
def test_privacy_that_contradicts_itself_is_refused(
    make_run: Any, privacy: Any, place: tuple[str, ...], kind: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        make_run(privacy=privacy)
    (found,) = caught.value.errors()
    assert (found["loc"], found["type"]) == (("privacy", "record", *place), kind)


def test_what_is_sound_stays_allowed(make_run: Any) -> None:
    sound = {
        "model": {"load_in_4bit": True},
        "task": {"class_weights": [1, 2, 3], "label_smoothing": 0.1, "token_dropout": 0.1},
        "adapter": {"use_dora": True, "lora_dropout": 0.1},
        "training": {"gradient_checkpointing": True, "freeze_layers": 1, "optim": "adafactor"},
    }
    assert make_run(**sound, privacy=RECORD).privacy is not None
    assert make_run().privacy is None


# Groups.


def write_visits(folder: Path, patients: list[Any], name: str = "train.jsonl") -> Path:
    lines = [
        json.dumps({"text": f"heart pain {index}", "label": index % 2, "patient": patient})
        for index, patient in enumerate(patients)
    ]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def load(folder: Path, **fields: Any) -> dict[str, list[LoadedRow]]:
    source = SourceConfig(source=str(folder), columns={"group": "patient"}, **fields)
    return dict(load_splits(source, folder, {"text": "text", "label": "label"}, ("a", "b")))  # type: ignore[arg-type]


def test_a_row_keeps_its_group_as_text_and_gives_it_to_no_task(tmp_path: Path) -> None:
    rows = load(write_visits(tmp_path, [7, 7.0, "7", "x y", 8]), split={"validation": 0, "test": 0})["train"]
    assert [row.group for row in rows] == ["7", "7", "7", "x y", "8"]
    assert all("group" not in row.values and "patient" not in row.values for row in rows)


@pytest.mark.parametrize("nobody", [None, " "])
def test_a_row_without_its_group_is_named(tmp_path: Path, nobody: Any) -> None:
    with refuses(DataError, "no-group", f"{tmp_path}/train.jsonl:2") as caught:
        load(write_visits(tmp_path, [1, nobody, 2]))
    assert "column 'patient'" in str(caught.value)


def test_a_group_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "x", "label": 0}\n')
    with refuses(DataError, "column-missing") as caught:
        load(tmp_path)
    assert "column 'patient'" in str(caught.value)


def test_the_rows_of_a_group_go_to_one_split(tmp_path: Path) -> None:
    patients = [index * 7 % 23 for index in range(120)]
    splits = load(write_visits(tmp_path, patients))
    groups = {split: {row.group for row in rows} for split, rows in splits.items()}
    assert all(groups.values()) and sum(map(len, groups.values())) == 23, "no group is in two splits"
    for rows in splits.values():
        lines = [int(row.source.rpartition(":")[2]) for row in rows]
        assert lines == sorted(lines), "file order stays"


def grouped(rows: list[Row], groups: list[str | None]) -> list[Row]:
    return [Row(row.values, row.source, group=group) for row, group in zip(rows, groups, strict=True)]


def test_groups_reach_the_simulated_sites(make_run: Any, tmp_path: Path) -> None:
    source = {"source": str(write_visits(tmp_path, list(range(12)))), "columns": {"group": "patient"}}
    sites = SitesConfig.model_validate(
        {"data": {"notes": {**source, "partition": {"by": "iid", "sites": 2}}}}
    )
    found = load_sites(sites, tmp_path, make_run())
    rows = [row for site in found.values() for split in site.values() for row in split]
    assert sorted(int(row.group or -1) for row in rows) == list(range(12))
    assert all(set(row.values) == {"text", "label"} for row in rows)


def test_the_same_group_at_two_sites_is_two_groups_in_the_pool(make_run: Any, make_sites: Any) -> None:
    sites = {
        name: {"train": grouped(site["train"], ["1", "2"])} for name, site in make_sites(a=2, b=2).items()
    }
    assert [row.group for row in pool(sites, make_run())["train"]] == ["a/1", "a/2", "b/1", "b/2"]


def test_unit_group_needs_a_group_for_each_row(make_run: Any, make_sites: Any) -> None:
    sites = make_sites(north=8, south=8)
    sites["north"]["train"] = grouped(sites["north"]["train"], list("aabbccdd"))
    with refuses(DataError, "no-group-column", "site south") as caught:
        Site(sites).prepare(make_run(privacy=GROUP))
    assert "data.notes" in str(caught.value) and "`columns: {group: " in str(caught.value)


def test_a_group_that_is_trained_and_measured_on_is_refused(make_run: Any, make_sites: Any) -> None:
    sites = make_sites(north=8)
    sites["north"]["train"] = grouped(sites["north"]["train"], list("aabbccdd"))
    sites["north"]["validation"] = grouped(sites["north"]["validation"], ["d", *"efghijkl"])
    with refuses(DataError, "group-measured-too", "site north") as caught:
        Site(sites).prepare(make_run(privacy=GROUP))
    assert "1 groups" in str(caught.value) and "validation" in str(caught.value)
    Site(sites).prepare(make_run(privacy=RECORD))


# What a site says.


def ask(site: Site, run: RunConfig, folder: Path, phase: Any, split: Any = None) -> Any:
    opened = Run.open(run, folder)
    asked: RoundRequest = request(
        opened, 0 if phase == "join" else 1, phase, site.names[0], Adapter({}), split
    )
    return answer_all(site, [asked])[0].header


def test_a_site_claims_what_it_will_do_and_keeps_counts_to_itself(
    make_run: Any, make_sites: Any, tmp_path: Path
) -> None:
    site = Site(make_sites(north=40))
    run = site.prepare(
        make_run(privacy={"unit": "record", "target_epsilon": 5, "delta": 1e-3, "max_grad_norm": 0.3})
    )
    joined = ask(site, run, tmp_path / "a", "join")
    said = joined.description
    assert said.label_counts == {} and said.notes == () and said.rows["train"] == 40
    claim = said.privacy
    assert (claim.unit, claim.units, claim.delta, claim.accountant) == ("record", 40, 1e-3, "PLD")
    assert (claim.steps, claim.sampling_probability, claim.clipping_norm) == (6, 0.1, 0.3)
    assert 4.9 < claim.epsilon <= 5
    trained = ask(site, run, tmp_path / "b", "fit")
    assert trained.error is None and trained.num_examples == 40 and trained.num_tokens == 0
    assert trained.metrics.keys() == {
        "learning_rate",
        "noise_multiplier",
        "clipping_norm",
        "sampling_probability",
    }
    assert trained.metrics["noise_multiplier"] == claim.noise_multiplier


def test_exact_figures_on_training_rows_are_refused(make_run: Any, make_sites: Any, tmp_path: Path) -> None:
    site = Site(make_sites(north=9))
    plain, private = make_run(), make_run(privacy=RECORD)
    assert ask(site, site.prepare(plain), tmp_path / "a", "evaluate", "train").error == "protocol"
    private = site.prepare(private)
    assert ask(site, private, tmp_path / "b", "evaluate", "train").error == "protocol"
    assert ask(site, private, tmp_path / "c", "evaluate", "validation").error is None


def test_without_privacy_nothing_is_claimed(make_run: Any, make_sites: Any, tmp_path: Path) -> None:
    site = Site(make_sites(north=9))
    said = ask(site, site.prepare(make_run()), tmp_path, "join").description
    assert said.privacy is None and sum(said.label_counts.values()) == 9


def test_a_site_that_claims_nothing_takes_no_part_in_a_private_run(play: Any) -> None:
    def silent(update: Any) -> Any:
        return described(update, privacy=None) if update.header.phase == "join" else update

    with pytest.raises(QuorumNotMet) as caught:
        play(silent, privacy=RECORD)
    assert "privacy" in str(caught.value)


def test_a_delta_above_one_units_share_names_the_site(make_run: Any, make_sites: Any) -> None:
    with refuses(ConfigError, where="site north") as caught:
        Site(make_sites(north=40)).prepare(make_run(privacy={**RECORD, "delta": 0.1}))
    assert "privacy.delta is 0.1" in str(caught.value) and "40 units" in str(caught.value)


# Whole runs.


def test_references_of_a_run_that_hides_sites_have_no_noise(
    make_run: Any, make_sites: Any, tmp_path: Path
) -> None:
    """A site alone has nobody to hide among: its reference is that of the run without privacy."""
    settings = {
        "aggregation": {"name": "fedavg", "weighting": "uniform"},
        "evaluation": {"references": ["local_only", "centralised"]},
    }
    client = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}
    sites = make_sites(north=9, south=7)
    private = simulate(make_run(privacy=client, **settings), sites, tmp_path / "private").references
    plain = simulate(make_run(**settings), sites, tmp_path / "plain").references
    assert private is not None and plain is not None and not private.failed
    assert private.local_only["north"].test.pooled["loss"] == plain.local_only["north"].test.pooled["loss"]
    assert private.centralised is not None and private.centralised == plain.centralised
    said = "are not covered: they used the same rows without any noise"
    assert said in (tmp_path / "private" / "report.html").read_text()
    assert said not in (tmp_path / "plain" / "report.html").read_text()


def test_a_run_in_which_no_coin_came_up_ends_with_a_report(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(central_plan, "poisson_cohort", lambda *_: ())
    privacy = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3, "participation_hidden": True}
    run = make_run(
        privacy=privacy,
        aggregation={"name": "fedavg", "weighting": "uniform"},
        federation={"rounds": 2, "sites_per_round": 1},
    )
    summary = simulate(run, make_sites(north=9, south=7), tmp_path / "out")
    assert summary.status == "done" and summary.client_privacy is not None
    assert summary.client_privacy.releases == 2, "noise alone is a release as well: nobody may tell"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Who took part in which round is hidden" in page and "answers counted" not in page


@pytest.mark.parametrize("unit", ["record", "group"])
def test_a_private_run_with_references_ends_with_results(
    make_run: Any, make_sites: Any, tmp_path: Path, unit: str
) -> None:
    sites = make_sites(north=24, south=16)
    for site in sites.values():
        site["train"] = grouped(site["train"], [str(index // 2) for index in range(len(site["train"]))])
    privacy = {
        "unit": unit,
        "target_epsilon": 8,
        "delta": 1e-3,
        "max_records_per_group": 2 if unit == "group" else 1,
    }
    run = make_run(
        privacy=privacy, aggregation={"name": "ffa"}, evaluation={"references": ["local_only", "centralised"]}
    )
    summary = simulate(run, sites, tmp_path / "out")
    assert summary.references is not None and not summary.references.failed
    assert set(summary.references.local_only) == {"north", "south"} and summary.references.centralised
    assert (tmp_path / "out" / "report.html").is_file()
    text = (tmp_path / "out" / "run.yaml").read_text()
    assert load_run(tmp_path / "out" / "run.yaml").privacy == run.privacy and "target_epsilon" in text
    records = "".join(path.read_text() for path in (tmp_path / "out").glob("*.jsonl"))
    assert '"train_loss"' not in records and '"grad_norm"' not in records and "noise_multiplier" in records


def test_a_resumed_private_run_says_that_its_noise_is_new(
    make_run: Any, make_sites: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, sites = make_run(privacy=RECORD), make_sites(north=12, south=12)
    simulate(run, sites, tmp_path / "out")
    assert not [line for line in caplog.messages if "draw new noise" in line]
    simulate(run, sites, tmp_path / "out", options=SimulationOptions(resume=True))
    assert [
        line
        for line in caplog.messages
        if re.search("differential privacy: the rounds to come draw new", line)
    ]


def test_a_private_run_made_again_is_not_compared(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("heart", "liver", "lung")
    for name in ("north", "south"):
        (tmp_path / name).mkdir()
        rows = [{"text": f"{words[index % 3]} pain", "label": index % 3} for index in range(20)]
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = ", ".join(f"{{name: {name}, source: {name}}}" for name in ("north", "south"))
    (tmp_path / "run.sites.yaml").write_text(f"data: {{notes: {{sites: [{sources}]}}}}\n")
    (tmp_path / "run.yaml").write_text(
        "name: tiny\ntask: {name: sequence_classification, labels: [a, b, c], max_length: 24}\ndata: notes\n"
        f"model: {{model_name_or_path: {tiny_bert}}}\ntraining: {{max_steps: 1}}\nfederation: {{rounds: 1}}\n"
        "privacy: {unit: record, noise_multiplier: 1.0}\n"
    )
    out = tmp_path / "out"
    assert run_command(["simulate", str(tmp_path / "run.yaml"), "-o", str(out)]) == 0
    capsys.readouterr()
    assert run_command(["rerun", str(out), "-o", str(tmp_path / "again"), "--json"]) == 0
    said = capsys.readouterr()
    assert "noise is drawn afresh" in said.err
    assert json.loads(said.out)["same_adapter"] is None
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("out", "again")
    ]
    assert adapters[0] != adapters[1]


def test_site_level_privacy_accounts_for_one_exchange_a_round() -> None:
    class Twice(FedAvg):
        """A rule that asks a second time."""

        def exchanges(self, round: int) -> tuple[Phase, ...]:
            return ("alone", "fit")

    privacy = ClientPrivacy(unit="client", noise_multiplier=1.0, delta=1e-3)
    privacy.check_fits(FedAvg(weighting="uniform"), EvaluationConfig())
    with pytest.raises(ValueError) as caught:
        privacy.check_fits(Twice(weighting="uniform"), EvaluationConfig())
    assert "privacy.unit client: aggregation fedavg " in str(caught.value)
