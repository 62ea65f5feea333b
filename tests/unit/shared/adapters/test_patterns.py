"""Regular expressions of a run file: a hostile one is refused in a short time, an ordinary one is not."""

from __future__ import annotations

import re
from typing import Any

import pytest
from engines import answer_all
from pydantic import ValidationError
from refusals import refuses
from site_folder import request

from quorate.client.site.site import Site
from quorate.shared.adapters.patterns import check_cost
from quorate.shared.errors import ConfigError

LAYERS = [f"model.layers.{n}.self_attn.{part}_proj.lora_A" for n in range(40) for part in "qkvo"]
HOSTILE = [
    r"(.+)+x",
    r"([a-z_.0-9]+)*X",
    r"(\w|\w\w|\.)*x",
    r".*.*.*.*.*.*.*x",
    "(.|.)" * 30 + ".*x",
    ".?" * 30 + "X",
]
ORDINARY = [
    r".*layer\.[01]\..*",
    r".*\.(layers|h)\.(1[0-9]|2[0-3])\.(self_attn|mlp)\..*_proj\.lora_[AB]",
    r"(?:model\.)?layers\.\d+\.self_attn\.(q|k|v)_proj\..+",
    ".*",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_what_would_take_long_is_refused(pattern: str) -> None:
    re.compile(pattern)
    with refuses(ConfigError, "slow-pattern", where="training.freeze") as caught:
        check_cost("training.freeze", ["query", ".*", pattern, "(never|tried)"], LAYERS)
    assert " 0.5 s " in str(caught.value)


def test_the_refusal_names_the_pattern() -> None:
    with refuses(ConfigError, "slow-pattern") as caught:
        check_cost("training.freeze", [*ORDINARY, HOSTILE[0], *ORDINARY], LAYERS)
    assert repr(HOSTILE[0]) in str(caught.value)


def test_what_is_ordinary_is_not_refused() -> None:
    check_cost("training.freeze", ORDINARY * 25, LAYERS)


@pytest.mark.timeout(120)  # this would take longer than the universe is old
@pytest.mark.parametrize(
    ("phase", "sections"),
    [
        ("join", {"adapter": {"target_modules": "(.+)+X"}}),
        ("fit", {"adapter": {"target_modules": "(.+)+X"}}),
        ("fit", {"training": {"freeze": ["(.+)+X"]}}),
        ("fit", {"training": {"learning_rates": {"(.+)+X": 2.0}}}),
    ],
)
def test_a_site_answers_a_hostile_run_and_serves_the_next(
    phase: str, sections: Any, make_run: Any, make_sites: Any, caplog: Any
) -> None:
    site, good = Site(make_sites(north=12)), make_run()
    (joined,) = answer_all(site, [request(good, "join", 0)])
    assert joined.header.error is None
    run = make_run(**sections)
    asked = request(run, phase, phase == "fit", joined.arrays if phase == "fit" else None)
    (update,) = answer_all(site, [asked])
    assert update.header.error == "config"
    assert "'(.+)+X' takes more than 0.5 s to match" in caplog.text
    (after,) = answer_all(site, [request(good, "fit", 1, joined.arrays)])
    assert after.header.error is None


@pytest.mark.parametrize("pattern", ["(" * 400, "a" * 501, "a{99999999999}", "(?P<x"])
@pytest.mark.parametrize(
    "make", [lambda p: {"adapter": {"target_modules": p}}, lambda p: {"training": {"freeze": [p]}}]
)
def test_what_is_no_pattern_is_an_error_of_its_field(pattern: str, make: Any, make_run: Any) -> None:
    with pytest.raises(ValidationError):
        make_run(**make(pattern))


def test_a_field_has_so_many_patterns_at_most(make_run: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        make_run(training={"freeze": ["query"] * 101})
    (error,) = caught.value.errors()
    assert (error["loc"], error["type"]) == (("training", "freeze"), "too_long")
    assert error["ctx"]["max_length"] == 100
