"""Epsilons and deltas as they are shown: never below the truth, and close to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quorate.shared.privacy.claim import PrivacyClaim
from quorate.shared.privacy.rounding import at_least, at_most, delta_shown

ROOT = Path(__file__).parents[2]
SETTINGS = {"max_epsilon:g", "delta:g"}
"""Numbers that a person wrote, quoted as they were written."""
CLAIMS = ("claim", "found", "self")
"""Whose delta is no setting."""

positive = st.floats(1e-300, 1e300)


@given(positive, st.integers(2, 6))
@example(3.0049, 3)
@example(9.999, 3)
@example(1e-5, 2)
def test_a_bound_is_never_shown_tighter_than_it_is(value: float, digits: int) -> None:
    above, below = float(at_most(value, digits)), float(at_least(value, digits))
    assert below <= value <= above
    step = 10.0 ** (1 - digits)
    assert above <= value * (1 + step) * (1 + 1e-12) and below >= value * (1 - step) * (1 - 1e-12)


@given(st.floats(1e-12, 0.999))
def test_a_delta_is_never_shown_smaller(value: float) -> None:
    assert value <= float(delta_shown(value)) <= value * 1.1000001


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (at_most(3.0049), "3.01"),
        (at_most(8.0), "8"),
        (at_most(float("inf")), "inf"),
        (at_most(0.0), "0"),
        (at_least(1.0), "1"),
        (at_least(0.9999), "0.999"),
        (delta_shown(1.49e-6), "1.5e-06"),
        (delta_shown(1e-5), "1e-05"),
        (delta_shown(0.00099), "0.00099"),
    ],
)
def test_what_stands_there(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.floats(1e-3, 1e3), st.floats(1e-12, 0.99))
@example(3.0049, 1.49e-6)
def test_a_claim_in_words_claims_no_more_than_it_is(epsilon: float, delta: float) -> None:
    claim = PrivacyClaim(
        unit="record",
        units=9,
        epsilon=epsilon,
        delta=delta,
        noise_multiplier=1,
        sampling_probability=0.1,
        steps=3,
        clipping_norm=1,
    )
    found = re.match(r"\(([^,]+), ([^)]+)\)-differential privacy", claim.sentence)
    assert found is not None
    assert float(found[1]) >= epsilon and float(found[2]) >= delta


def test_no_epsilon_or_delta_is_shown_in_another_way() -> None:
    """Format specifications round to nearest."""
    odd = re.compile(r"\{((?:[^{}]*\.)?\w*(?:epsilon|delta)\w*(?:\[[^\]]*\])?:[.0-9]*[gfe])\}")
    found = {
        (str(path.relative_to(ROOT)), match)
        for folder in ("client", "deploy", "server", "shared", "simulations")
        for path in (ROOT / folder).rglob("*.py")
        for match in odd.findall(path.read_text(encoding="utf-8"))
        if match.rpartition(".")[2] not in SETTINGS or match.startswith(CLAIMS)
    }
    assert not found
