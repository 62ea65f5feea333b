"""What the federation costs on top of the training: a simulated run against a bare loop of the same steps.

    python benchmarks/overhead.py [RECIPE] [--repeats 3] [key=value ...]

Both sides load the model, tokenise, take the same optimiser steps on the same rows in the same order and
evaluate on the same rows; the bare loop is PEFT and PyTorch alone. They run in turn in one process, after
imports. The run writes everything it always writes: checkpoints, records, adapter, summary, report. Where its
best round is not its last, it evaluates once more on test rows than the bare loop: that counts as overhead.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from quorate.client.site.data_source import SiteRows
from quorate.client.trainer.optimizers import make_optimizer, set_learning_rate
from quorate.client.trainer.schedule import BatchPlan, lr_factor
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.load import load_run, load_sites_file
from quorate.shared.config.run_config import RunConfig
from quorate.shared.model.lora_model import LoadedModel, adapter_of, load_model
from quorate.shared.tasks.task import Example
from quorate.simulations.runner import simulate
from quorate.simulations.simulated_sites import default_sites_path, find_recipe, load_sites

LoadedRuns = dict[str, dict[str, list[Example]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    path = find_recipe(arguments.recipe)
    run = load_run(path, arguments.overrides)
    sites = default_sites_path(path)
    rows = load_sites(load_sites_file(sites), sites.parent, run)

    ours, bare = [], []
    for repeat in range(arguments.repeats + 1):  # the first pair warms up and is not counted
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            simulate(run, rows, Path(folder) / "run")
            seconds = time.monotonic() - started
        started = time.monotonic()
        bare_loop(run, rows)
        other = time.monotonic() - started
        print(
            f"pair {repeat}: run {seconds:.1f} s, bare loop {other:.1f} s, ratio {seconds / other:.3f}",
            flush=True,
        )
        if repeat:
            ours.append(seconds)
            bare.append(other)
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    print(f"run {statistics.median(ours):.1f} s, bare loop {statistics.median(bare):.1f} s (medians)")
    print(
        f"overhead {100 * (statistics.median(ratios) - 1):+.1f} % "
        f"(ratio of each of {len(ratios)} pairs: {', '.join(f'{ratio:.3f}' for ratio in ratios)}); "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {sys.version.split()[0]}"
    )


def bare_loop(run: RunConfig, rows: Mapping[str, SiteRows]) -> Adapter:
    """Federated averaging as a script would do it: one site after the other on one PEFT model."""
    model = load_model(run)
    data: LoadedRuns = {
        site: {split: run.task.encode(list(each), model.processor) for split, each in splits.items()}
        for site, splits in rows.items()
    }
    current = model.initial
    for round in range(1, run.federation.rounds + 1):
        trained = [train_site(run, model, site, data[site]["train"], current, round) for site in data]
        sizes = np.array([len(data[site]["train"]) for site in data], dtype=np.float64)
        shares = sizes / sizes.sum()
        current = Adapter(
            {
                name: sum(s * t[name] for s, t in zip(shares, trained, strict=True)).astype(np.float32)
                for name in current
            }
        )
        evaluate(run, model, current, data, "validation")
    evaluate(run, model, current, data, "test")
    return current


def train_site(
    run: RunConfig, model: LoadedModel, site: str, examples: list[Example], start: Adapter, round: int
) -> Adapter:
    model.write_adapter(start)
    parameters = {name: p for name, p in model.peft.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(run.training, parameters)
    plan = BatchPlan(len(examples), run.training, run.seed, site)
    total = run.federation.rounds * plan.steps_per_round
    for step, micro_batches in enumerate(plan.steps(round)):
        optimizer.zero_grad()
        count = sum(map(len, micro_batches))
        for micro in micro_batches:
            batch = run.task.collate([examples[row] for row in micro], model.processor)
            (run.task.loss(model.peft(**batch.inputs).logits, batch).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), run.training.max_grad_norm)
        factor = lr_factor(run.training, (round - 1) * plan.steps_per_round + step, total)
        set_learning_rate(optimizer, run.training.learning_rate * factor)
        optimizer.step()
    return adapter_of(model.peft)


def evaluate(run: RunConfig, model: LoadedModel, adapter: Adapter, data: LoadedRuns, split: str) -> None:
    model.write_adapter(adapter)
    size = run.training.per_device_eval_batch_size
    for splits in data.values():
        examples = sorted(splits[split], key=run.task.length)
        for start in range(0, len(examples), size):
            batch = run.task.collate(examples[start : start + size], model.processor)
            with torch.inference_mode():
                logits = model.peft(**batch.inputs).logits
                run.task.outcomes(logits, batch)
                run.task.loss(logits, batch)


if __name__ == "__main__":
    main()
