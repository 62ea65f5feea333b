"""The one-run audit refutes a mechanism that does not do what it claims, and leaves a correct one alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from refusals import refuses

from quorate.client.audit.mechanism import audit_mechanism
from quorate.client.audit.shadow_models import Shadow
from quorate.client.trainer.dp import clipping, dp_sgd
from quorate.client.trainer.dp.canaries import Canaries
from quorate.shared.errors import ConfigError


def private_run(make_run: Any, **privacy: Any) -> Any:
    return make_run(
        training={"per_device_train_batch_size": 16, "max_steps": 20, "optim": "sgd", "learning_rate": 0.05},
        federation={"rounds": 2},
        privacy={"unit": "record", "target_epsilon": 1.0, "delta": 1e-5, **privacy},
    )


def audited(run: Any, make_sites: Any, rows: int = 64) -> Any:
    sites = {"north": make_sites(north=rows)["north"]["train"]}
    (found,) = audit_mechanism(Shadow.of(run), sites, canaries=500, confidence=0.999)
    return found


def test_a_correct_run_is_not_refuted(make_run: Any, make_sites: Any) -> None:
    found = audited(private_run(make_run), make_sites)
    assert found.claim.epsilon == pytest.approx(1.0, rel=0.01)
    assert not found.refuted, found


def test_noise_that_is_off_is_refuted(
    make_run: Any, make_sites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipping, "with_noise", lambda source, total, std: total)
    found = audited(private_run(make_run), make_sites)
    assert found.refuted and found.epsilon_at_least > 2, found


def test_half_the_noise_is_seen_to_cost_more(
    make_run: Any, make_sites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = audited(private_run(make_run), make_sites)
    noise = clipping.with_noise
    monkeypatch.setattr(clipping, "with_noise", lambda source, total, std: noise(source, total, std / 4))
    assert audited(private_run(make_run), make_sites).epsilon_at_least > honest.epsilon_at_least


def test_clipping_that_is_off_is_refuted(
    make_run: Any, make_sites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unclipped(self: Any, gradients: Any) -> None:
        for name, gradient in gradients.items():
            self.total[name] += gradient.sum(dim=0)

    monkeypatch.setattr(dp_sgd.ClippedGradientSum, "_clip", unclipped)
    assert audited(private_run(make_run), make_sites).refuted


def test_a_canary_takes_part_like_any_unit(make_run: Any, make_sites: Any) -> None:
    """Almost without noise an included canary is seen in its share of the steps, and no other is."""
    run = private_run(make_run, target_epsilon=None, noise_multiplier=1e-4, max_grad_norm=1.0)
    shadow = Shadow.of(run)
    shapes = shadow.model.initial.schema
    planted = Canaries.draw(shapes, 400, np.random.default_rng(0))
    shadow.train({"north": make_sites(north=64)["north"]["train"]}, canaries={"north": planted})
    steps, share = 40, 16 / 64
    seen = planted.scores[planted.included]
    assert seen.mean() == pytest.approx(steps * share, rel=0.15)
    assert abs(np.median(planted.scores[~planted.included])) < 1


def test_places_are_distinct_and_gradients_hold_one_number() -> None:
    shapes = {"a": (3, 4), "b": (2,), "c": (2, 2, 2)}
    planted = Canaries.draw(shapes, 22, np.random.default_rng(0))
    assert len(set(zip(planted.names, planted.places.tolist(), strict=True))) == 22
    arrays = {name: torch.zeros(shape) for name, shape in shapes.items()}
    gradients = planted.gradients(np.arange(22), arrays, 0.5)
    for name, shape in shapes.items():
        assert gradients[name].shape == (22, *shape)
    flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    assert (flat.abs().sum(dim=1) == 5.0).all() and (flat.abs().sum(dim=0) == 5.0).all()
    with pytest.raises(ValueError) as caught:
        Canaries.draw(shapes, 23, np.random.default_rng(0))
    assert "23" in str(caught.value) and "22" in str(caught.value)


def test_a_run_without_a_claim_has_nothing_to_audit(make_run: Any, make_sites: Any) -> None:
    with refuses(ConfigError, "no-claim", where="privacy"):
        audited(make_run(), make_sites)
