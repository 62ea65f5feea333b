"""DP-SGD at the sites of a stack (Abadi et al. 2016, arXiv:1607.00133).

A step draws each of a site's units (rows, or groups of rows) by a coin of its own, clips every unit's
gradient over all trained arrays, adds noise to the sum and divides by the *expected* number of units. An
empty batch is a step like any other: noise alone. Coins, noise, dropout and augmentation come from secret
randomness, so two runs of one seed differ. Nothing that a step measures on rows leaves it: metrics are the
mechanism's own.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from quorate.client.trainer.dp.clipping import ClippedGradientSum
from quorate.client.trainer.dp.noise import secret_generator
from quorate.client.trainer.dp.plan import PrivatePlan, private_plan
from quorate.client.trainer.dp.row_isolation import backward_by_row, check_batch_statistics, check_rows_apart
from quorate.client.trainer.optimizers import make_optimizer, set_learning_rate
from quorate.client.trainer.passes import Fitted, Share, SiteTask, training_mode
from quorate.client.trainer.schedule import lr_factor
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.privacy.secure_random import SecretSource, secret_source
from quorate.shared.progress import OnStep, StepEvent, between_passes

Unit = list[int]
"""Indices of a record's one row, or of a group's rows."""


@dataclass
class _PrivateMember:
    task: SiteTask
    plan: PrivatePlan
    units: list[Unit]
    most_rows: int
    first_step: int
    source: SecretSource
    dropout: torch.Generator
    augment: np.random.Generator
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    learning_rate: float = 0.0


def fit_privately(
    stack: AdapterStack,
    run: RunConfig,
    round: int,
    sites: Sequence[SiteTask],
    trainable: frozenset[str],
    on_step: OnStep,
) -> list[Fitted]:
    """Train the sites of one stack for one round with record- or group-level privacy.

    Args:
        round: from 1; decides the place in the learning-rate schedule.
        trainable: arrays that move; a unit's gradient is clipped over all of them together.
    Returns: one result per site, in order; their metrics depend on no row.
    Raises: ModelError: rows of this model cannot be told apart. ConfigError: see `private_plan`.
    """
    lengths = [check_rows_apart(stack, run, site.site, site.examples) for site in sites]
    length = max((each for each in lengths if each is not None), default=None)
    stack.load([site.start for site in sites], trainable)
    members = [_member(stack, run, round, position, site) for position, site in enumerate(sites)]
    with training_mode(stack, run, seed=None):
        check_batch_statistics(stack.model)
        for step in range(max(member.plan.steps_per_round for member in members)):
            live = {i: each for i, each in enumerate(members) if step < each.plan.steps_per_round}
            names, first = tuple(each.task.site for each in live.values()), next(iter(live.values()))
            taken = StepEvent(names, round, step + 1, first.plan.steps_per_round, None)
            _step(stack, run, live, step, length, between_passes(on_step, taken))
            on_step(taken)
    return [
        Fitted(
            stack.read(position),
            member.plan.steps_per_round,
            {
                "learning_rate": member.learning_rate,
                "noise_multiplier": member.plan.noise_multiplier,
                "clipping_norm": member.plan.clipping_norm,
                "sampling_probability": member.plan.sampling_probability,
            },
        )
        for position, member in enumerate(members)
    ]


def units_of(rows: int, groups: Sequence[str] | None) -> list[Unit]:
    """Return the rows of each unit: every row by itself, or those that share a group."""
    if groups is None:
        return [[row] for row in range(rows)]
    units: dict[str, Unit] = {}
    for row, group in enumerate(groups):
        units.setdefault(group, []).append(row)
    return list(units.values())


def draw_batch(
    units: Sequence[Unit], probability: float, most_rows: int, source: SecretSource
) -> list[tuple[int, int]]:
    """Draw a Poisson batch.

    Args:
        units: rows of each unit.
        probability: of a unit, independent of all others.
        most_rows: rows of a drawn unit that are taken, afresh each time.
    Returns: (unit, row) pairs; those of one unit stand together.
    """
    drawn = np.flatnonzero(source.uniform(len(units)) < probability).tolist()
    batch = []
    for unit in drawn:
        rows = units[unit]
        if len(rows) > most_rows:
            rows = [rows[place] for place in source.subset(most_rows, len(rows))]
        batch += [(unit, row) for row in rows]
    return batch


def _member(stack: AdapterStack, run: RunConfig, round: int, position: int, site: SiteTask) -> _PrivateMember:
    privacy = run.privacy
    assert isinstance(privacy, SitePrivacy), "only called where it is"
    units = units_of(len(site.examples), site.groups if privacy.unit == "group" else None)
    plan = private_plan(run, len(units))
    parameters = stack.site_parameters(position)
    return _PrivateMember(
        task=site,
        plan=plan,
        units=units,
        most_rows=privacy.max_records_per_group,
        first_step=(round - 1) * plan.steps_per_round,
        source=secret_source(privacy.secure_rng),
        dropout=secret_generator(next(iter(parameters.values())).device),
        augment=np.random.default_rng(secrets.randbits(128)),
        parameters=parameters,
        optimizer=make_optimizer(run.training, parameters, stack.arrays),
    )


def _step(
    stack: AdapterStack,
    run: RunConfig,
    live: Mapping[int, _PrivateMember],
    step: int,
    length: int | None,
    between: Callable[[], None],
) -> None:
    """Take one private step with every site that has steps left, each on a batch of its own.

    Args:
        live: these sites, by their position in the stack.
        length: see `row_losses`.
        between: called between two passes.
    """
    size = run.training.per_device_train_batch_size
    passes = {i: list(_passes(_drawn(member), size)) for i, member in live.items()}
    sums = {i: _empty_sum(member) for i, member in live.items()}
    for number in range(max(map(len, passes.values()))):
        if number:
            between()
        present = [i for i in live if number < len(passes[i])]
        shares = [_share(stack, run, i, live[i], passes[i][number][0]) for i in present]
        kept = backward_by_row(stack, run, shares, length)
        for at, i in enumerate(present):
            pairs, goes_on = passes[i][number]
            whole = kept.of_site(stack.arrays, at, len(pairs))
            gradients = {name: stack.own(i, name, array) for name, array in whole.items()}
            sums[i].add(gradients, [unit for unit, _ in pairs], goes_on=goes_on)
    for i, member in live.items():
        _add_canaries(member, sums[i], size)
        _update(run, member, sums[i], step)


def _share(
    stack: AdapterStack, run: RunConfig, position: int, member: _PrivateMember, drawn: list[tuple[int, int]]
) -> Share:
    rows = [member.task.examples[row] for _, row in drawn]
    augmented = run.task.augment(rows, member.augment, stack.model.processor)
    return Share(position, augmented, member.dropout)


def _add_canaries(member: _PrivateMember, total: ClippedGradientSum, size: int) -> None:
    """Add the canaries of an audit that are drawn in this step, by coins and clipping of any other unit."""
    canaries, plan = member.task.canaries, member.plan
    if canaries is None:
        return
    within = np.flatnonzero(canaries.included)
    drawn = within[member.source.uniform(len(within)) < plan.sampling_probability]
    for start in range(0, len(drawn), size):
        some = drawn[start : start + size]
        total.add(canaries.gradients(some, member.parameters, plan.clipping_norm), some.tolist())


def _drawn(member: _PrivateMember) -> list[tuple[int, int]]:
    return draw_batch(member.units, member.plan.sampling_probability, member.most_rows, member.source)


def _passes(batch: list[tuple[int, int]], size: int) -> Iterator[tuple[list[tuple[int, int]], bool]]:
    """Cut a batch into forward passes of `size` rows, and say of each whether its last unit goes on."""
    for start in range(0, len(batch), size):
        part, rest = batch[start : start + size], batch[start + size :]
        yield part, bool(rest) and rest[0][0] == part[-1][0]


def _empty_sum(member: _PrivateMember) -> ClippedGradientSum:
    shapes = {name: tuple(parameter.shape) for name, parameter in member.parameters.items()}
    device = next(iter(member.parameters.values())).device
    return ClippedGradientSum(shapes, member.plan.clipping_norm, device)


def _update(run: RunConfig, member: _PrivateMember, total: ClippedGradientSum, step: int) -> None:
    plan = member.plan
    noisy = total.noised(member.source, plan.noise_multiplier)
    if member.task.canaries is not None:
        member.task.canaries.observe(noisy, plan.clipping_norm)
    for name, array in noisy.items():
        member.parameters[name].grad = array / plan.expected_batch
    factor = lr_factor(run.training, member.first_step + step, plan.total_steps)
    member.learning_rate = run.training.learning_rate * factor
    set_learning_rate(member.optimizer, member.learning_rate)
    member.optimizer.step()
