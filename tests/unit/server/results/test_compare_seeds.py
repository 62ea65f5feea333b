"""Runs over several seeds, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import report_data
from refusals import refuses
from report_data import Shape

from quorate.deploy.cli import run
from quorate.server.results.compare_seeds import compare
from quorate.shared.errors import OutputError

SEEDS = (2, 0, 1)
SMALL = Shape(sites=("heart", "kidney"), intervals=False, exclusions=False, rounds=2, planned=2)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three runs with other seeds; the federated model is better with every further seed."""
    made = []
    for seed in SEEDS:
        folder = report_data.write_run(
            tmp_path / f"run-{seed}", Shape(**{**vars(SMALL), "federated": 0.7 + seed / 10})
        )
        for name, before, after in (
            ("run.yaml", "seed: 7", f"seed: {seed}"),
            ("summary.json", '"seed": 7', f'"seed": {seed}'),
        ):
            text = (folder / name).read_text()
            assert before in text
            (folder / name).write_text(text.replace(before, after))
        made.append(folder)
    return made


def test_means_and_t_intervals_over_seeds(folders: list[Path]) -> None:
    found = compare(folders)
    assert found.seeds == (0, 1, 2)
    values = [json.loads((folders[i] / "summary.json").read_text())["best"]["test"] for i in (1, 2, 0)]
    accuracy = found.pooled["federated"]["accuracy"]
    assert accuracy.values == tuple(each["pooled"]["accuracy"] for each in values)
    assert accuracy.mean == pytest.approx(sum(accuracy.values) / 3)
    # Student's t with 2 degrees of freedom: 4.3027 standard errors.
    spread = (sum((v - accuracy.mean) ** 2 for v in accuracy.values) / 2) ** 0.5
    assert accuracy.high - accuracy.mean == pytest.approx(4.302652729911275 * spread / 3**0.5)
    assert set(found.sites) == {"heart", "kidney"}
    assert set(found.sites["heart"]) == {"federated", "centralised", "local only"}
    home = found.sites["heart"]["federated"]["macro_f1"]
    assert home.values == tuple(each["sites"]["heart"]["macro_f1"] for each in values)


def test_the_command_prints_tables_and_json(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", *map(str, folders)]) == 0
    out = capsys.readouterr().out
    found = compare(folders).pooled["federated"]["accuracy"]
    assert f"| federated | {found.mean:.3f} ± {found.high - found.mean:.3f} |" in out
    assert "| local only: heart |" in out and "Mean over seeds 0, 1, 2" in out
    assert run(["compare", "--json", *map(str, folders)]) == 0
    assert json.loads(capsys.readouterr().out)["seeds"] == [0, 1, 2]


def test_runs_that_have_no_common_mean_are_refused(
    folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (folders[1] / "run.yaml").write_text(
        (folders[1] / "run.yaml").read_text().replace("rounds: 2", "rounds: 3")
    )
    with refuses(OutputError, "settings-differ") as caught:
        compare(folders)
    assert str(folders[0]) in str(caught.value) and str(folders[1]) in str(caught.value)
    with refuses(OutputError, "same-seed") as caught:
        compare([folders[0], folders[0]])
    assert "seed 2" in str(caught.value)
    (folders[2] / "summary.json").unlink()
    assert run(["compare", *map(str, folders)]) == 2
    assert "has no readable summary.json; give folders of finished runs" in capsys.readouterr().err


def test_a_site_without_a_reference_of_its_own_has_a_gap(
    folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((folders[0] / "summary.json").read_text())
    del summary["references"]["local_only"]["heart"]
    (folders[0] / "summary.json").write_text(json.dumps(summary))
    assert run(["compare", *map(str, folders)]) == 0
    (heart,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| heart |"))
    assert heart.endswith("| - |")


def test_runs_without_test_rows_are_refused(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((folders[0] / "summary.json").read_text())
    summary["best"]["test"].update(pooled={}, mean={}, sites={}, rows={}, intervals={})
    (folders[0] / "summary.json").write_text(json.dumps(summary))
    assert run(["compare", *map(str, folders)]) == 2
    assert "have no test rows" in capsys.readouterr().err
