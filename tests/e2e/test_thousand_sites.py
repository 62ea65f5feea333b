"""Client-level privacy as it is meant to be used: 1,000 simulated sites, a few drawn each round."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest

from quorate.server.privacy.released import ReleaseLedger
from quorate.server.rounds.run import RECORD_FILE, read_jsonl
from quorate.server.tracking.records import ClientClaim, RoundRecord
from quorate.simulations.runner import simulate

SITES, COHORT, ROUNDS, DELTA = 1000, 50, 4, 1e-4


def by_dp_accounting(claim: ClientClaim, q: float, z: float, rounds: int) -> tuple[float, float]:
    """Epsilon of the mechanism as google/dp-accounting has it: by privacy losses, and by Renyi divergence."""
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))
    epsilons = []
    for accountant in (dp_accounting.pld.PLDAccountant(), dp_accounting.rdp.RdpAccountant()):
        accountant.compose(step, rounds)
        epsilons.append(float(accountant.get_epsilon(claim.delta)))
    return epsilons[0], epsilons[1]


@pytest.mark.slow
def test_a_thousand_sites_train_and_epsilon_is_dp_accountings(
    make_run: Any, make_sites: Any, tmp_path: Path
) -> None:
    run = make_run(
        adapter={"r": 2},
        training={"max_steps": 2},
        federation={"rounds": ROUNDS, "sites_per_round": COHORT, "quorum": 10},
        aggregation={"name": "fedavg", "weighting": "uniform"},
        privacy={
            "unit": "client",
            "delta": DELTA,
            "target_epsilon": 2.0,
            "adaptive_quantile": 0.5,
            "participation_hidden": True,
        },
        evaluation={"every": ROUNDS, "bootstrap_samples": 0},
    )
    rows = {
        site: {split: rows[: 8 if split == "train" else 1] for split, rows in splits.items()}
        for site, splits in make_sites(**{f"site{index:03d}": 8 for index in range(SITES)}).items()
    }
    summary = simulate(run, rows, tmp_path / "out")
    claim = summary.client_privacy
    assert claim is not None and summary.status == "done" and summary.best.test.rows.keys() == rows.keys()

    records = read_jsonl(tmp_path / "out" / RECORD_FILE, RoundRecord)
    sizes = [len(record.cohort) for record in records]
    assert len(sizes) == ROUNDS and len(set(sizes)) > 1, "Poisson cohorts differ in size"
    assert all(abs(size - COHORT) < 6 * math.sqrt(COHORT) for size in sizes)

    # The mechanism, from what was done in the rounds rather than from what is claimed of them.
    deviation = COHORT / 20
    multipliers = [record.noise.deviation / record.noise.clipping_norm for record in records]
    assert np.ptp(multipliers) < 1e-9
    z = (multipliers[0] ** -2 + (2 * deviation) ** -2) ** -0.5
    pld, rdp = by_dp_accounting(claim, COHORT / SITES, z, ROUNDS)
    assert claim.epsilon == claim.planned_epsilon == pytest.approx(pld, rel=1e-3)
    assert 0.995 * 2.0 < claim.epsilon <= 2.0 < rdp < 1.5 * claim.epsilon
    assert claim.noise_multiplier == pytest.approx(z)
    assert claim.noise_on_mean == pytest.approx(multipliers[0] * math.sqrt(claim.values) / COHORT)
    assert ReleaseLedger.read(tmp_path / "out").releases == ROUNDS
