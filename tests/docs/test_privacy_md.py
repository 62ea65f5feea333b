"""docs/privacy.md: its run files are valid, and its figures are what the code computes."""

import re
from pathlib import Path

import pytest

from quorate.server.privacy.released import ClientPlan
from quorate.shared.config.dialect import parse
from quorate.shared.config.run_config import RunConfig
from quorate.shared.privacy.accounting import epsilon

TEXT = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL) if "privacy:" in block]
REST = {
    "name": "example",
    "task": {"name": "sequence_classification", "labels": ["yes", "no"]},
    "data": "notes",
    "model": {"model_name_or_path": "folder"},
    "federation": {"rounds": 1},
}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_run_files_are_valid(block: str) -> None:
    RunConfig.model_validate({**REST, **parse(block, "docs/privacy.md")})


def test_ten_hospitals_and_a_thousand_sites() -> None:
    """50 rounds, epsilon 8, delta 1e-5; RoBERTa-base with rank 8 has 0.29 M values."""
    shown = " ".join(TEXT.split())
    for sites, figure in ((10, "230 times"), (1000, "2.3 times")):
        plan = ClientPlan(
            sites=sites,
            sampling_probability=1,
            noise_multiplier=4.24,
            sum_multiplier=4.24,
            count_deviation=None,
            participation_hidden=False,
            values=294_912,
        )
        assert epsilon(plan.events(50), 1e-5) == pytest.approx(8, rel=0.01)
        assert f"{plan.noise_on_mean:.2g} times".replace("2.3e+02", "230") == figure
        assert figure in shown
