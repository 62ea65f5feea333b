"""What a site lets go of for a solved head: sums over enough rows, once, and of heads that can be solved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_images
from closed_form import ANALYTIC, by_least_squares, plain_features
from engines import answer_all
from refusals import refuses
from site_folder import request

from quorate.client.process import reload
from quorate.client.site.site import Site
from quorate.server.exchange.exclusions import REASONS
from quorate.server.exchange.join import request as asked_by_server
from quorate.server.rounds.run import Run
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.errors import ModelError
from quorate.shared.metrics.head_sums import HeadSums, sums_schema
from quorate.shared.metrics.ridge import solve
from quorate.shared.model.lora_model import load_model
from quorate.shared.tasks.task import Row


@pytest.fixture
def site(make_site: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(reload, "SETTLE_SECONDS", 0.0)
    return make_site


@pytest.fixture
def pinned(pinned: Any) -> Any:
    return partial(pinned, adapter=ANALYTIC)


def test_sums_leave_once_and_are_written_down(site: Any, pinned: Any) -> None:
    whole = site()
    first = whole.ask(request(pinned(), "statistics", 0))
    assert first.header.error is None and first.header.num_examples == 58
    first.arrays.check_schema(sums_schema(32, 3), "float64")
    whole.restart()
    assert whole.ask(request(pinned(), "statistics", 0)).encoded == first.encoded
    (run_id,) = (first.header.run_id,)
    left = dict(
        whole.chain.book._db.execute("SELECT kind, bytes FROM sent WHERE run_id = ?", (run_id,)).fetchall()
    )
    assert left["statistics"] == 2 * first.arrays.num_bytes and "arrays" not in left


def test_sums_over_fewer_rows_than_asked_for_stay(site: Any, pinned: Any, caplog: Any) -> None:
    whole = site(min_rows_for_statistics=59)
    refused = whole.ask(request(pinned(), "statistics", 0))
    assert (refused.header.error, len(refused.arrays)) == ("policy-statistics", 0)
    assert (
        "policy.min_rows_for_statistics: sums over 58 training rows, of 32 features and a constant, would "
        "leave, and at least 59 rows are asked for; set it lower in site.yaml"
    ) in caplog.text
    assert "policy-statistics" in REASONS
    assert whole.ask(request(pinned(), "join", 0)).header.error is None, "it takes part all the same"
    whole.configure(min_rows_for_statistics=58)
    assert whole.ask(request(pinned(), "statistics", 0)).header.error is None


def test_a_run_that_draws_rows_gets_no_sums_of_them(site: Any, pinned: Any, caplog: Any) -> None:
    """Draws of 18 and of 19 of a label differ by one row, and so would their sums."""
    whole = site()
    for number in (18, 19):
        run = pinned(training={"examples_per_class": number})
        drawn = request(run, "statistics", 0, run_id=f"{number}" * 8)
        assert whole.ask(drawn).header.error == "policy-statistics"
    assert "the sums of two such runs may differ by a single row; set it to 1" in caplog.text
    whole.configure(min_rows_for_statistics=1)
    assert whole.ask(drawn).header.error is None


@pytest.mark.parametrize("others", [0.0, 1e-9, 1e-2])
def test_rows_that_hardly_weigh_hide_no_other(site: Any, pinned: Any, caplog: Any, others: float) -> None:
    """A run that weighs the rows of one label alone would get the space that these lie in."""
    whole = site()
    weighed = pinned(task={"class_weights": (1.0, others, others)})
    refused = whole.ask(request(weighed, "statistics", 0))
    assert (refused.header.error, len(refused.arrays)) == ("policy-statistics", 0)
    assert "sums over 58 training rows, which by their weights count as 1" in caplog.text
    assert (
        "of 32 features and a constant, would leave, and at least 33 rows are asked for (as many as "
        "features, as fewer give their span away); set it lower"
    ) in caplog.text
    for run_id, weights in (("f" * 16, (1.0, 0.8, 0.5)), ("e" * 16, "balanced")):
        asked = request(pinned(task={"class_weights": weights}), "statistics", 0, run_id=run_id)
        assert whole.ask(asked).header.error is None
    whole.configure(min_rows_for_statistics=1)
    assert whole.ask(request(weighed, "statistics", 0, run_id="d" * 16)).header.error is None


def test_too_few_validation_rows_stay_too(site: Any, pinned: Any) -> None:
    whole = site()
    joined = whole.ask(request(pinned(), "join", 0)).header.description
    assert joined is not None and 0 < joined.rows["validation"] < 33
    sums = whole.ask(request(pinned(), "statistics", 0))
    assert not any(sums.arrays[f"validation.{name}"].any() for name in ("gram", "cross", "squares"))
    whole.configure(min_rows_for_statistics=1)
    sums = whole.ask(request(pinned(), "statistics", 0, run_id="e" * 16))
    assert HeadSums.read(sums.arrays, "validation").weight == joined.rows["validation"]
    unshared = pinned(evaluation={"share_outcomes": False})
    sums = whole.ask(request(unshared, "statistics", 0, run_id="d" * 16))
    assert HeadSums.read(sums.arrays, "validation").weight == 0, (
        "the run promises that nothing of them leaves"
    )


def test_a_site_may_send_no_sums_at_all(site: Any, pinned: Any, caplog: Any) -> None:
    whole = site(head_statistics=False)
    assert whole.ask(request(pinned(), "statistics", 0)).header.error == "policy-statistics"
    assert "policy.head_statistics is off, and the run asks for sums over the rows" in caplog.text
    for phase, round in (("join", 0), ("fit", 1)):
        assert whole.ask(request(pinned(), phase, round)).header.error is None


def test_only_a_run_that_says_so_gets_sums(site: Any, pinned: Any, make_run: Any) -> None:
    whole = site(min_rows_for_statistics=1)
    random = pinned().model_copy(update={"adapter": make_run().adapter})
    assert whole.ask(request(random, "statistics", 0)).header.error == "protocol"
    assert whole.ask(request(pinned(), "statistics", 1, run_id="f" * 16)).header.error == "protocol"
    name = "base_model.model.classifier.bias"
    moved = Adapter({name: np.ones(3, np.float32)})
    assert whole.ask(request(pinned(), "statistics", 0, moved, run_id="e" * 16)).header.error == "adapter"


@pytest.mark.parametrize("kind", ["tokens", "scaled"])
def test_a_layer_that_is_not_the_answer_is_found_out_at_join(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run, site = make_run(), Site(make_sites(north=6))
    site.prepare(run)
    analytic = make_run(adapter=ANALYTIC)
    made = load_model

    def odd(*given: Any, **named: Any) -> Any:
        loaded = made(*given, **named)
        base = loaded.peft.get_base_model()
        if kind == "tokens":
            base.dropout.register_forward_hook(lambda _module, _given, pooled: pooled[:, None])
        else:
            base.classifier.register_forward_hook(lambda _module, _given, logits: 2 * logits)
        return loaded

    monkeypatch.setattr("quorate.client.site.loaded.load_model", odd)
    with refuses(ModelError, "head-sees-tokens" if kind == "tokens" else "head-is-not-the-answer"):
        site.prepare(analytic)
    asked = asked_by_server(Run(analytic, tmp_path, "0" * 16), 0, "join", "north")
    assert answer_all(site, [asked])[0].header.error == "model"


@pytest.mark.parametrize("architecture", ["ResNet", "ViT"])
def test_images_have_features_too(tmp_path: Path, architecture: str) -> None:
    model = small_images.save_model(tmp_path / "model", architecture)
    rows = small_images.make_rows(tmp_path / "images", 9, 0)
    site = Site({"north": {"train": rows, "validation": rows[:4], "test": []}})
    run = site.prepare(
        small_images.make_run(model, adapter=ANALYTIC, task={"augmentation": {"rotation": 20}})
    )
    (answer,) = answer_all(site, [asked_by_server(Run(run, tmp_path, "0" * 16), 0, "statistics", "north")])
    assert answer.header.error is None
    layer = "classifier.1" if architecture == "ResNet" else "classifier"
    y = np.eye(3)[[row.values["label"] for row in rows]]
    expected = by_least_squares(plain_features(run, rows, layer), y, np.ones(9), 0.1)
    found = solve(HeadSums.read(answer.arrays, "train"), 0.1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_number_of_an_image(tmp_path: Path) -> None:
    model = small_images.save_model(tmp_path / "model")
    rows = [
        Row({**row.values, "label": row.values["label"] - 1.0}, row.source)
        for row in small_images.make_rows(tmp_path / "images", 6, 0)
    ]
    config = small_images.make_run(model).model_dump() | {"task": {"name": "image_regression"}}
    site = Site({"north": {"train": rows, "validation": [], "test": []}})
    run = site.prepare(type(small_images.make_run(model)).model_validate({**config, "adapter": ANALYTIC}))
    (answer,) = answer_all(site, [asked_by_server(Run(run, tmp_path, "0" * 16), 0, "statistics", "north")])
    sums = HeadSums.read(answer.arrays, "train")
    assert sums.cross.shape == (17, 1)
    assert sums.cross[-1, 0] == pytest.approx(sum(row.values["label"] for row in rows))
