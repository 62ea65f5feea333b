"""A membership attack on a released adapter: it finds what was memorised, and nothing where nothing was."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refuses

from quorate.client.audit.membership_attack import FEWEST, Rows, halves, membership, unseen
from quorate.client.audit.shadow_models import Shadow, released_losses
from quorate.shared.errors import DataError
from quorate.shared.tasks.task import Row
from quorate.simulations.runner import simulate

WORDS = ["fever", "cough", "pain", "rash", "dose", "scan", "blood", "heart"]
WORDS += ["liver", "lung", "bone", "nerve", "drug", "trial", "cell", "gene"]


def noise_rows(count: int, seed: int) -> list[Row]:
    """Texts whose labels are coins: whoever knows one has seen the row."""
    draw = random.Random(seed)
    return [
        Row({"text": " ".join(draw.sample(WORDS, 6)), "label": draw.randrange(3)}, f"row:{i}")
        for i in range(count)
    ]


def attacked(make_run: Any, folder: Path, learning_rate: float, steps: int) -> Any:
    run = make_run(
        training={
            "learning_rate": learning_rate,
            "max_steps": steps,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 16,
        },
        federation={"rounds": 1},
        adapter={"r": 8, "lora_alpha": 32},
    )
    members, others, population = noise_rows(48, 1), noise_rows(48, 2), noise_rows(48, 3)
    simulate(run, {"north": {"train": members, "validation": population, "test": others}}, folder)
    return membership(Shadow.of(run), folder / "adapter", Rows(members, others, population))


def test_a_run_that_memorises_is_found_out(make_run: Any, tmp_path: Path) -> None:
    found = attacked(make_run, tmp_path / "run", 1e-2, 120)
    assert found.auc_interval[0] > 0.65, found
    assert (found.members, found.others) == (48, 48)


def test_a_run_that_learns_nothing_gives_nobody_away(make_run: Any, tmp_path: Path) -> None:
    found = attacked(make_run, tmp_path / "run", 1e-9, 20)
    assert found.auc_interval[0] < 0.5 < found.auc_interval[1], found


def test_losses_are_those_of_the_released_adapter(make_run: Any, tmp_path: Path) -> None:
    run, rows = make_run(federation={"rounds": 1}), noise_rows(33, 1)
    simulate(run, {"north": {"train": rows, "validation": rows[:5], "test": rows[:5]}}, tmp_path / "run")
    shadow = Shadow.of(run)
    examples = shadow.encode(rows)
    (alone,) = shadow.train({"north": rows}).values()
    whole = released_losses(tmp_path / "run" / "adapter", run, examples)
    assert shadow.losses(alone, examples) == pytest.approx(whole, abs=1e-5)
    assert shadow.losses(shadow.model.initial, examples) != pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("rows", [7, 8])
def test_every_row_is_seen_by_one_reference_of_a_pair(rows: int) -> None:
    seen = halves(rows, 3, seed=0)
    assert seen.shape == (6, rows) and (seen.sum(axis=0) == 3).all()
    assert (seen[::2] ^ seen[1::2]).all()
    figures = np.arange(6 * rows, dtype=float).reshape(6, rows)
    for row in range(rows):
        assert set(unseen(figures, seen)[:, row]) == {figures[k, row] for k in range(6) if not seen[k, row]}


def test_too_few_rows_are_refused(make_run: Any, tmp_path: Path) -> None:
    rows = Rows(noise_rows(FEWEST, 1), noise_rows(FEWEST - 1, 2), noise_rows(FEWEST, 3))
    with refuses(DataError, "too-few-rows") as caught:
        membership(Shadow.of(make_run()), tmp_path, rows)
    assert all(said in str(caught.value) for said in ("20 ", "test", "19"))
