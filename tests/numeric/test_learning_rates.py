"""Learning rates per array, weight decay and optimisers: against plain loops with groups made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loaded_models import load_model
from refusals import refuses
from transformers import Trainer

from quorate.client.trainer.fit import SiteTask, fit
from quorate.client.trainer.optimizers import decayed, make_optimizer
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.selection import check_patterns
from quorate.shared.errors import ConfigError
from quorate.shared.progress import ignore_step

TOLERANCE = 1e-5


def noisy(adapter: Adapter, seed: int) -> Adapter:
    draw = np.random.default_rng(seed)
    return adapter.map(lambda _, a: (a + 0.1 * draw.standard_normal(a.shape)).astype(np.float32))


def difference(one: Adapter, other: Adapter) -> float:
    assert one.schema == other.schema
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def train(run: Any, sites: dict[str, list[Any]], start: Adapter, round: int = 1) -> list[Adapter]:
    model = load_model(run)
    stack = AdapterStack.install(model)
    tasks = [
        SiteTask(name, run.task.weigh(run.task.encode(rows, model.processor)), start)
        for name, rows in sites.items()
    ]
    return [f.adapter for f in fit(stack, run, round, tasks, frozenset(start), ignore_step)]


def by_hand(factor: Any) -> Any:
    """AdamW with one group per parameter, its rate 1e-2 times what `factor` says of its name."""

    def make(named: dict[str, Any]) -> torch.optim.Optimizer:
        groups = [{"params": [p], "lr": 1e-2 * factor(name)} for name, p in named.items()]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    return make


def layered(name: str) -> float:
    depth = 1.0 if "layer.1" in name or "classifier" in name else 0.5
    return depth * (0.1 if "classifier" in name else 1.0) * (3.0 if "lora_B" in name else 1.0)


@pytest.mark.parametrize("round", [1, 2])
def test_rates_per_array_are_those_of_a_plain_loop_with_groups(
    make_run: Any, make_sites: Any, plain_peft_loop: Any, round: int
) -> None:
    # max_grad_norm off: AdamW alone is blind to a factor on the gradient, not to one on the rate.
    training = {"learning_rates": {"classifier": 0.1, "lora_B": 3.0}, "layer_lr_decay": 0.5}
    run = make_run(training=training)
    rows = make_sites(north=14)["north"]["train"]
    start = noisy(load_model(run).initial, 0)
    (ours,) = train(run, {"north": rows}, start, round)
    theirs = plain_peft_loop(run, rows, start, round, by_hand(layered))
    assert difference(ours, theirs) < TOLERANCE
    assert difference(ours, plain_peft_loop(run, rows, start, round, by_hand(lambda _: 1.0))) > 1e-3


def test_a_smaller_rate_moves_an_array_less(make_run: Any, make_sites: Any) -> None:
    rows = make_sites(north=14)["north"]["train"]
    start = noisy(load_model(make_run()).initial, 0)

    def moved(training: Any) -> dict[str, float]:
        (end,) = train(make_run(training=training), {"north": rows}, start)
        delta = end.minus(start)
        return {name: float(np.abs(array).mean()) for name, array in delta.items()}

    plain, slow = moved({}), moved({"learning_rates": {"classifier": 0.1}})
    head = [name for name in plain if "classifier" in name]
    for name in plain:
        ratio = slow[name] / plain[name]
        assert (0.05 < ratio < 0.2) if name in head else (0.7 < ratio < 1.4), name


@pytest.mark.parametrize(
    ("training", "kind", "pattern"),
    [
        ({"learning_rates": {"clasifier": 0.1}}, "names-nothing", "clasifier"),
        ({"learning_rates": {"query": 0.1}, "freeze": ["query"]}, "names-frozen", "query"),
    ],
)
def test_a_rate_for_nothing_is_refused(make_run: Any, training: Any, kind: str, pattern: str) -> None:
    run = make_run(training=training)
    with refuses(ConfigError, kind, where="training.learning_rates") as caught:
        check_patterns(run, load_model(run).initial)
    assert repr(pattern) in str(caught.value)


def test_layers_are_counted_with_the_frozen_ones(make_run: Any) -> None:
    run = make_run(training={"layer_lr_decay": 0.5, "freeze": [r".*layer\.1\..*"]})
    names = list(load_model(run).initial)
    parameters = {n: torch.nn.Parameter(torch.zeros(2, 2)) for n in names if "layer.1" not in n}
    groups = make_optimizer(run.training, parameters, names).param_groups
    assert {group["factor"] for group in groups} == {0.5, 1.0}


def test_weight_decay_leaves_out_what_transformers_leaves_out(make_run: Any) -> None:
    peft = load_model(make_run(adapter={"use_dora": True})).peft
    trained = {name for name, p in peft.named_parameters() if p.requires_grad}
    theirs = set(Trainer.get_decay_parameter_names(None, peft)) & trained  # type: ignore[arg-type]
    assert decayed(trained) == theirs and 0 < len(theirs) < len(trained)


def test_weight_decay_shrinks_weights_and_not_biases(make_run: Any, make_sites: Any) -> None:
    rows = make_sites(north=8)["north"]["train"]
    start = noisy(load_model(make_run()).initial, 0)
    ends = [
        train(make_run(training={"weight_decay": decay, "max_steps": 1}), {"north": rows}, start)[0]
        for decay in (0.0, 1.0)
    ]
    for name in start:
        # One step from the same gradient: decoupled decay takes exactly lr * decay * weight besides.
        expected = ends[0][name] - (0 if name.endswith("bias") else 1e-2 * start[name])
        np.testing.assert_allclose(ends[1][name], expected, atol=1e-6, err_msg=name)


SIZES = {"a": 31, "b": 3, "c": 12, "d": 1}


def theirs_adafactor(named: dict[str, Any]) -> torch.optim.Optimizer:
    from transformers import Adafactor

    weights = [p for name, p in named.items() if not name.endswith("bias")]
    biases = [p for name, p in named.items() if name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False)
    return optimizer


def test_adafactor_is_that_of_transformers(make_run: Any, make_sites: Any, plain_peft_loop: Any) -> None:
    run = make_run(training={"optim": "adafactor", "weight_decay": 0.1})
    rows = make_sites(north=14)["north"]["train"]
    start = noisy(load_model(run).initial, 0)
    (ours,) = train(run, {"north": rows}, start)
    assert difference(ours, plain_peft_loop(run, rows, start, 1, theirs_adafactor)) < TOLERANCE
    (adamw,) = train(make_run(training={"weight_decay": 0.1}), {"north": rows}, start)
    assert difference(ours, adamw) > 1e-3


@pytest.mark.parametrize(
    "training",
    [
        {"optim": "adafactor"},
        {"learning_rates": {"classifier": 0.1}, "layer_lr_decay": 0.5},
        {"sampling": "balanced"},
    ],
    ids=["adafactor", "rates", "balanced"],
)
def test_stacked_sites_are_sites_alone(make_run: Any, make_sites: Any, training: Any) -> None:
    """Adafactor factors a matrix's moments over rows and columns: over one site's matrix, not the stack."""
    run = make_run(training={"max_steps": None, "num_train_epochs": 2, **training})
    sites = {name: site["train"] for name, site in make_sites(**SIZES).items()}
    start = noisy(load_model(run).initial, 0)
    together = train(run, sites, start)
    for (name, rows), stacked in zip(sites.items(), together, strict=True):
        (alone,) = train(run, {name: rows}, start)
        assert difference(stacked, alone) < TOLERANCE, name


def test_8_bit_adamw_is_refused_without_cuda(make_run: Any) -> None:
    run = make_run(training={"optim": "adamw_bnb_8bit"})
    parameters = {"a": torch.nn.Parameter(torch.zeros(2))}
    with refuses(ConfigError, "no-cuda", where="training.optim") as caught:
        make_optimizer(run.training, parameters)
    assert " cpu" in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_8_bit_adamw_moves_about_as_adamw_does(make_run: Any, make_sites: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra `quant`")
    rows = make_sites(north=14)["north"]["train"]
    start = noisy(load_model(make_run()).initial, 0)
    eight, full = (
        train(make_run(training={"optim": optim}), {"north": rows}, start)[0]
        for optim in ("adamw_bnb_8bit", "adamw_torch")
    )
    assert difference(eight, start) > 1e-3 and difference(eight, full) < 1e-2
