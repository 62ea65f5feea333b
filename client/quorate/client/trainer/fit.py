"""Train a stack of sites in one pass: each site ends exactly where it would have ended alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from quorate.client.trainer.dp.dp_sgd import fit_privately
from quorate.client.trainer.optimizers import make_optimizer, set_learning_rate
from quorate.client.trainer.passes import Fitted, Share, SiteTask, row_losses, training_mode
from quorate.client.trainer.schedule import BatchPlan, lr_factor
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.progress import OnStep, StepEvent, between_passes
from quorate.shared.seeds import derive_seed, rng

__all__ = ["Fitted", "SiteTask", "fit"]


@dataclass
class _Member:
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
    stack: AdapterStack,
    run: RunConfig,
    round: int,
    sites: Sequence[SiteTask],
    trainable: frozenset[str],
    on_step: OnStep,
) -> list[Fitted]:
    """Train the sites of one stack for one round.

    Args:
        round: from 1; decides data order, dropout and the place in the learning-rate schedule.
        trainable: arrays that move.
    Returns: one result per site, in order; under record- or group-level privacy that of `fit_privately`.
    """
    if isinstance(run.privacy, SitePrivacy):
        return fit_privately(stack, run, round, sites, trainable, on_step)
    stack.load([site.start for site in sites], trainable)
    members = [_member(stack, run, round, position, site) for position, site in enumerate(sites)]
    training = _Training(stack, run, round, members)
    seed = derive_seed(run.seed, "base-dropout", round, *(site.site for site in sites))
    with training_mode(stack, run, seed):
        for step in range(max(len(member.steps) for member in members)):
            live = [i for i, member in enumerate(members) if step < len(member.steps)]
            names = tuple(members[i].task.site for i in live)
            taken = StepEvent(names, round, step + 1, len(members[live[0]].steps), None)
            losses = training.step(step, live, between_passes(on_step, taken))
            on_step(replace(taken, loss=sum(losses) / len(losses)))
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
    plan = BatchPlan(len(site.examples), run.training, run.seed, site.site, labels)
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


@dataclass(frozen=True)
class _Training:
    stack: AdapterStack
    run: RunConfig
    round: int
    members: list[_Member]

    def step(self, step: int, live: list[int], between: Callable[[], None]) -> list[float]:
        """Take one optimiser step with the sites that have steps left (`live`); return their losses."""
        for parameter in self.stack.arrays.values():
            parameter.grad = None
        steps = {i: self.members[i].steps[step] for i in live}
        losses = dict.fromkeys(live, 0.0)
        for micro in range(max(map(len, steps.values()))):
            if micro:
                between()
            present = [i for i in live if micro < len(steps[i])]
            shares = [self._share(i, step, micro) for i in present]
            rows = [sum(map(len, steps[i])) for i in present]
            with row_losses(self.stack, self.run, shares) as (each, real):
                # Each site's share of its step's mean loss, [k].
                per_site = (each * real).sum(dim=1) / torch.tensor(rows, device=each.device)
                per_site.sum().backward()  # type: ignore[no-untyped-call]
            for i, loss in zip(present, per_site.detach().tolist(), strict=True):
                losses[i] += loss
        for i in live:
            self._update(i, step)
            self.members[i].loss_sum += losses[i]
        return list(losses.values())

    def _share(self, position: int, step: int, micro: int) -> Share:
        member, run = self.members[position], self.run
        drawn = rng(run.seed, "augment", member.task.site, self.round, step, micro)
        rows = [member.task.examples[row] for row in member.steps[step][micro]]
        return Share(position, run.task.augment(rows, drawn, self.stack.model.processor), member.generator)

    def _update(self, position: int, step: int) -> None:
        member, training = self.members[position], self.run.training
        for name, parameter in member.parameters.items():
            gradient = self.stack.arrays[name].grad
            parameter.grad = None if gradient is None else self.stack.own(position, name, gradient[position])
        norm = nn.utils.clip_grad_norm_(member.parameters.values(), training.max_grad_norm or float("inf"))
        member.norm_sum += float(norm)
        factor = lr_factor(training, member.first_step + step, member.total_steps)
        member.learning_rate = training.learning_rate * factor
        set_learning_rate(member.optimizer, member.learning_rate)
        member.optimizer.step()
