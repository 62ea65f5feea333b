"""Client-level privacy in the round loop: what sites can see is noised, and counted, once."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from refusals import refuses
from tampered import SIZES, Change, Tampered, only, spoiled, untouched

from quorate.client.site.delivered import report
from quorate.client.site.site import Site
from quorate.server.privacy import central_dp
from quorate.server.privacy.central_plan import useless
from quorate.server.privacy.clipped_sum import ClippedSum
from quorate.server.privacy.released import LEDGER_FILE, ClientPlan, ReleaseLedger
from quorate.server.report import write_report
from quorate.server.results.deliver import delivery
from quorate.server.results.outputs import measure, write_outputs
from quorate.server.rounds import loop
from quorate.server.rounds.cohort import poisson_cohort
from quorate.server.rounds.loop import Result, run_rounds
from quorate.server.rounds.run import RECORD_FILE, Run, read_jsonl
from quorate.server.tracking.records import ClientClaim, RoundRecord
from quorate.shared.config.read import dump_yaml
from quorate.shared.errors import CheckpointError, ConfigError, QuorumNotMet
from quorate.shared.privacy.accounting import epsilon
from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.privacy.rounding import at_most
from quorate.shared.privacy.secure_random import CipherSource, SecretSource, SeededSource
from quorate.shared.protocol.messages import Update

UNIFORM = {"name": "fedavg", "weighting": "uniform"}
PLAIN = {"unit": "client", "delta": 0.01, "noise_multiplier": 1.0}
NOISELESS = {"unit": "client", "delta": 0.01, "noise_multiplier": 1e-4, "clipping_norm": 1.0}
"""Clips nothing (sites move less than that), and its noise is below what matters."""

Played = tuple[Result, list[Any], Tampered, Run]


@pytest.fixture
def privately(make_run: Any, make_sites: Any, tmp_path: Path) -> Any:
    """Run private rounds; with `resume` the ones that are left."""

    def run_it(
        change: Change = untouched, *, resume: bool = False, out: str = "out", **sections: Any
    ) -> Played:
        site = Site(make_sites(**SIZES))
        sections = {"aggregation": UNIFORM, "privacy": PLAIN, **sections}
        config = site.prepare(make_run(**sections))
        run = Run.open(config, tmp_path / out, resume=resume)
        grid = Tampered(site, change)
        result = run_rounds(grid, run)
        return result, read_jsonl(run.output_dir / RECORD_FILE, RoundRecord), grid, run

    return run_it


def interrupt(update: Update) -> Update:
    raise KeyboardInterrupt


def seen(grid: Tampered, phase: str, round: int) -> set[str]:
    """Hashes of the models that sites were sent."""
    return {
        request.arrays.content_hash
        for request in grid.requests
        if request.header.phase == phase and request.header.round == round
    }


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"aggregation": {"name": "fedavg"}}, "aggregation.weighting examples"),
        ({"aggregation": {"name": "fedex", "weighting": "uniform"}}, "aggregation fedex"),
        ({"aggregation": UNIFORM, "evaluation": {"early_stopping_patience": 2}}, "early_stopping_patience"),
    ],
    ids=["weights", "not-linear", "stopping"],
)
def test_what_would_void_the_claim_is_refused(make_run: Any, sections: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_run(privacy=PLAIN, **sections)
    said = caught.value.errors()[0]["msg"]
    assert "privacy.unit client" in said and field in said


def test_without_clipping_and_noise_a_round_is_that_of_the_rule(privately: Any, play: Any) -> None:
    plain, (before,), *_ = play(out="plain", aggregation=UNIFORM)
    assert max(before.update_norms.values()) < NOISELESS["clipping_norm"]
    found, (record,), *_ = privately(privacy=NOISELESS, federation={"rounds": 1})
    assert record.update_norms == before.update_norms and record.weights == before.weights
    deviation = record.noise.deviation / len(SIZES)
    for name, array in plain.state.adapter.items():
        np.testing.assert_allclose(found.state.adapter[name], array, atol=6 * deviation)


def test_updates_are_clipped_and_divided_by_all_sites_whoever_answers(privately: Any, play: Any) -> None:
    """South sends NaN: it adds nothing, and the others count no more for that."""
    norm = 1e-3
    privacy = {**NOISELESS, "clipping_norm": norm}
    found, (record,), grid, _ = privately(only("south", spoiled), privacy=privacy, federation={"rounds": 1})
    assert record.excluded["south"].code == "non-finite" and set(record.weights) == {"north", "west"}
    start = found.members.initial
    expected = start
    for update in grid.updates:
        if update.header.phase == "fit" and update.header.site != "south":
            step = update.arrays.minus(start)
            share = norm / step.l2_norm / len(SIZES)
            expected = expected.map(
                lambda name, a, step=step, share=share: a + np.float32(share) * step[name]
            )
    moved = found.state.adapter.minus(start).l2_norm
    assert found.state.adapter.minus(expected).l2_norm < 0.02 * moved
    assert moved <= norm * 2 / 3 * 1.02


def test_noise_is_what_the_record_says_and_never_the_same(privately: Any) -> None:
    privacy = {**PLAIN, "clipping_norm": 1e-6, "noise_multiplier": 1e4}
    states = []
    for out in ("one", "other"):
        # At rank 64 the adapter has so many values that 5 % is six deviations of their own deviation.
        result, (record,), *_ = privately(
            privacy=privacy, out=out, federation={"rounds": 1}, adapter={"r": 64}
        )
        noise = np.concatenate(
            [a.ravel() for a in result.state.adapter.minus(result.members.initial).values()]
        )
        assert noise.std() == pytest.approx(record.noise.deviation / len(SIZES), rel=0.05)
        states.append(result.state.stored().content_hash)
    assert states[0] != states[1], "one seed, two noises"


@pytest.mark.parametrize("secure", [False, True])
def test_the_source_of_noise_is_the_one_asked_for(
    privately: Any, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    drawn = []

    def spied(self: ClippedSum, multiplier: float, expected: float, source: SecretSource) -> Any:
        drawn.append(type(source))
        return noised_mean(self, multiplier, expected, source)

    noised_mean = ClippedSum.noised_mean
    monkeypatch.setattr(ClippedSum, "noised_mean", spied)
    privately(privacy={**PLAIN, "secure_rng": secure}, federation={"rounds": 1})
    assert drawn == [CipherSource if secure else SeededSource]


def test_adaptive_clipping_goes_on_where_it_was_after_a_resume(privately: Any) -> None:
    privacy = {**PLAIN, "noise_multiplier": 0.1, "adaptive_quantile": 0.5, "clipping_norm": 0.01}
    sections = {"privacy": privacy, "federation": {"rounds": 6}}
    stopped, first, *_ = privately(only("north", interrupt, round=4), **sections)
    assert stopped.status == "interrupted" and len(first) == 3
    result, records, _, run = privately(resume=True, **sections)
    assert [record.round for record in records] == list(range(1, 7)) and records[:3] == first
    assert records[0].noise.clipping_norm == 0.01
    for before, after in pairwise(records):
        assert after.noise.clipping_norm == before.noise.next_norm
        step = math.log(after.noise.clipping_norm / before.noise.clipping_norm)
        assert step == pytest.approx(-0.2 * (before.noise.fraction_within - 0.5))
    assert records[-1].noise.clipping_norm > 0.015, "all norms were larger: it grows"
    # The split of arXiv:1905.03871, theorem 1, with sigma_b = 3 / 20.
    for record in records:
        multiplier = record.noise.deviation / record.noise.clipping_norm
        assert multiplier**-2 + (2 * 3 / 20) ** -2 == pytest.approx(0.1**-2)
    assert ReleaseLedger.read(run.output_dir).releases == 6 and result.claim.releases == 6


def test_a_round_that_was_released_is_not_noised_again(privately: Any) -> None:
    sections = {"federation": {"rounds": 3}}
    stopped, records, grid, run = privately(only("south", interrupt, "evaluate", round=2), **sections)
    assert stopped.status == "interrupted" and len(records) == 1
    (shown,) = seen(grid, "evaluate", 2)
    assert stopped.claim.releases == 2, "sites have seen round 2, though it has no checkpoint"
    result, records, grid, run = privately(resume=True, **sections)
    assert seen(grid, "fit", 2) == set(), "nobody trained again"
    assert seen(grid, "evaluate", 2) == {shown} and records[1].state_hash == shown
    assert set(records[1].weights) == set(SIZES) and records[1].noise is not None
    assert {"train", "aggregate", "evaluate"} <= set(records[1].seconds)
    assert result.claim.releases == 3 and result.claim.epsilon == result.claim.planned_epsilon
    assert list(run.output_dir.glob("released-*")) == []


def killed_at(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the process end in round 2, before what `place` names is done."""

    def before(owner: Any, name: str, round_of: Callable[..., int]) -> None:
        whole = getattr(owner, name)

        def ending(*args: Any, **named: Any) -> Any:
            if round_of(*args) == 2:
                raise KeyboardInterrupt
            return whole(*args, **named)

        monkeypatch.setattr(owner, name, ending)

    if place == "release":
        before(central_dp, "write_released", lambda _dir, released, _state: released.round)
    elif place == "count":
        before(ReleaseLedger, "write", lambda ledger, _dir: ledger.releases)
    elif place == "show":
        before(loop, "measure", lambda round, *_: round.number)
    elif place == "checkpoint":
        before(loop, "save_checkpoint", lambda _dir, _state, progress, _keep: progress.round)
    else:
        before(central_dp.CentralPrivacy, "finished", lambda central: central.ledger.releases)


@pytest.mark.parametrize("place", ["release", "count", "show", "checkpoint", "drop"])
def test_what_is_counted_on_disk_is_never_less_than_what_was_shown(
    privately: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at each place of round 2, another one in round 3 before anything of it is released."""
    sections, shown = {"federation": {"rounds": 3}}, set[str]()
    with monkeypatch.context() as patched:
        killed_at(place, patched)
        stopped, _, grid, run = privately(**sections)
    assert stopped.status == "interrupted"
    shown |= seen(grid, "evaluate", 1) | seen(grid, "evaluate", 2)
    assert ReleaseLedger.read(run.output_dir).releases >= len(shown)
    stopped, records, grid, _ = privately(only("north", interrupt, round=3), resume=True, **sections)
    assert stopped.status == "interrupted" and len(records) == 2
    shown |= seen(grid, "evaluate", 2)
    assert ReleaseLedger.read(run.output_dir).releases == len(shown) == 2
    result, records, grid, _ = privately(resume=True, **sections)
    shown |= seen(grid, "evaluate", 3)
    assert {record.state_hash for record in records} == shown
    assert ReleaseLedger.read(run.output_dir).releases == result.claim.releases == len(shown) == 3
    assert result.claim.epsilon == result.claim.planned_epsilon


def test_a_round_that_nobody_saw_costs_nothing(privately: Any) -> None:
    stopped, *_ = privately(only("south", interrupt, round=2), federation={"rounds": 3})
    assert stopped.claim.releases == 1
    result, *_ = privately(resume=True, federation={"rounds": 3})
    assert result.claim.releases == 3


def test_whoever_deletes_a_checkpoint_pays_for_the_round_twice(
    privately: Any, caplog: pytest.LogCaptureFixture
) -> None:
    privacy = {"unit": "client", "delta": 0.01, "target_epsilon": 3.0}
    sections = {"privacy": privacy, "federation": {"rounds": 2}}
    result, _, _, run = privately(**sections)
    assert 2.99 < result.claim.epsilon <= 3.0
    shutil.rmtree(run.output_dir / "checkpoint-2")
    with caplog.at_level(logging.WARNING):
        again, records, *_ = privately(resume=True, **sections)
    assert len(records) == 2 and again.claim.releases == 3
    event = PrivacyEvent(sampling_probability=1, noise_multiplier=result.claim.noise_multiplier, steps=3)
    assert again.claim.events == (event,)
    assert again.claim.epsilon == again.claim.planned_epsilon == epsilon([event], 0.01) > 3.0
    assert "instead of 3" in caplog.text


def test_a_damaged_ledger_or_release_is_not_passed_over(privately: Any) -> None:
    stopped, _, _, run = privately(only("south", interrupt, "evaluate", round=1))
    assert stopped.claim.releases == 1
    state = run.output_dir / "released-1" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"\x01")
    with refuses(CheckpointError, "release-damaged"):
        privately(resume=True)
    (run.output_dir / LEDGER_FILE).write_text("{")
    with refuses(CheckpointError, "ledger-lost"):
        privately(resume=True)


def test_a_run_that_has_lost_its_ledger_does_not_begin_another(privately: Any) -> None:
    _, _, _, run = privately(federation={"rounds": 1})
    (run.output_dir / LEDGER_FILE).unlink()
    with refuses(CheckpointError, "ledger-lost"):
        privately(resume=True, federation={"rounds": 1})


@pytest.mark.parametrize("hidden", [False, True], ids=["known", "hidden"])
def test_sampling_amplifies_only_where_it_is_hidden(privately: Any, hidden: bool) -> None:
    """Known coins: a site pays in full for the rounds that it was drawn for. Empty cohorts go on."""
    federation = {"rounds": 12, "sites_per_round": 1}
    evaluation = {"every": 12}
    privacy = {**PLAIN, "participation_hidden": hidden}
    result, records, grid, _ = privately(privacy=privacy, federation=federation, evaluation=evaluation)
    assert result.status == "done" and len(records) == 12
    asked = Counter(site for record in records for site in record.cohort)
    (event,) = result.claim.events
    if hidden:
        assert (event.sampling_probability, event.steps) == (pytest.approx(1 / 3), 12)
    else:
        assert any(not record.cohort for record in records), "by this seed some rounds ask nobody"
        assert (event.sampling_probability, event.steps) == (1, max(asked.values()))
    assert result.claim.epsilon == result.claim.planned_epsilon
    assert result.claim.expected_cohort == pytest.approx(1.0)
    for record in records:
        assert record.noise is not None
        assert {
            r.header.site for r in grid.requests if r.header.phase == "fit" and r.header.round == record.round
        } == set(record.cohort)


def test_coins_are_independent_and_fair() -> None:
    names = [f"site-{index}" for index in range(400)]
    drawn = [set(poisson_cohort(names, 0.2, round, 7)) for round in range(100)]
    assert drawn == [set(poisson_cohort(reversed(names), 0.2, round, 7)) for round in range(100)]
    sizes = [len(each) for each in drawn]
    assert np.mean(sizes) == pytest.approx(80, abs=3) and np.std(sizes) == pytest.approx(8, rel=0.25)
    # A site's coin does not depend on who else is there, or what others are drawn.
    assert [poisson_cohort(["site-3"], 0.2, round, 7) for round in range(100)] == [
        ("site-3",) if "site-3" in each else () for each in drawn
    ]
    secret = [poisson_cohort(names, 0.2, 1, None) for _ in range(2)]
    assert secret[0] != secret[1] and all(40 < len(each) < 120 for each in secret)
    assert poisson_cohort(names, 1.0, 1, None) == tuple(sorted(names))


def test_too_few_answers_of_those_drawn_stop_the_run(privately: Any) -> None:
    result, records, *_ = privately(only("south", spoiled), federation={"rounds": 2, "quorum": 3})
    assert isinstance(result.stopped, QuorumNotMet) and records == []
    assert result.claim.releases == 0 and result.claim.epsilon == 0


def test_a_small_cohort_is_warned_of_with_the_figure(
    privately: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result, *_ = privately(federation={"rounds": 1})
    claim = result.claim
    schema = result.members.initial.schema
    assert claim.values == sum(math.prod(shape) for shape in schema.values())
    figure = math.sqrt(claim.values) / 3
    assert claim.noise_on_mean == pytest.approx(figure) and figure > 1
    assert f"the noise on the mean update is {figure:.3g} times the clipping norm" in caplog.text
    assert "3 of 3 sites" in caplog.text and "privacy.unit: record" in caplog.text


def test_ten_hospitals_are_told_what_the_literature_says() -> None:
    """50 rounds, epsilon 8, delta 1e-5: multiplier 4.24; RoBERTa-base with rank 8 has 0.3 M values."""
    plan = ClientPlan(
        sites=10,
        sampling_probability=1,
        noise_multiplier=4.24,
        sum_multiplier=4.24,
        count_deviation=None,
        participation_hidden=False,
        values=294_912,
    )
    assert epsilon(plan.events(50), 1e-5) == pytest.approx(8, rel=0.01)
    assert plan.noise_on_mean == pytest.approx(230, rel=0.01) and "is 230 times" in useless(plan)


@pytest.mark.parametrize(
    ("privacy", "kind", "field"),
    [
        ({"delta": 0.4}, "delta-too-large-for-sites", "privacy.delta"),
        ({"adaptive_quantile": 0.5}, "quantile-too-noisy", "privacy.adaptive_quantile"),
    ],
)
def test_what_cannot_be_had_with_these_sites_is_refused_before_training(
    privately: Any, privacy: dict[str, Any], kind: str, field: str
) -> None:
    with refuses(ConfigError, kind) as caught:
        privately(privacy={**PLAIN, **privacy})
    assert str(caught.value).startswith(field)


def test_the_last_round_is_the_result_and_says_what_may_be_claimed(privately: Any) -> None:
    """Validation rows belong to the sites: neither the choice of a round nor pooled figures go to others."""
    result, _, grid, run = privately(federation={"rounds": 3}, training={"learning_rate": 1e-20})
    assert result.progress.best_round is None
    final, best, _ = measure(grid, run, result)
    summary = write_outputs(run, result, final, best)
    assert summary.best.round == 3 and summary.client_privacy == result.claim
    assert json.loads((run.output_dir / "summary.json").read_text())["client_privacy"][
        "epsilon"
    ] == pytest.approx(epsilon([PrivacyEvent(sampling_probability=1, noise_multiplier=1, steps=3)], 0.01))
    told = delivery(summary, "north")
    assert told.own and not told.pooled
    site_report = report(run.config, run.run_id, "north", told)
    assert "the last:" in site_report and "hold no noise" in site_report and "picked by" not in site_report
    card = (run.output_dir / "adapter" / "README.md").read_text()
    said = f"({at_most(result.claim.epsilon)}, 0.01)-differentially private"
    assert said in card.replace("\\", "") and "was not used" not in card and "the best by" not in card
    page = write_report(run.output_dir).read_text()
    assert said in page and "no differential privacy was used" not in page
    assert "best: round" not in page and "round 3 is the best" not in page
    assert f"{result.claim.noise_on_mean:.3g} times" in page


def test_a_search_is_refused(make_run: Any, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs the extra `tune`")
    from quorate.simulations.tuning.space import SpaceConfig
    from quorate.simulations.tuning.trial import Search

    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(make_run(aggregation=UNIFORM, privacy=PLAIN)))
    space = SpaceConfig.model_validate(
        {"trials": 1, "space": {"adapter.r": {"type": "categorical", "choices": [2, 4]}}}
    )
    with refuses(ConfigError, where="privacy.unit client"):
        Search(path, (), space, {}, tmp_path / "out")


def test_the_claim_is_read_back(privately: Any) -> None:
    claim = privately(federation={"rounds": 1})[0].claim
    assert ClientClaim.model_validate_json(claim.model_dump_json()) == claim
