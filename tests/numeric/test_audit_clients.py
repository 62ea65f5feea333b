"""The audit of site-level privacy refutes a server without noise, and leaves a correct one alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from refusals import refuses

from quorate.server.privacy.clipped_sum import ClippedSum
from quorate.shared.errors import ConfigError
from quorate.shared.privacy.audit.audit_record import ClientAudit
from quorate.simulations.simulated_audit import audit_clients


def audited(
    make_run: Any, make_sites: Any, count: int = 60, rule: str = "fedavg", **sections: Any
) -> ClientAudit:
    privacy = {"unit": "client", "delta": 1e-5, "target_epsilon": 1.0, **sections.pop("privacy", {})}
    run = make_run(
        training={"max_steps": 1},
        federation={"rounds": 3, **sections.pop("federation", {})},
        aggregation={"name": rule, "weighting": "uniform"},
        privacy=privacy,
        **sections,
    )
    rows = make_sites(north=8, south=8, east=8)
    return audit_clients(run, rows, count=count, confidence=0.999)


def noiseless(self: ClippedSum, _multiplier: float, expected: float, _rng: object) -> Any:
    return self.start.map(lambda name, start: (start + self.sums[name] / expected).astype(np.float32))


@pytest.mark.parametrize("rule", ["fedavg", "ffa"])
def test_a_correct_server_is_not_refuted(make_run: Any, make_sites: Any, rule: str) -> None:
    found = audited(make_run, make_sites, rule=rule)
    assert found.epsilon == pytest.approx(1.0, rel=0.01) and found.canaries == 60
    assert not found.refuted and found.values > 500, found


def test_noise_that_is_off_is_refuted(
    make_run: Any, make_sites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClippedSum, "noised_mean", noiseless)
    found = audited(make_run, make_sites)
    assert found.refuted and found.epsilon_at_least > 2 and found.epsilon_estimated > 10, found


def test_clipping_that_is_off_is_refuted(
    make_run: Any, make_sites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unclipped(self: ClippedSum, update: Any) -> None:
        for name, total in self.sums.items():
            total += np.subtract(update[name], self.start[name], dtype=np.float64)

    monkeypatch.setattr(ClippedSum, "add", unclipped)
    assert audited(make_run, make_sites).refuted


def test_hidden_coins_and_adaptive_clipping(make_run: Any, make_sites: Any) -> None:
    """Canaries are drawn as the run's sites are, so what is seen of them shrinks with that chance."""
    noise: dict[str, Any] = {"target_epsilon": None, "noise_multiplier": 0.5, "adaptive_quantile": 0.5}
    federation = {"rounds": 3, "sites_per_round": 2, "quorum": 1}
    seldom = audited(
        make_run, make_sites, privacy={**noise, "participation_hidden": True}, federation=federation
    )
    always = audited(make_run, make_sites, privacy=noise)
    assert not seldom.refuted and not always.refuted and 0 < seldom.epsilon < always.epsilon
    assert 0 < seldom.cosine < always.cosine


def test_too_many_and_too_few_canaries(make_run: Any, make_sites: Any) -> None:
    with refuses(ConfigError, "too-many-canaries", where="--canaries") as caught:
        audited(make_run, make_sites, count=97, privacy={"delta": 0.01})
    assert "fewer than 97" in str(caught.value)
    with refuses(ConfigError, "too-few-canaries", where="--canaries"):
        audited(make_run, make_sites, count=1)


def test_a_bound_on_updates_lets_canaries_through(make_run: Any, make_sites: Any) -> None:
    noise = {"target_epsilon": None, "noise_multiplier": 0.5}
    found = audited(make_run, make_sites, privacy=noise, federation={"max_update_norm": 1.5})
    assert found.cosine > 2 / found.values**0.5, found
