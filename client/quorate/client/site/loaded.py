"""What a site process keeps ready for the requests of a run: base model, adapters on it, rows as examples."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from quorate.client.privacy.units import check_groups_apart, check_some, plan_of
from quorate.client.site.data_source import DataSource
from quorate.client.trainer.dp.row_isolation import check_rows_apart
from quorate.client.trainer.sampling import few_shot
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError, QuorateError
from quorate.shared.model.base_model import default_device
from quorate.shared.model.lora_model import LoadedModel, load_model
from quorate.shared.privacy.claim import PrivacyClaim
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Example, Row

log = logging.getLogger(__name__)


@dataclass
class Resident:
    """What stays loaded while requests of one run come in.

    Args:
        examples: (data alias, site, split, rows of each label) -> examples.
        readings: which reading of the rows they were made of.
    """

    run: RunConfig
    model: LoadedModel
    stack: AdapterStack
    examples: dict[tuple[str, str, Split, int | None], list[Example]]
    readings: int = 0


class LoadedRuns:
    """Loads what a run needs when it first asks, and keeps it until a run asks for something else.

    Args:
        source: whoever finds rows (and the base model) for a run.
        device: where to train; the first visible GPU, else the CPU, when left out.
        as_given: names of which all training rows are used, whatever `training.examples_per_class` says.
        on_model: told when a base model is in memory, and when it is let go of.
    """

    def __init__(
        self,
        source: DataSource,
        device: torch.device | None,
        as_given: Collection[str],
        on_model: Callable[[bool], None],
    ) -> None:
        self.source = source
        self._device = device
        self._as_given = frozenset(as_given)
        self._on_model = on_model
        self.resident: Resident | None = None

    def load(self, run: RunConfig) -> Resident:
        """Return the base model under this run, loaded again only when the run asks for another one."""
        run = self.source.at_hand(run)
        resident = self.resident
        if resident is None or _model_key(resident.run) != _model_key(run):
            self.resident = None  # let go of the old base before the new one takes its memory
            self._on_model(False)
            started = time.monotonic()
            model = load_model(run, device=self._device)
            seconds = time.monotonic() - started
            log.info("base model %s loaded in %.1f s onto %s", model.sha256[:12], seconds, model.peft.device)
            resident = Resident(run, model, AdapterStack.install(model), {})
            self._on_model(True)
        elif _rows_key(resident.run) != _rows_key(run):
            resident.examples.clear()  # those of the run in hand alone stay in memory
        resident.run = run
        self.resident = resident
        self._let_go(resident)
        return resident

    def examples(self, resident: Resident, site: str, split: Split) -> list[Example]:
        """Return a site's examples for a run, weighed for training.

        Raises: DataError: no training rows, or one that the task cannot use. ModelError.
        """
        self.source.rows(resident.run, site)  # which reads them again where that is due
        self._let_go(resident)
        few = resident.run.training.examples_per_class if split == "train" else None
        key = (resident.run.data, site, split, few)
        if key not in resident.examples:
            task = resident.run.task
            rows = self.rows(resident.run, site, split)
            if split == "train":
                check_some(site, rows)
            check_groups_apart(resident.run, site, self.rows(resident.run, site, "train"), split, rows)
            examples = task.encode(rows, resident.model.processor)
            resident.model.check_tokens(examples)
            resident.examples[key] = task.weigh(task.pack(examples)) if split == "train" else examples
        return resident.examples[key]

    def _let_go(self, resident: Resident) -> None:
        """Drop examples of rows that are to be read again, or were."""
        if resident.readings != self.source.readings:
            resident.examples.clear()
            resident.readings = self.source.readings

    def rows(self, run: RunConfig, site: str, split: Split) -> Sequence[Row]:
        """Return the rows that a run uses, of training rows maybe a few of each label."""
        rows = self.source.rows(run, site).get(split, ())
        return few_shot(run, site, rows) if split == "train" and site not in self._as_given else rows

    def claim(self, resident: Resident, site: str) -> PrivacyClaim | None:
        """Return what the site claims for its rows, once it is sure to keep it; None without privacy.

        Raises: as `plan_of`; ModelError: rows of the model cannot be told apart.
        """
        plan = plan_of(resident.run, site, self.rows(resident.run, site, "train"))
        if plan is None:
            return None
        examples = self.examples(resident, site, "train")
        check_rows_apart(resident.stack, resident.run, site, examples)
        return plan.claim()

    def claim_kept(self, run: RunConfig, site: str) -> PrivacyClaim | None:
        """Return what the site claims of a run that is done, for its report."""
        try:
            plan = plan_of(run, site, self.rows(run, site, "train"))
            return None if plan is None else plan.claim()
        except QuorateError as error:  # rows that are gone since must not cost the site its result
            log.warning("what the run claims for this site's rows cannot be worked out again: %s", error)
            return None


def _model_key(run: RunConfig) -> tuple[object, ...]:
    return run.model, run.adapter, run.task, run.seed


def _rows_key(run: RunConfig) -> tuple[object, ...]:
    # Under group-level privacy rows are checked when they are made ready, so they are made ready again.
    return run.data, run.training.examples_per_class, run.privacy


def training_device(name: str) -> torch.device:
    """Return the device that site.yaml names.

    Raises: ConfigError: this machine has no such device.
    """
    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"site.yaml, device: this machine cannot compute on {name!r} "
            f"({str(error).splitlines()[0][:200]}); write cpu, cuda, cuda:N or auto."
        ) from error
    return device
