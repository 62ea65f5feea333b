"""Heads of several layers: trained as in plain PEFT, exported, and loaded again by the documented lines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from refusals import refuses

from quorate.client.models.predictions import predict
from quorate.client.trainer.fit import SiteTask, fit
from quorate.client.trainer.stack import AdapterStack
from quorate.server.rounds.checkpoint import load_checkpoint
from quorate.shared.errors import ModelError
from quorate.shared.model.heads import build_head
from quorate.shared.model.lora_model import load_model
from quorate.shared.progress import ignore_step
from quorate.simulations.runner import simulate

TOLERANCE = 1e-5
HEAD = {"hidden_sizes": [12, 6], "activation": "tanh", "dropout": 0.3}
ROOT = Path(__file__).parents[2]


def train(run: Any, sites: dict[str, list[Any]]) -> list[Any]:
    model = load_model(run)
    stack = AdapterStack.install(model)
    tasks = [
        SiteTask(name, run.task.encode(rows, model.processor), model.initial) for name, rows in sites.items()
    ]
    return [f.adapter for f in fit(stack, run, 1, tasks, frozenset(model.initial), ignore_step)]


def difference(one: Any, other: Any) -> float:
    assert one.schema == other.schema
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_it_trains_as_in_plain_peft(make_run: Any, make_sites: Any, plain_peft_loop: Any) -> None:
    run = make_run(adapter={"head": {**HEAD, "dropout": 0}})
    rows = make_sites(north=14)["north"]["train"]
    start = load_model(run).initial
    shapes = {n.removeprefix("base_model.model."): s for n, s in start.schema.items() if "classifier" in n}
    assert shapes["classifier.0.weight"] == (12, 32) and shapes["classifier.6.weight"] == (3, 6)
    (ours,) = train(run, {"north": rows})
    assert all(not np.array_equal(ours[n], start[n]) for n in start if "classifier" in n)
    assert difference(ours, plain_peft_loop(run, rows, start, 1)) < TOLERANCE


def test_stacked_sites_draw_their_own_dropout(make_run: Any, make_sites: Any) -> None:
    run = make_run(adapter={"head": HEAD})
    sites = {name: site["train"] for name, site in make_sites(a=12, b=3).items()}
    together = train(run, sites)
    for (name, rows), stacked in zip(sites.items(), together, strict=True):
        assert difference(stacked, train(run, {name: rows})[0]) < TOLERANCE
    dry = train(make_run(adapter={"head": {**HEAD, "dropout": 0}}), {"a": sites["a"]})[0]
    assert difference(dry, together[0]) > 1e-4


def test_a_model_without_a_single_layer_for_a_head_is_refused(make_run: Any) -> None:
    run = make_run(adapter={"head": HEAD})
    base = torch.nn.Module()
    base.classifier = torch.nn.Sequential()
    with refuses(ModelError, where="adapter.head") as caught:
        build_head(base, run.adapter.head, run.task)
    assert "(classifier)" in str(caught.value) and "Sequential" in str(caught.value)
    with refuses(ModelError, where="adapter.head") as caught:
        build_head(torch.nn.Module(), run.adapter.head, run.task)
    assert "(classifier)" in str(caught.value)


def code_block(text: str, start: str) -> str:
    return next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if start in block)


def test_plain_peft_loads_the_export_by_the_documented_lines(
    make_run: Any, make_sites: Any, tmp_path: Path, tiny_bert: Path
) -> None:
    run = make_run(adapter={"head": HEAD}, training={"learning_rate": 0.05})
    sites = make_sites(north=12, south=7)
    summary = simulate(run, sites, tmp_path / "out")
    folder = tmp_path / "out" / "adapter"
    texts = [row.values["text"] for row in sites["north"]["test"]]
    said = predict(folder, texts)

    model = load_model(run)
    assert summary.best is not None
    model.write_adapter(load_checkpoint(tmp_path / "out", summary.best.round)[0].adapter)
    tokens = model.processor(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        ours = model.peft(**tokens).logits
    np.testing.assert_allclose(
        [list(each["scores"].values()) for each in said], ours.softmax(dim=1).numpy(), atol=TOLERANCE
    )
    documented = code_block((ROOT / "docs" / "training.md").read_text(), "nn.Sequential")
    for lines in (documented, code_block((folder / "README.md").read_text(), "nn.Sequential")):
        for there, here in (
            ("BASE", str(tiny_bert)),
            ("FOLDER_OF_THE_" + str(tiny_bert) + "_MODEL", str(tiny_bert)),
            ("runs/NAME/adapter", str(folder)),
            ("FOLDER_OF_THIS_FILE", str(folder)),
        ):
            lines = lines.replace(there, here)
        names: dict[str, Any] = {}
        exec(lines, names)
        with torch.no_grad():
            theirs = names["model"](**tokens).logits
        torch.testing.assert_close(theirs, ours, atol=TOLERANCE, rtol=0)
