"""Train a stack of sites in one pass: each site ends exactly where it would have ended alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quorate.client.trainer.checkpointing import checkpointed
from quorate.client.trainer.optimizers import make_optimizer, set_learning_rate
from quorate.client.trainer.schedule import Plan, lr_factor
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.adapter import Adapter
from quorate.shared.config.run import RunConfig, TrainingConfig
from quorate.shared.model import LoadedModel
from quorate.shared.progress import OnStep, StepEvent
from quorate.shared.seeds import derive_seed, rng
from quorate.shared.tasks.base import Batch, Example


@dataclass(frozen=True)
class SiteTask:
    """One site's part of a stacked pass.

    Args:
        site: its name, which with the seed decides data order and dropout.
        examples: its training examples, weighed.
        start: the adapter it starts from.
    """

    site: str
    examples: Sequence[Example]
    start: Adapter


@dataclass(frozen=True)
class Fitted:
    """What one site's training gave."""

    adapter: Adapter
    steps: int
    metrics: dict[str, float]


@dataclass
class _Member:
    """A site's own optimiser, plan and books while the stack trains."""

    task: SiteTask
    steps: list[list[list[int]]]
    first_step: int
    total_steps: int
    generator: torch.Generator
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    learning_rate: float = 0.0


def fit(
    model: LoadedModel,
    stack: AdapterStack,
    run: RunConfig,
    round: int,
    sites: Sequence[SiteTask],
    trainable: frozenset[str],
    on_step: OnStep,
) -> list[Fitted]:
    """Train the sites of one stack for one round.

    Args:
        model: the base the stack was installed on.
        round: from 1; decides data order, dropout and the place in the learning-rate schedule.
        trainable: arrays that move.
    Returns: one result per site, in order.
    """
    stack.load([site.start for site in sites], trainable)
    members = [_member(stack, run, round, position, site) for position, site in enumerate(sites)]
    with _training(model, stack, run, round, sites):
        for step in range(max(len(member.steps) for member in members)):
            live = [i for i, member in enumerate(members) if step < len(member.steps)]
            losses = _step(model, stack, run, members, live, round, step)
            names = tuple(members[i].task.site for i in live)
            on_step(StepEvent(names, round, step + 1, len(members[live[0]].steps), sum(losses) / len(losses)))
    return [
        Fitted(
            stack.read(position),
            len(member.steps),
            {
                "train_loss": member.loss_sum / len(member.steps),
                "grad_norm": member.norm_sum / len(member.steps),
                "learning_rate": member.learning_rate,
            },
        )
        for position, member in enumerate(members)
    ]


def _member(stack: AdapterStack, run: RunConfig, round: int, position: int, site: SiteTask) -> _Member:
    balanced = run.training.sampling == "balanced"
    labels = [run.task.labels_of(example) for example in site.examples] if balanced else ()
    plan = Plan(len(site.examples), run.training, run.seed, site.site, labels)
    parameters = stack.site_parameters(position)
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device).manual_seed(derive_seed(run.seed, "dropout", site.site, round))
    return _Member(
        task=site,
        steps=plan.steps(round),
        first_step=(round - 1) * plan.steps_per_round,
        total_steps=run.federation.rounds * plan.steps_per_round,
        generator=generator,
        parameters=parameters,
        optimizer=make_optimizer(run.training, parameters, stack.arrays),
    )


def _step(
    model: LoadedModel,
    stack: AdapterStack,
    run: RunConfig,
    members: list[_Member],
    live: list[int],
    round: int,
    step: int,
) -> list[float]:
    """Take one optimiser step with every site that has steps left; return their losses."""
    for parameter in stack.arrays.values():
        parameter.grad = None
    losses = dict.fromkeys(live, 0.0)
    for micro in range(max(len(members[i].steps[step]) for i in live)):
        present = [i for i in live if micro < len(members[i].steps[step])]
        per_site = _forward(model, stack, run, members, present, round, step, micro)
        per_site.sum().backward()  # type: ignore[no-untyped-call]
        for i, loss in zip(present, per_site.detach().tolist(), strict=True):
            losses[i] += loss
    for i in live:
        _update(stack, run.training, members[i], i, step)
        members[i].loss_sum += losses[i]
    return list(losses.values())


def _forward(
    model: LoadedModel,
    stack: AdapterStack,
    run: RunConfig,
    members: list[_Member],
    present: list[int],
    round: int,
    step: int,
    micro: int,
) -> Tensor:
    """Return each present site's share of its step's mean loss, [k].

    Sites with fewer rows are filled up with copies of a row of theirs that carry no loss.
    """
    examples: list[list[Example]] = []
    for i in present:
        task = members[i].task
        drawn = rng(run.seed, "augment", task.site, round, step, micro)
        rows = [task.examples[row] for row in members[i].steps[step][micro]]
        examples.append(run.task.augment(rows, drawn, model.processor))
    share = max(map(len, examples))
    filled = [e for site in examples for e in (*site, *[site[0]] * (share - len(site)))]
    batch = run.task.collate(filled, model.processor).to(model.peft.device)
    real = torch.tensor(
        [[r < len(site) for r in range(share)] for site in examples], device=batch.weights.device
    )
    rows_of_step = [sum(map(len, members[i].steps[step])) for i in present]
    _lay_out(stack, run, members, present, examples, batch)
    logits = _logits(model, run, batch)
    each = run.task.loss(logits, batch).view(len(present), share)
    return (each * real).sum(dim=1) / torch.tensor(rows_of_step, device=each.device)


def _lay_out(
    stack: AdapterStack,
    run: RunConfig,
    members: list[_Member],
    present: list[int],
    examples: list[list[Example]],
    batch: Batch,
) -> None:
    layout = stack.layout
    layout.sites = tuple(present)
    layout.rows = tuple(map(len, examples))
    layout.lengths = tuple(max(map(run.task.length, site)) for site in examples)
    layout.length = max(layout.lengths)
    head = run.adapter.head
    with_dropout = run.adapter.lora_dropout > 0 or (head is not None and head.dropout > 0)
    layout.generators = tuple(members[i].generator for i in present) if with_dropout else None


def _logits(model: LoadedModel, run: RunConfig, batch: Batch) -> Any:
    device = model.peft.device
    with torch.autocast(device.type, torch.bfloat16, enabled=run.training.bf16):
        return run.task.forward(model.peft, batch)


def _update(stack: AdapterStack, training: TrainingConfig, member: _Member, position: int, step: int) -> None:
    """Clip and apply one site's gradient with its own optimiser and learning rate."""
    for name, parameter in member.parameters.items():
        gradient = stack.arrays[name].grad
        parameter.grad = None if gradient is None else gradient[position]
    norm = nn.utils.clip_grad_norm_(member.parameters.values(), training.max_grad_norm or float("inf"))
    member.norm_sum += float(norm)
    factor = lr_factor(training, member.first_step + step, member.total_steps)
    member.learning_rate = training.learning_rate * factor
    set_learning_rate(member.optimizer, member.learning_rate)
    member.optimizer.step()


@contextmanager
def _training(
    model: LoadedModel, stack: AdapterStack, run: RunConfig, round: int, sites: Sequence[SiteTask]
) -> Any:
    """Put the model in training mode and back.

    The frozen base stays in eval mode unless its own dropout is asked for; BatchNorm always does, or the
    rows of a batch would leak into one another. The global generator, from which only the base's own dropout
    draws, is seeded by round and sites and put back.
    """
    devices = [model.peft.device] if model.peft.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(run.seed, "base-dropout", round, *(site.site for site in sites)))
        model.peft.train(run.training.base_dropout)
        for module in model.peft.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        stack.set_lora_training(True)
        saving = run.training.gradient_checkpointing
        try:
            with checkpointed(model, stack.layout) if saving else nullcontext():
                yield
        finally:
            model.peft.eval()
            stack.layout.generators = None
