"""A forecast follows from its settings: identities between a plan and its neighbours."""

from __future__ import annotations

import math

import pytest
from refusals import refuses

from quorate.shared.adapters.adapter import LORA_A, LORA_B
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.errors import ConfigError
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.calibration import calibrate
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.privacy.run_cost import Forecast, Plan, forecast

FACTORS = {
    f"layer.{n}{end}": shape for n in range(3) for end, shape in ((LORA_A, (4, 48)), (LORA_B, (32, 4)))
}
HEAD = {"classifier.weight": (2, 32), "classifier.bias": (2,)}
FIXED = SitePrivacy(unit="record", noise_multiplier=1.0)
TARGET = SitePrivacy(unit="record", target_epsilon=3.0, delta=1e-5)


def make(privacy: SitePrivacy = FIXED, **changed: object) -> Forecast:
    usual = {"units": 2000, "batch": 32, "rounds": 6, "shapes": FACTORS, "steps_a_round": lambda batch: 10}
    return forecast(privacy, **(usual | changed))  # type: ignore[arg-type]


def neighbours(made: Forecast) -> dict[str, Plan]:
    return {plan.change: plan for plan in made.alternatives}


def test_the_configured_plan_is_its_definition() -> None:
    made = make(shapes=FACTORS | HEAD)
    plan = made.configured
    assert made.delta == 1e-5
    assert plan.trained_values == 3 * (4 * 48 + 32 * 4) + 66
    assert plan.bytes_each_way == 4 * plan.trained_values
    assert plan.steps == 60
    assert plan.relative_noise == pytest.approx(1.0 * math.sqrt(plan.trained_values) / 32)
    done = PrivacyEvent(sampling_probability=32 / 2000, noise_multiplier=1, steps=60)
    assert plan.epsilon_pld == epsilon([done], made.delta)
    assert plan.epsilon_rdp == epsilon([done], made.delta, "rdp")
    assert plan.epsilon_prv is None


def test_neighbours_of_a_given_multiplier() -> None:
    made = make()
    plan, others = made.configured, neighbours(made)
    assert list(others) == [
        f"{how} the {what}" for what in ("rank", "rounds", "batch") for how in ("half", "twice")
    ]
    # The noise's norm goes with the root of the numbers trained, and is averaged over the batch.
    assert others["twice the rank"].relative_noise == pytest.approx(math.sqrt(2) * plan.relative_noise)
    assert others["half the rank"].relative_noise == pytest.approx(plan.relative_noise / math.sqrt(2))
    assert others["twice the batch"].relative_noise == pytest.approx(plan.relative_noise / 2)
    assert others["half the batch"].relative_noise == pytest.approx(2 * plan.relative_noise)
    for name in ("half the rank", "twice the rank"):
        assert others[name].epsilon_pld == plan.epsilon_pld  # privacy does not know the model
    for name in ("half the rounds", "twice the rounds"):
        assert others[name].relative_noise == plan.relative_noise
    for what in ("rounds", "batch"):
        assert others[f"half the {what}"].epsilon_pld < plan.epsilon_pld
        assert others[f"twice the {what}"].epsilon_pld > plan.epsilon_pld


def test_a_neighbour_is_the_forecast_of_those_settings() -> None:
    others = neighbours(make())
    for name, changed in {"twice the rounds": {"rounds": 12}, "half the batch": {"batch": 16}}.items():
        assert make(**changed).configured.model_copy(update={"change": name}) == others[name]


def test_a_target_is_kept_by_every_plan() -> None:
    made = make(TARGET)
    for plan in (made.configured, *made.alternatives):
        assert 0.99 * 3 < plan.epsilon_pld <= 3 < plan.epsilon_rdp
        assert plan.noise_multiplier == calibrate(3, 1e-5, plan.sampling_probability, plan.steps)


def test_without_noise_every_plan_is_without_bound() -> None:
    made = make(SitePrivacy(unit="record", noise_multiplier=1e-3))
    assert {plan.epsilon_pld for plan in (made.configured, *made.alternatives)} == {math.inf}
    assert Forecast.model_validate_json(made.model_dump_json()) == made


def test_steps_may_follow_the_batch() -> None:
    """Where a run says epochs, half the batch means twice the steps."""
    made = make(steps_a_round=lambda batch: math.ceil(2000 / batch))
    assert made.configured.steps == 6 * 63
    assert neighbours(made)["half the batch"].steps == 6 * 125


def test_heads_and_ranks_of_their_own_stay_apart() -> None:
    mixed = {
        "a" + LORA_A: (2, 10),
        "a" + LORA_B: (6, 2),
        "b" + LORA_A: (4, 10, 3, 3),
        "b" + LORA_B: (6, 4, 1, 1),
    }
    made = make(shapes=mixed | HEAD)
    factors = made.configured.trained_values - 66
    assert factors == 20 + 12 + 360 + 24
    assert neighbours(made)["twice the rank"].trained_values == 2 * factors + 66
    assert neighbours(made)["half the rank"].trained_values == factors // 2 + 66


def test_alternatives_that_do_not_exist_are_left_out() -> None:
    odd = {"a" + LORA_A: (1, 10), "a" + LORA_B: (6, 1)}
    made = make(shapes=odd, rounds=3, batch=1025)
    assert list(neighbours(made)) == ["twice the rank", "twice the rounds"]
    assert "rank" not in " ".join(neighbours(make(shapes=HEAD)))


def test_opacus_is_asked_about_the_configured_plan() -> None:
    made = make(prv=True)
    assert made.configured.epsilon_prv == pytest.approx(made.configured.epsilon_pld, abs=0.02, rel=0.02)
    assert all(plan.epsilon_prv is None for plan in made.alternatives)


def test_it_refuses_what_cannot_be() -> None:
    with refuses(ConfigError, "batch-too-large") as caught:
        make(SitePrivacy(unit="group", noise_multiplier=1), units=31)
    assert all(said in str(caught.value) for said in ("32", "groups", "31"))
    with refuses(ConfigError, "delta-too-large"):
        make(SitePrivacy(unit="record", noise_multiplier=1, delta=1e-3))


def test_it_survives_json() -> None:
    made = make()
    assert Forecast.model_validate_json(made.model_dump_json()) == made
