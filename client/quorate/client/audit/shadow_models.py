"""Adapters trained beside the audited one, and what a row costs each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from quorate.client.models.predictions import check_adapter_dir, with_adapter
from quorate.client.privacy.units import groups_of
from quorate.client.trainer.dp.canaries import Canaries
from quorate.client.trainer.evaluate import forward
from quorate.client.trainer.fit import SiteTask, fit
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.selection import moving
from quorate.shared.config.run_config import RunConfig
from quorate.shared.model.base_model import default_device, load_base, placed
from quorate.shared.model.lora_model import LoadedModel, load_model
from quorate.shared.progress import OnStep, ignore_step
from quorate.shared.tasks.task import Example, Row

Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Shadow:
    """A base model on which adapters are trained for an audit."""

    run: RunConfig
    model: LoadedModel
    stack: AdapterStack

    @classmethod
    def of(cls, run: RunConfig, device: torch.device | None = None) -> Shadow:
        """Load the run's base model.

        Raises: ModelError.
        """
        model = load_model(run, device=device)
        return cls(run, model, AdapterStack.install(model))

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Return rows as an evaluation sees them: whole, in order, with weight 1.

        Raises: DataError: a row the task cannot use.
        """
        return self.run.task.encode(rows, self.model.processor)

    def train(
        self,
        rows: Mapping[str, Sequence[Row]],
        on_step: OnStep = ignore_step,
        canaries: Mapping[str, Canaries] | None = None,
    ) -> dict[str, Adapter]:
        """Train an adapter on each set of rows, alone, as long as the run trains a site; in shared passes.

        Args: as `rounds`.
        """
        *_, trained = self.rounds(rows, on_step, canaries)
        return trained

    def rounds(
        self,
        rows: Mapping[str, Sequence[Row]],
        on_step: OnStep = ignore_step,
        canaries: Mapping[str, Canaries] | None = None,
    ) -> Iterator[dict[str, Adapter]]:
        """Yield what each set of rows, trained alone, has come to after each of the run's rounds.

        Args:
            rows: name -> training rows; the name decides, with the run's seed, the order of rows.
            canaries: name -> what an audit puts beside these rows.
        """
        run, task = self.run, self.run.task
        examples = {name: task.weigh(task.pack(self.encode(each))) for name, each in rows.items()}
        groups = {name: groups_of(run, name, each) for name, each in rows.items()}
        trained = dict.fromkeys(rows, self.model.initial)
        for round in range(1, run.federation.rounds + 1):
            trainable = moving(run, self.model.initial, round)
            tasks = [
                SiteTask(name, examples[name], trained[name], groups[name], (canaries or {}).get(name))
                for name in rows
            ]
            for start in range(0, len(tasks), run.training.max_stack):
                share = tasks[start : start + run.training.max_stack]
                fitted = fit(self.stack, run, round, share, trainable, on_step)
                trained |= {task.site: done.adapter for task, done in zip(share, fitted, strict=True)}
            yield dict(trained)

    def losses(self, adapter: Adapter, examples: Sequence[Example]) -> Losses:
        """Return the loss of each example under an adapter, [n]."""
        found = np.empty(len(examples))
        for rows, batch, logits in forward(self.stack, self.run, adapter, examples):
            found[rows] = self.run.task.loss(logits, batch).double().cpu().numpy()
        return found


def released_losses(adapter_dir: Path, run: RunConfig, examples: Sequence[Example]) -> Losses:
    """Return the loss of each example under an exported adapter, [n], loaded as PEFT loads it.

    Raises: AdapterError: the folder is not such an adapter.
    """
    check_adapter_dir(adapter_dir)
    base = load_base(run)
    model = placed(with_adapter(base, adapter_dir).eval(), run, default_device())
    found, size = [], run.training.per_device_eval_batch_size
    for start in range(0, len(examples), size):
        batch = run.task.collate(examples[start : start + size], base.processor).to(model.device)
        with torch.inference_mode():
            found.append(run.task.loss(run.task.forward(model, batch), batch).double().cpu().numpy())
    return np.concatenate(found) if found else np.empty(0)
