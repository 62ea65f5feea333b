"""A rule that no release has: two exchanges a round, momentum at the server, sites of two sizes, and a veto.

It lives here alone, and shows that the rounds need nothing more than its own file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from quorate.client.site.request import Request
from quorate.client.site.site import Site
from quorate.server.rounds.loop import Result, run_rounds
from quorate.server.rounds.run import RECORD_FILE, Run, read_jsonl
from quorate.server.tracking.records import RoundRecord
from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter, DType
from quorate.shared.aggregation.rule import (
    OPTIMIZER,
    Accumulator,
    Aggregator,
    GlobalState,
    RoundNotes,
    WeightedSum,
)
from quorate.shared.config import run_config
from quorate.shared.config.run_config import RunConfig
from quorate.shared.protocol.messages import SiteDescription, Update
from quorate.shared.protocol.phases import Phase
from quorate.shared.protocol.versions import versions
from quorate.simulations.in_process_grid import InProcessGrid

START = Adapter({"head": np.zeros((4, 3), dtype=np.float32)})
SMALL = {"head": (2, 3)}
MOVES = {"north": 1.0, "south": 2.0, "west": 30.0}
MOMENTUM = OPTIMIZER + "head"


@dataclass
class Vetoed(Accumulator):
    """A mean over the updates, without the one that the rule holds back."""

    rule: Toy
    state: GlobalState
    phase: Phase
    total: WeightedSum = field(default_factory=WeightedSum)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, site: str, update: Adapter, weight: float) -> None:
        if site == self.rule.veto and self.phase == "fit":
            self.left_out[site] = "held back"
        else:
            self.total.add(update, weight)

    def finish(self) -> tuple[GlobalState, RoundNotes]:
        mean = self.total.mean()
        if self.phase == "alone":  # the first exchange only says where to begin
            return replace(self.state, adapter=mean), RoundNotes()
        before = self.state.optimizer.get(MOMENTUM, np.zeros_like(mean["head"]))
        momentum = (0.5 * before + mean["head"] - self.state.adapter["head"]).astype(np.float32)
        adapter = Adapter({"head": self.state.adapter["head"] + momentum})
        return GlobalState(adapter, optimizer=Adapter({MOMENTUM: momentum})), RoundNotes(self.left_out)


class Toy(Aggregator):
    """See above."""

    name: Literal["toy"] = "toy"
    """The rule."""
    linear: ClassVar[bool] = False
    veto: str = ""
    """A site that never counts."""

    def exchanges(self, round: int) -> tuple[Phase, ...]:
        return ("alone", "fit") if round == 1 else ("fit",)

    def dtype(self, phase: Phase) -> DType:
        return "float64" if phase == "alone" else "float32"

    def site_schema(self, schema: Mapping[str, tuple[int, ...]], site: str) -> dict[str, tuple[int, ...]]:
        return dict(SMALL if site == "north" else schema)

    def init(self, state: GlobalState, round: int, phase: Phase = "fit") -> Vetoed:
        return Vetoed(self, state, phase)


class ToyRun(RunConfig):
    """A run file that may name it."""

    aggregation: Toy


class ToySites:
    """Sites that add a constant; the first exchange of a run has them send ones in float64.

    Args:
        rounding: sites that round these to float32.
    """

    def __init__(self, rounding: Sequence[str] = ()) -> None:
        self.rounding = rounding
        self.asked: list[tuple[int, str, str, tuple[int, ...]]] = []
        self.names = tuple(MOVES)

    def prepare(self, run: RunConfig) -> RunConfig:
        return run

    def handle_many(self, requests: Sequence[Request]) -> list[Update]:
        return [self.answer(each) for each in requests]

    def samples(self, run: RunConfig, states: Sequence[GlobalState]) -> list[list[tuple[str, str]]]:
        return [[] for _ in states]

    def answer(self, request: Request) -> Update:
        header = request.header
        if header.phase == "join":
            description = SiteDescription(
                rows={"train": 1, "validation": 0, "test": 0},
                label_counts={"a": 0, "b": 0},
                model_files={},
                model_sha256="ab" * 32,
                start_hash=START.content_hash,
                versions=versions(),
            )
            return Update.reply(request, description=description)
        if header.phase == "start":
            return Update.reply(request, START)
        self.asked.append((header.round, header.phase, header.site, request.arrays["head"].shape))
        move = 1.0 if header.phase == "alone" else MOVES[header.site]
        exact = header.phase == "alone" and header.site not in self.rounding
        arrays = Adapter(
            {
                n: (array + move).astype("float64" if exact else "float32")
                for n, array in request.arrays.items()
            }
        )
        return Update.reply(request, arrays, num_examples=1, num_steps=1)


@pytest.fixture
def play(make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    # What reads a run file, at both ends, knows the rules that are listed there.
    monkeypatch.setattr(run_config, "RunConfig", ToyRun)

    def run_it(
        out: str, rounds: Iterable[int], veto: str = "", rounding: Sequence[str] = ()
    ) -> tuple[Result, list[RoundRecord], list[tuple[int, str, str, tuple[int, ...]]]]:
        config = make_run(
            task={"name": "sequence_classification", "labels": ["a", "b"]},
            federation={"rounds": max(rounds), "max_norm_ratio": None, "max_weight_share": None},
        ).model_dump()
        config["aggregation"] = {"name": "toy", "veto": veto, "weighting": "uniform"}
        sites = ToySites(rounding)
        run = Run.open(ToyRun.model_validate(config), tmp_path / out)
        result = run_rounds(InProcessGrid(sites, sites.names), run)
        return result, read_jsonl(run.output_dir / RECORD_FILE, RoundRecord), sites.asked

    return run_it


def test_a_round_is_the_exchanges_that_its_rule_names(play: Any) -> None:
    _, records, asked = play("out", range(3))
    assert [(round, phase) for round, phase, site, _ in asked if site == "south"] == [
        (1, "alone"),
        (1, "fit"),
        (2, "fit"),
    ]
    assert all(set(record.weights) == set(MOVES) for record in records)


def test_a_site_of_its_own_size_gets_and_sends_what_fits_it_and_is_padded_with_zeros(play: Any) -> None:
    result, _, asked = play("out", range(2))
    assert {shape for *_, site, shape in asked if site == "north"} == {(2, 3)}
    assert {shape for *_, site, shape in asked if site != "north"} == {(4, 3)}
    head = result.state.adapter["head"]
    first = np.repeat([[1.0], [2 / 3]], 2, axis=0)  # of three sites two have the lower half
    trained = {
        "upper": (first[0] + 1 + first[0] + 2 + first[0] + 30) / 3,
        "lower": (0 + first[2] + 2 + first[2] + 30) / 3,
    }
    np.testing.assert_allclose(head[:2], np.broadcast_to(trained["upper"], (2, 3)), rtol=1e-6)
    np.testing.assert_allclose(head[2:], np.broadcast_to(trained["lower"], (2, 3)), rtol=1e-6)


def test_whom_the_rule_leaves_out_is_in_the_record_with_its_reason(play: Any) -> None:
    result, records, _ = play("out", range(2), veto="west")
    (record,) = records
    assert set(record.weights) == {"north", "south"} == set(record.num_examples)
    assert (record.excluded["west"].code, record.excluded["west"].reason) == ("rule", "held back")
    assert result.state.adapter["head"].max() < 5


def test_its_own_state_is_in_the_checkpoint_and_is_not_sent(play: Any, tmp_path: Path) -> None:
    whole, _, asked = play("whole", range(4))
    assert whole.state.optimizer[MOMENTUM].any()
    stored = Adapter.from_bytes((tmp_path / "whole" / "checkpoint-3" / "state.safetensors").read_bytes())
    assert np.array_equal(stored[MOMENTUM], whole.state.optimizer[MOMENTUM])
    assert GlobalState.from_stored(stored).stored().content_hash == whole.state.stored().content_hash
    assert len(asked) == 4 * len(MOVES)


def test_an_exchange_has_its_own_dtype_and_another_is_set_aside(play: Any) -> None:
    _, (record,), _ = play("out", range(2))
    assert not record.excluded
    _, (record,), _ = play("rounded", range(2), rounding=["south"])
    assert (record.excluded["south"].code, set(record.weights)) == ("adapter", set(MOVES))
    assert "float64" in record.excluded["south"].reason


class Ranked(Aggregator):
    """Sites named so train a LoRA pair of rank 2."""

    name: Literal["ranked"] = "ranked"
    """The rule."""
    linear: ClassVar[bool] = True
    low: tuple[str, ...] = ()
    """Which sites."""

    def site_schema(self, schema: Mapping[str, tuple[int, ...]], site: str) -> dict[str, tuple[int, ...]]:
        if site not in self.low:
            return dict(schema)
        cut = {LORA_A: lambda shape: (2, shape[1]), LORA_B: lambda shape: (shape[0], 2)}
        return {
            n: next((f(shape) for end, f in cut.items() if n.endswith(end)), shape)
            for n, shape in schema.items()
        }


class RankedRun(RunConfig):
    """A run file that may name it."""

    aggregation: Ranked


def test_a_real_site_of_a_lower_rank_trains_it_and_the_mean_has_zeros_for_the_rest(
    make_run: Any, make_sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_config, "RunConfig", RankedRun)
    rows = make_sites(north=9, south=9)

    def play(*low: str) -> tuple[Adapter, RoundRecord]:
        config = make_run(federation={"rounds": 1, "quorum": 2, "max_norm_ratio": None}).model_dump()
        config["aggregation"] = {"name": "ranked", "low": low}
        site = Site(rows)
        run = Run.open(
            RankedRun.model_validate(site.prepare(RankedRun.model_validate(config))),
            tmp_path / "".join(["x", *low]),
        )
        result = run_rounds(InProcessGrid(site, site.names), run)
        (record,) = read_jsonl(run.output_dir / RECORD_FILE, RoundRecord)
        return result.state.adapter, record

    (both, _), (one, record), (neither, whole) = play("north", "south"), play("south"), play()
    assert record.bytes_up["south"] < record.bytes_up["north"] == whole.bytes_up["north"]
    for name in (name for name in both if name.endswith(LORA_B)):
        assert not both[name][:, 2:].any()
        assert one[name][:, 2:].any()
        assert np.abs(neither[name] - one[name]).max() > 1e-4
