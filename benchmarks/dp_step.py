"""What a DP-SGD step costs over a step without privacy, on the same rows.

    python benchmarks/dp_step.py [--rows 16] [--repeats 20]

MiniLM with the adapter of the recipe `medquad`, texts of 96 tokens. In every repeat each kind of step is
taken once on the same batch, in turn; figures are medians over the repeats of the ratio to the plain step
next to it. A step is forward, backward, clipping, noise and the optimiser:

- plain: one summed gradient, clipped as a whole;
- own layer: the site's private step (`quorate.client.trainer`);
- own layer, secure: the same with `secure_rng`;
- Opacus hooks: GradSampleModule and DPOptimizer on PEFT's own model.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quorate.client.trainer.dp.clipping import ClippedGradientSum
from quorate.client.trainer.dp.row_isolation import backward_by_row
from quorate.client.trainer.optimizers import make_optimizer
from quorate.client.trainer.passes import Share, row_losses, training_mode
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.config.load import load_run
from quorate.shared.config.run_config import RunConfig
from quorate.shared.model.lora_model import load_model
from quorate.shared.privacy.secure_random import SecretSource, secret_source
from quorate.shared.tasks.task import Example, Row
from quorate.simulations.simulated_sites import find_recipe

NORM, NOISE = 0.5, 1.0
Step = Callable[[list[Example]], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    run = load_run(find_recipe("medquad"), ["task.class_weights=none"])
    steps = {"plain": plain_step(run), "own layer": private_step(run, secure=False)}
    steps["own layer, secure"] = private_step(run, secure=True)
    steps["Opacus hooks"] = opacus_step(run)
    processor = load_model(run).processor
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(arguments.repeats + 2):  # the first two warm up
        examples = texts(run, processor, arguments.rows, seed=repeat)
        for name, step in steps.items():
            started = time.perf_counter()
            step(examples)
            if repeat > 1:
                seconds[name].append(time.perf_counter() - started)
    print(f"{arguments.rows} rows, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, found in seconds.items():
        ratios = sorted(a / b for a, b in zip(found, seconds["plain"], strict=True))
        quarter = len(ratios) // 4
        print(
            f"{name:18} {statistics.median(ratios):.3f} of the plain step (quartiles {ratios[quarter]:.3f} "
            f"to {ratios[-1 - quarter]:.3f}); median {1000 * statistics.median(found):.0f} ms"
        )


def texts(run: RunConfig, processor: Any, count: int, seed: int) -> list[Example]:
    """Texts of made-up words, each of the longest length."""
    draw = random.Random(seed)
    words = ("fever", "heart", "of", "liver")
    made = [{"text": " ".join(draw.choices(words, k=120)), "label": 0} for _ in range(count)]
    return run.task.encode([Row(values, "benchmark") for values in made], processor)


def plain_step(run: RunConfig) -> Step:
    model = load_model(run)
    stack = AdapterStack.install(model)
    stack.load([model.initial], model.initial)
    parameters = stack.site_parameters(0)
    optimizer = make_optimizer(run.training, parameters)

    def step(examples: list[Example]) -> None:
        for array in stack.arrays.values():
            array.grad = None
        with training_mode(stack, run, seed=0):
            each, _ = row_losses(stack, run, [Share(0, examples, torch.Generator())])
            each.mean().backward()  # type: ignore[no-untyped-call]
        for name, parameter in parameters.items():
            gradient = stack.arrays[name].grad
            assert gradient is not None
            parameter.grad = gradient[0]
        nn.utils.clip_grad_norm_(parameters.values(), NORM)
        optimizer.step()

    return step


def private_step(run: RunConfig, *, secure: bool) -> Step:
    model = load_model(run)
    stack = AdapterStack.install(model)
    stack.load([model.initial], model.initial)
    parameters = stack.site_parameters(0)
    optimizer = make_optimizer(run.training, parameters)
    source: SecretSource = secret_source(secure)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}

    def step(examples: list[Example]) -> None:
        total = ClippedGradientSum(shapes, NORM, model.peft.device)
        with training_mode(stack, run, seed=0):
            kept = backward_by_row(stack, run, [Share(0, examples, torch.Generator())])
        total.add(kept.of_site(stack.arrays, 0, len(examples)), range(len(examples)))
        for name, noisy in total.noised(source, NOISE).items():
            parameters[name].grad = noisy / len(examples)
        optimizer.step()

    return step


def opacus_step(run: RunConfig) -> Step:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = load_model(run)
    for module in model.peft.train().modules():  # its hooks look at nothing in eval mode
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    hooked = GradSampleModule(model.peft, loss_reduction="sum", strict=False)
    parameters = {name: p for name, p in hooked.named_parameters() if p.requires_grad}
    optimizer: Any = DPOptimizer(
        make_optimizer(run.training, parameters),
        noise_multiplier=NOISE,
        max_grad_norm=NORM,
        expected_batch_size=16,
    )

    def step(examples: list[Example]) -> None:
        batch = run.task.collate(examples, model.processor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.task.loss(hooked(**batch.inputs).logits, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
