"""What a plan says of its steps is what it gives, whatever the rows, batches and ways to sample."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorate.client.trainer.schedule import BatchPlan, lr_factor
from quorate.shared.config.run_config import TrainingConfig

training = st.fixed_dictionaries(
    {
        "per_device_train_batch_size": st.integers(1, 9),
        "gradient_accumulation_steps": st.integers(1, 4),
        "sampling": st.sampled_from(["shuffle", "balanced"]),
    }
)
length = st.one_of(
    st.builds(lambda n: {"num_train_epochs": n}, st.integers(1, 5)),
    st.builds(lambda n: {"max_steps": n}, st.integers(1, 12)),
)


@given(st.integers(1, 40), training, length, st.integers(1, 4), st.sampled_from(["linear", "cosine"]))
def test_a_run_takes_the_steps_that_its_schedule_counts(
    rows: int, how: dict[str, Any], how_long: dict[str, int], rounds: int, curve: str
) -> None:
    config = TrainingConfig.model_validate({**how, **how_long, "lr_scheduler_type": curve})
    plan = BatchPlan(rows, config, 1, "a", [(row % 3,) for row in range(rows)])
    total = rounds * plan.steps_per_round
    taken = []
    for round in range(1, rounds + 1):
        steps = plan.steps(round)
        assert len(steps) == plan.steps_per_round
        first = (round - 1) * plan.steps_per_round  # as in `fit`
        taken += [lr_factor(config, first + step, total) for step in range(len(steps))]
        for step in steps:
            assert 0 < sum(map(len, step)) <= plan.rows_per_step
            assert len(step) <= config.gradient_accumulation_steps
            assert all(0 < len(micro) <= config.per_device_train_batch_size for micro in step)
    assert len(taken) == total and taken == sorted(taken, reverse=True)
    assert lr_factor(config, len(taken), total) == pytest.approx(0, abs=1e-12), "it ends where the curve does"


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_balanced_epochs_take_as_many_steps_as_shuffled_ones(rows: int, batch: int, epochs: int) -> None:
    def steps(sampling: str) -> list[list[int]]:
        config = TrainingConfig.model_validate(
            {"per_device_train_batch_size": batch, "num_train_epochs": epochs, "sampling": sampling}
        )
        return [micro for step in BatchPlan(rows, config, 1, "a", [(0,)] * rows).steps(1) for micro in step]

    balanced = steps("balanced")
    assert list(map(len, balanced)) == list(map(len, steps("shuffle")))
    assert set(Counter(row for step in balanced for row in step).values()) == {epochs}
