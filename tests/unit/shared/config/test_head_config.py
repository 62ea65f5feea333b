"""`adapter.head` of a run file: what can be solved, and what stands in the way."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from refusals import refuses

from quorate.client.site.site import Site
from quorate.shared.adapters.linear_head import LinearHead, find_head
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError, ModelError

ANALYTIC = {"head": {"init": "analytic"}}
SCHEMA = {
    "base_model.model.bert.layer.0.query.lora_A.weight": (4, 32),
    "base_model.model.bert.layer.0.query.lora_B.weight": (32, 4),
    "base_model.model.classifier.weight": (3, 32),
    "base_model.model.classifier.bias": (3,),
}
WIDE = {"base_model.model.classifier.weight": (3, 4096), "base_model.model.classifier.bias": (3,)}
CONVOLUTION = {"base_model.model.classifier.weight": (3, 32, 1, 1), "base_model.model.classifier.bias": (3,)}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"adapter": {"head": {"init": "analytic", "hidden_sizes": [8]}}}, "leave hidden_sizes out"),
        ({"adapter": {"head": {"dropout": 0.1}}}, "activation and dropout follow hidden layers"),
        ({"adapter": {"head": {"activation": "relu"}}}, "activation and dropout follow hidden layers"),
        ({"adapter": {"head": {"init": "zero"}}}, "analytic"),
        (
            {"adapter": ANALYTIC, "privacy": {"unit": "record", "noise_multiplier": 1.0}},
            "exact sums over their rows, which no privacy",
        ),
        (
            {
                "adapter": ANALYTIC,
                "aggregation": {"name": "fedavg", "weighting": "uniform"},
                "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3},
            },
            "exact sums over their rows, which no privacy",
        ),
    ],
)
def test_what_cannot_stand_beside_it(make_run: Any, sections: Any, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_run(**sections)
    (error,) = caught.value.errors()
    assert said in error["msg"]


@pytest.mark.parametrize(
    "task",
    [
        {"name": "token_classification", "labels": ["O", "B-x", "I-x"]},
        {"name": "causal_lm"},
        {"name": "object_detection", "labels": ["cell"]},
    ],
    ids=lambda task: str(task["name"]),
)
def test_a_task_without_such_a_head(make_run: Any, task: Any) -> None:
    run = make_run().model_dump() | {"task": task}
    run["evaluation"] = {}
    RunConfig.model_validate(run)
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({**run, "adapter": ANALYTIC})
    (error,) = caught.value.errors()
    assert "adapter.head.init analytic" in error["msg"] and f"task {task['name']} " in error["msg"]


def test_a_random_single_layer_is_the_models_own(make_run: Any, make_sites: Any) -> None:
    rows = make_sites(north=4)
    starts = [Site(rows) for _ in range(2)]
    for site, adapter in zip(starts, ({}, {"head": {}}), strict=True):
        site.prepare(make_run(adapter=adapter))
    hashes = [site._prepared.resident.model.initial.content_hash for site in starts]  # type: ignore[union-attr]
    assert hashes[0] == hashes[1]


def test_the_head_is_what_the_task_trains_whole(make_run: Any) -> None:
    run = make_run(adapter={**ANALYTIC, "modules_to_save": ["pooler"]})
    beside = {
        "base_model.model.bert.pooler.dense.weight": (32, 32),
        "base_model.model.bert.pooler.dense.bias": (32,),
    }
    assert find_head(run, {**SCHEMA, **beside}) == LinearHead("classifier", features=32, outputs=3)


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({**SCHEMA, "base_model.model.classifier.out_proj.weight": (3, 3)}, "head-not-one-layer"),
        ({n: s for n, s in SCHEMA.items() if "lora" in n}, "head-not-one-layer"),
        ({n: s for n, s in SCHEMA.items() if "bias" not in n}, "head-not-linear"),
        ({**SCHEMA, **CONVOLUTION}, "head-not-linear"),
        ({**SCHEMA, **WIDE}, "head-too-wide"),
    ],
    ids=["several", "none", "no-bias", "convolution", "wide"],
)
def test_a_head_of_another_kind(make_run: Any, schema: Any, kind: str) -> None:
    with refuses(ModelError, kind):
        find_head(make_run(adapter=ANALYTIC), schema)


@pytest.mark.parametrize("freeze", ["classifier", "classifier.bias"])
def test_a_head_that_is_not_sent(make_run: Any, make_sites: Any, freeze: str) -> None:
    run = make_run(adapter=ANALYTIC, training={"freeze": [freeze]})
    with refuses(ConfigError, "head-not-sent"):
        Site(make_sites(north=4)).prepare(run)
