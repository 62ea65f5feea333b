"""What `training.freeze` and `training.freeze_layers` name stays at its start, and never travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from refusals import refuses

from quorate.server.rounds.checkpoint import load_checkpoint
from quorate.shared.adapters.selection import frozen, layer_index, matches
from quorate.shared.errors import ConfigError
from quorate.shared.model.lora_model import load_model
from quorate.simulations.runner import simulate

SIZES = {"north": 12, "south": 7}
QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight"
HEAD = "base_model.model.classifier.bias"


@pytest.mark.parametrize(
    ("pattern", "query", "head"),
    [
        ("query", True, False),
        ("lora_A", True, False),
        ("lora_A.weight", True, False),
        ("self.query", True, False),
        ("uery", False, False),
        (".*uery", True, False),
        (r".*layer\.1\..*", True, False),
        (r".*layer\.0\..*", False, False),
        ("classifier", False, True),
        ("bias", False, True),
        (".*", True, True),
        ("base_model.*", False, False),
    ],
)
def test_patterns_are_endings_or_whole_regular_expressions(pattern: str, query: bool, head: bool) -> None:
    assert (matches(pattern, QUERY), matches(pattern, HEAD)) == (query, head)


def test_layers_are_those_of_pefts_layers_to_transform(make_run: Any) -> None:
    from peft import LoraConfig, get_peft_model

    from quorate.shared.model.base_model import load_base
    from quorate.shared.model.lora_model import adapter_of

    run = make_run()
    for wanted in (0, 1):
        config = LoraConfig(
            task_type="SEQ_CLS", target_modules=["query", "value"], layers_to_transform=[wanted]
        )
        theirs = {n for n in adapter_of(get_peft_model(load_base(run).model, config)) if ".lora_" in n}
        ours = {name for name in load_model(run).initial if layer_index(name) == wanted}
        assert ours == theirs and ours
    assert layer_index("base_model.model.model.layers.3.mlp.experts.5.up_proj.lora_A.weight") == 3
    assert layer_index("base_model.model.transformer.h.11.attn.c_attn.lora_B.weight") == 11
    assert layer_index(HEAD) is None


PATTERN, LAYERS = ({"freeze": ["query"]}, ".query."), ({"freeze_layers": 1}, ".layer.0.")
HEAD_ALONE = ({"freeze": ["classifier"]}, ".classifier.")


@pytest.mark.parametrize(
    ("rule", "training", "still"),
    [
        pytest.param("fedavg", *PATTERN, id="pattern-fedavg"),
        pytest.param("ffa", *PATTERN, id="pattern-ffa", marks=pytest.mark.slow),
        pytest.param("fedex", *PATTERN, id="pattern-fedex", marks=pytest.mark.slow),
        pytest.param("fedavg", *LAYERS, id="layers-fedavg", marks=pytest.mark.slow),
        pytest.param("ffa", *LAYERS, id="layers-ffa"),
        pytest.param("fedex", *LAYERS, id="layers-fedex", marks=pytest.mark.slow),
        pytest.param("fedavg", *HEAD_ALONE, id="head-fedavg", marks=pytest.mark.slow),
        pytest.param("ffa", *HEAD_ALONE, id="head-ffa", marks=pytest.mark.slow),
        pytest.param("fedex", *HEAD_ALONE, id="head-fedex"),
    ],
)
def test_frozen_arrays_stay_and_never_travel(
    make_run: Any, make_sites: Any, tmp_path: Path, rule: str, training: Any, still: str
) -> None:
    run = make_run(training=training, aggregation={"name": rule})
    simulate(run, make_sites(**SIZES), tmp_path / "out")
    start, (end, progress) = load_model(run).initial, load_checkpoint(tmp_path / "out", 2)
    moved = {name for name in start if not np.array_equal(start[name], end.adapter[name])}
    expected = {name for name in start if still not in name and not (rule == "ffa" and "lora_A" in name)}
    assert moved == expected and len(expected) < len(start)
    assert end.adapter.schema == start.schema, "the exported adapter is whole"

    simulate(make_run(aggregation={"name": rule}), make_sites(**SIZES), tmp_path / "all")
    _, free = load_checkpoint(tmp_path / "all", 2)
    saved = sum(
        start[name].nbytes for name in start if still in name and not (rule == "ffa" and "lora_A" in name)
    )
    for site in SIZES:
        less = free.record.bytes_up[site] - progress.record.bytes_up[site]
        assert saved <= less <= saved + 4096, "a training's upload lacks the arrays and their names"
        # Training and evaluation each send the adapter down.
        assert free.record.bytes_down[site] - progress.record.bytes_down[site] >= 2 * saved - 1024


@pytest.mark.parametrize(
    ("sections", "kind", "named"),
    [
        ({"training": {"freeze": ["qery"]}}, "names-nothing", "training.freeze: 'qery' "),
        ({"training": {"freeze_layers": 3}}, "too-many-layers", "training.freeze_layers: 3 "),
        ({"training": {"freeze": [".*"]}}, "all-frozen", "training.freeze "),
        (
            {"training": {"freeze": ["lora_A"]}, "aggregation": {"name": "fedex"}},
            "half-frozen",
            "aggregation fedex ",
        ),
        (
            {"training": {"freeze": ["lora_B", "classifier"]}, "aggregation": {"name": "ffa"}},
            "rule-trains-nothing",
            "aggregation ffa ",
        ),
    ],
)
def test_what_cannot_be_frozen_is_refused_before_round_1(
    make_run: Any, make_sites: Any, tmp_path: Path, sections: Any, kind: str, named: str
) -> None:
    with refuses(ConfigError, kind) as caught:
        simulate(make_run(**sections), make_sites(**SIZES), tmp_path / "out")
    assert named in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_is_no_expression_is_refused(make_run: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        make_run(training={"freeze": ["(query"]})
    (error,) = caught.value.errors()
    assert error["loc"][:2] == ("training", "freeze") and "'(query'" in error["msg"]


def test_freezing_a_is_ffa(make_run: Any, make_sites: Any, tmp_path: Path) -> None:
    """An identity: with A frozen, plain averaging is FFA-LoRA."""
    simulate(make_run(training={"freeze": ["lora_A"]}), make_sites(**SIZES), tmp_path / "frozen")
    simulate(make_run(aggregation={"name": "ffa"}), make_sites(**SIZES), tmp_path / "ffa")
    states = [load_checkpoint(tmp_path / name, 2)[0] for name in ("frozen", "ffa")]
    assert states[0].adapter.content_hash == states[1].adapter.content_hash


def test_nothing_is_frozen_unless_asked_for(make_run: Any) -> None:
    run = make_run()
    assert frozen(run.training, load_model(run).initial) == frozenset()
