"""What leaves a site: every field of its answers is listed, and what is said to be withheld is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import answer_all

from quorate.client.site.site import Site
from quorate.server.exchange.join import request
from quorate.server.rounds.run import Run
from quorate.shared.config.config_model import ConfigModel
from quorate.shared.protocol.leaves import FIELDS, METRICS, rendered, schema_paths
from quorate.shared.protocol.messages import UpdateHeader
from quorate.shared.tasks.task import Row

WITHHELD = "withheld under privacy"
DOCS = Path(__file__).parents[4] / "docs" / "what-leaves.md"
UNITS = {
    "none": {},
    "record": {"privacy": {"unit": "record", "noise_multiplier": 1.0}},
    "group": {"privacy": {"unit": "group", "noise_multiplier": 1.0}},
}


def test_every_field_of_an_answer_is_listed() -> None:
    assert set(schema_paths(UpdateHeader)) == FIELDS.keys(), (
        "say in quorate.shared.protocol.leaves what becomes of it"
    )


def test_a_field_that_is_added_is_missed() -> None:
    class Inner(ConfigModel):
        depth: int = 0

    class More(UpdateHeader):
        fresh: int = 0
        inner: Inner | None = None

    assert set(schema_paths(More)) - FIELDS.keys() == {"fresh", "inner.depth"}


def test_the_document_is_the_table() -> None:
    assert rendered() in DOCS.read_text(encoding="utf-8")


def answers(make_run: Any, make_sites: Any, folder: Path, unit: str) -> dict[str, Any]:
    """The headers of a site's answers to each phase."""
    sites = make_sites(north=12)
    north = sites["north"]
    # Two labels: a note says that one is lacking.
    north["train"] = [
        Row({**row.values, "label": row.values["label"] % 2}, row.source) for row in north["train"]
    ]
    for split, rows in north.items():
        north[split] = [Row(r.values, r.source, group=f"{split}-{at // 2}") for at, r in enumerate(rows)]
    site = Site(sites)
    run = Run(site.prepare(make_run(**UNITS[unit])), folder, "0" * 16)
    (joined,) = answer_all(site, [request(run, 0, "join", "north")])
    found = {"join": joined.header}
    for phase, split in (("fit", None), ("evaluate", "validation")):
        (answer,) = answer_all(site, [request(run, 1, phase, "north", joined.arrays, split)])  # type: ignore[arg-type]
        found[phase] = answer.header
    assert all(header.error is None for header in found.values())
    return found


def value_at(header: Any, path: str) -> Any:
    for part in path.split("."):
        header = None if header is None else getattr(header, part)
    return header


@pytest.mark.parametrize("unit", ["record", "group"])
def test_what_is_withheld_is_empty_under_privacy(
    make_run: Any, make_sites: Any, tmp_path: Path, unit: str
) -> None:
    """It is there without privacy, in an answer at least, so that this can fail."""
    private = answers(make_run, make_sites, tmp_path, unit)
    plain = answers(make_run, make_sites, tmp_path, "none")
    fields = [path for path, item in FIELDS.items() if item.treatment == WITHHELD]
    assert {"seconds", "num_tokens", "description.label_counts", "description.notes"} == set(fields)
    for path in fields:
        assert not any(value_at(header, path) for header in private.values()), path
        # A task of texts counts no tokens; `test_privacy` has one that does.
        assert path == "num_tokens" or any(value_at(header, path) for header in plain.values()), path
    for headers in (private, plain):
        assert headers["fit"].metrics.keys() <= METRICS.keys()
    shown = {name for name in private["fit"].metrics if METRICS[name].treatment == WITHHELD}
    hidden = {name for name in plain["fit"].metrics if METRICS[name].treatment == WITHHELD}
    assert not shown and hidden == {"train_loss", "grad_norm"}
    assert private["fit"].seconds == private["evaluate"].seconds == 0 < plain["fit"].seconds
