"""What the trials of a search spend together: composed, and nothing where a site does not take part."""

from __future__ import annotations

from typing import Any

import pytest

from quorate.client.privacy.units import plan_of
from quorate.shared.privacy.accounting import epsilon
from quorate.simulations.tuning.privacy_cost import privacy_cost

PRIVATE = {"unit": "record", "noise_multiplier": 1.0, "delta": 0.01}


def test_trials_compose_at_the_site_that_spends_most(make_run: Any, make_sites: Any) -> None:
    rows = make_sites(north=40, south=20)
    runs = [make_run(privacy={**PRIVATE, "noise_multiplier": noise}) for noise in (1.0, 2.0)]
    plans = [plan_of(run, "south", rows["south"]["train"]) for run in runs]
    found = privacy_cost(rows, runs)
    assert found is not None
    assert (found.site, found.trials, found.delta) == ("south", 2, 0.01)  # fewer rows, drawn oftener
    assert found.epsilon == pytest.approx(epsilon([plan.whole_event() for plan in plans if plan], 0.01))
    assert privacy_cost(rows, [make_run()]) is None


@pytest.mark.parametrize("spoiled", ["no rows", "delta", "no noise"])
def test_a_site_that_is_refused_in_a_trial_spends_nothing_in_it(
    make_run: Any, make_sites: Any, spoiled: str
) -> None:
    """It is refused when it joins, and the others go on: so does the search, and so does what it says."""
    rows, run = make_sites(north=40, south=20), make_run(privacy=PRIVATE)
    alone, runs = privacy_cost(rows, [run]), [run]
    if spoiled == "no rows":
        rows["west"] = {"train": [], "validation": rows["north"]["validation"]}
    else:
        more = {"delta": 0.2} if spoiled == "delta" else {"noise_multiplier": 1e-4}
        runs.append(make_run(privacy={**PRIVATE, **more}))
    assert privacy_cost(rows, runs) == alone
