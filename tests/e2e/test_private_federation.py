"""A private run in a real federation: what it spends, what a site is told, and a run that no longer fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback import NAME, NEEDS_NGINX, Loopback, pin_model
from tiny_runs import LABELS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), NEEDS_NGINX]
RUN = """
name: tiny
task: {name: sequence_classification, labels: [cardiac, hepatic, pulmonary], max_length: 24}
data: notes
model: {model_name_or_path: "MODEL", sha256: HASH}
adapter: {r: 4}
training: {max_steps: 4, per_device_train_batch_size: 16, learning_rate: 1e-2}
federation: {rounds: 2, quorum: 2, grace_seconds: 0}
evaluation: {bootstrap_samples: 0}
privacy: {unit: record, target_epsilon: 3, delta: 1e-5}
"""
NAMES, CAP = ("north", "south"), 3.5


def write_rows(path: Path, seed: int) -> None:
    """180 rows, of which no two are the same text."""
    words = " ".join(LABELS.values()).split()
    lines = [
        f"{words[(7 * n + seed) % 9]} {own.split()[(n + seed) % 3]} {words[n % 9]} {words[n // 9]},{label}"
        for n in range(60)
        for label, own in LABELS.items()
    ]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")


@pytest.fixture
def federation(tmp_path: Path, tiny_bert: Path) -> Iterator[Loopback]:
    """Two sites with a budget that one run fits into and two do not."""
    for seed, name in enumerate(NAMES):
        write_rows(tmp_path / f"{name}.csv", seed)
    models = pin_model(tmp_path, RUN, tiny_bert)
    loopback = Loopback(
        tmp_path,
        {name: {"notes": {"source": str(tmp_path / f"{name}.csv")}} for name in NAMES},
        models,
        site={
            "policy": {
                "require_privacy": True,
                "privacy_budgets": [{"data": "notes", "max_epsilon": CAP, "delta": 1e-5}],
            }
        },
    )
    with loopback.running():
        yield loopback


def account(federation: Loopback, site: str) -> dict[str, Any]:
    shown = json.loads(federation.quorate("site", "ledger", "show", site, "--json").stdout)
    assert shown["ok"]
    (found,) = shown["accounts"]
    return dict(found)


def site_log(federation: Loopback, site: str) -> str:
    return "\n".join(path.read_text() for path in (federation.folder / site / "state").rglob("*.log"))


def newest_at_the_coordinator(federation: Loopback) -> tuple[dict[str, Any], dict[str, str]]:
    """The status of the newest run, as the coordinator sees it, and the code of each site it refused."""
    listed = federation.quorate("runs", "list", "--federation", NAME, "--json").stdout
    run_dir = federation.home / "state" / "runs" / json.loads(listed)["runs"][0]["id"]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    (refused,) = (each["sites"] for each in events if each["event"] == "refused")
    codes = {site: each["code"] for site, each in refused.items()}
    return json.loads((run_dir / "status.json").read_text()), codes


def test_a_private_run_from_forecast_to_audit(federation: Loopback) -> None:
    folder = federation.folder
    asked = ("forecast", "tiny.yaml", "--no-measure", "--site-file", "north/site.yaml", "--json")
    (forecast,) = json.loads(federation.quorate(*asked).stdout)["sites"]
    (budget,) = forecast["budgets"]
    assert (budget["spent"], forecast["refusal"]) == (0, None)

    federation.quorate("run", "tiny.yaml", "--federation", NAME, "-o", "out")
    summary = json.loads((folder / "out" / "summary.json").read_text())
    for name in NAMES:
        claim, spent = summary["sites"][name]["privacy"], account(federation, name)
        assert spent["entries"] == 2 and claim["epsilon"] <= 3
        assert spent["epsilon"] == pytest.approx(claim["epsilon"])
        assert f"{name}: (3, 1e-05)-differential privacy for each of" in site_log(federation, name)
    assert account(federation, "north")["epsilon"] == pytest.approx(budget["after"])
    page, card = ((folder / "out" / each).read_text() for each in ("report.html", "adapter/README.md"))
    assert "differential privacy" in page.lower() and "differential privacy" in card.lower()

    # What the site received, and its own attack on it.
    (received,) = (folder / "north" / "state" / "received").iterdir()
    told = (received / "report.md").read_text()
    assert "This site's own claim, by noise added here: (3, 1e-05)-differential privacy" in told
    audit = ("site", "audit", received.name, "--folder", "north", "--canaries", "200", "--json")
    found = json.loads(federation.quorate(*audit, "--reference-pairs", "1").stdout)
    (mechanism,) = found["mechanism"]
    assert mechanism["site"] == "north" and found["held_by"] == "site" and found["refuted"] == []
    assert mechanism["claim"]["epsilon"] == pytest.approx(spent["epsilon"], rel=0.01)
    assert found["membership"] is not None and found["token_leaks"]
    assert (received / "audit.json").is_file()
    assert account(federation, "north")["entries"] == 2, "an audit at home spends nothing: nothing leaves"

    # The second run does not fit, is refused before a row is trained on, and nothing is spent by it.
    (forecast,) = json.loads(federation.quorate(*asked).stdout)["sites"]
    assert forecast["budgets"][0]["after"] > CAP and "it would be" in forecast["refusal"]
    ended = federation.quorate("run", "tiny.yaml", "--federation", NAME, "-o", "again", code=3)
    why = "the run needs 2 sites, 0 of 2 can take part (north: has too little privacy budget left for this"
    assert why in ended.stderr
    status, refused = newest_at_the_coordinator(federation)
    assert (status["state"], status["exit_code"]) == ("quorum-not-met", 3) and why in status["message"]
    assert refused == dict.fromkeys(NAMES, "policy-budget")
    for name in NAMES:
        assert f"data.notes may spend epsilon {CAP:g}" in site_log(federation, name)
        assert account(federation, name)["entries"] == 2

    # A run without privacy is refused by the same policy.
    open_run = yaml.safe_load((folder / "tiny.yaml").read_text()) | {"privacy": None}
    (folder / "open.yaml").write_text(yaml.safe_dump(open_run))
    federation.quorate("run", "open.yaml", "--federation", NAME, "-o", "open", code=3)
    assert newest_at_the_coordinator(federation)[1] == dict.fromkeys(NAMES, "policy-privacy")
    assert "no noise" in site_log(federation, "north")
    for name in NAMES:
        verified = federation.quorate("site", "ledger", "verify", name)
        assert "all is well" in verified.stdout
        federation.quorate("site", "ledger", "export", name, "-o", f"{name}.jsonl")
        rows = [json.loads(line)["row"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == 4
