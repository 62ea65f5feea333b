"""The interface of an aggregation rule: a site half and a server half in one frozen value.

A rule is one file with one class. The class is the rule's configuration as well (its fields are what the
run file may say about it), so whatever a run file names is fully described by this package.

    site    trainable(names, round)            which arrays move in this round
            upload(trained, received, round)   what leaves the site
            sent(names, round)                 which arrays a site accepts, and
            residual_rank(r, rounds, cohort)   how much of a base change
    server  exchanges(round)                   what the cohort is asked, one after the other
            download(state, round)             what goes to the sites
            site_schema(schema, site)          which part of it is one site's, and
            dtype(phase)                       what comes back
            init(state, round, phase)          the accumulator of an exchange:
             add(site, update, weight) ... finish() -> (state, notes)

A linear rule needs only a weighted mean of what sites upload, and says with `step` what it does with it: it
holds one adapter whatever the cohort, and composes with secure aggregation and central noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from quorate.shared.adapters.adapter import Adapter, DType
from quorate.shared.config.config_model import ConfigModel
from quorate.shared.errors import AdapterError
from quorate.shared.protocol.phases import Phase

RESIDUAL_A = ".residual_A"
RESIDUAL_B = ".residual_B"
OPTIMIZER = "optimizer."
"""Beginning of the names of a rule's own state."""


@dataclass(frozen=True)
class GlobalState:
    """The federation's model: one adapter, and what a rule has moved into the frozen base.

    With scaling s (lora_alpha / r), layer W0 acts as W0 + s (B A + residual_B residual_A).

    Args:
        adapter: the arrays that sites train.
        residual: `<layer>.residual_A` [q, d_in] and `<layer>.residual_B` [d_out, q]; empty for most rules.
        optimizer: what the rule itself goes on with, as a server optimiser's moments: `optimizer.<name>`. It
            is stored with the state and never sent.
    """

    adapter: Adapter
    residual: Adapter = field(default_factory=lambda: Adapter({}))
    optimizer: Adapter = field(default_factory=lambda: Adapter({}))

    def __post_init__(self) -> None:
        if odd := [name for name in self.optimizer if not name.startswith(OPTIMIZER)]:
            raise AdapterError(f"optimiser state {odd[0]} has no name that begins with {OPTIMIZER!r}.")

    def stored(self) -> Adapter:
        """Return all arrays in one adapter value, as a checkpoint has them."""
        return self.adapter.updated(self.residual).updated(self.optimizer)

    @classmethod
    def from_stored(cls, arrays: Adapter) -> GlobalState:
        """Split what `stored` joined."""
        own = {name for name in arrays if name.startswith(OPTIMIZER)}
        sent = cls.from_sent(arrays.subset(name for name in arrays if name not in own))
        return replace(sent, optimizer=arrays.subset(own))

    @classmethod
    def from_sent(cls, arrays: Adapter) -> GlobalState:
        """Split what came to a site: nothing of it is a rule's own."""
        residual = {name for name in arrays if name.endswith((RESIDUAL_A, RESIDUAL_B))}
        return cls(arrays.subset(n for n in arrays if n not in residual), arrays.subset(residual))


@dataclass
class WeightedSum:
    """A running sum of weight * array in float64, and of the weights: the memory of one update."""

    arrays: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    weight: float = 0.0

    def add(self, update: Adapter, weight: float) -> None:
        self.weight += weight
        for name, array in update.items():
            term = np.multiply(array, weight, dtype=np.float64)
            if name in self.arrays:
                self.arrays[name] += term
            else:
                self.arrays[name] = term

    def mean(self) -> Adapter:
        """Return the weighted mean, rounded to float32.

        Raises: AdapterError: no update has a weight above 0.
        """
        if not self.weight > 0:
            raise AdapterError(
                "the updates' weights sum to 0, so they have no mean: no site trained on a single row; "
                "give the sites training rows or set aggregation.weighting: uniform.",
                kind="no-weight",
            )
        return Adapter(
            {name: (total / self.weight).astype(np.float32) for name, total in self.arrays.items()}
        )


@dataclass(frozen=True)
class RoundNotes:
    """What a rule has to say of a round besides its state.

    Args:
        excluded: site -> why its update does not count after all, in words for the record.
    """

    excluded: Mapping[str, str] = field(default_factory=dict)


class Accumulator(ABC):
    """One pass over the updates of an exchange; a rule makes one with `init`.

    `add` is called as updates arrive, in the order of the cohort's names, `finish` once, after at least one
    `add`.
    """

    @abstractmethod
    def add(self, site: str, update: Adapter, weight: float) -> None:
        """Take one site's upload. Raises: AdapterError: it cannot be taken."""

    @abstractmethod
    def finish(self) -> tuple[GlobalState, RoundNotes]:
        """Return the next global state, and what is to be said of it. Changes nothing that it was given."""


@dataclass
class MeanAccumulator(Accumulator):
    """The accumulator of a linear rule: a weighted mean, and a step from it.

    Args:
        step: weighted mean of the uploads -> next state.
    """

    step: Callable[[Adapter], GlobalState]
    total: WeightedSum = field(default_factory=WeightedSum)

    def add(self, site: str, update: Adapter, weight: float) -> None:
        """Add the update to the sum, whoever sent it."""
        self.total.add(update, weight)

    def finish(self) -> tuple[GlobalState, RoundNotes]:
        """Return the state after the step.

        Raises: AdapterError: no weight is above 0.
        """
        return self.step(self.total.mean()), RoundNotes()


class Aggregator(ConfigModel):
    """One aggregation rule with its parameters."""

    linear: ClassVar[bool]
    """Whether the server needs only a weighted sum of the uploads."""
    changes_base: ClassVar[bool] = False
    """Whether the rule adds to the frozen base weights, which must then be floating point."""
    weighting: Literal["examples", "tokens", "uniform"] = "examples"
    """Weigh sites by their training rows, by the tokens trained in these rows (causal_lm), or equally."""

    def check_compatible(self, *, use_dora: bool) -> None:
        """Raise ValueError, with the reason, if this rule does not compose with the adapter asked for."""

    def weight(self, num_examples: int, num_tokens: int = 0) -> float:
        """Return the weight of a site with `num_examples` training rows and `num_tokens` trained in them."""
        return {"examples": float(num_examples), "tokens": float(num_tokens), "uniform": 1.0}[self.weighting]

    def trainable(self, names: Iterable[str], round: int) -> frozenset[str]:
        """Return which of the adapter's arrays are trained in `round` (from 1); the others stay frozen."""
        return frozenset(names)

    def upload(self, trained: Adapter, received: GlobalState, round: int) -> Adapter:
        """Return what leaves the site after training; by default the arrays that were trained."""
        return trained.subset(sorted(self.trainable(trained, round)))

    def upload_schema(self, schema: Mapping[str, tuple[int, ...]], round: int) -> dict[str, tuple[int, ...]]:
        """Return names and shapes a site must send back, from the adapter's own schema."""
        names = self.trainable(schema, round)
        return {name: shape for name, shape in schema.items() if name in names}

    def sent(self, names: Iterable[str], round: int) -> frozenset[str]:
        """Return which of the adapter's arrays are sent; sites have the others from their seeded start."""
        return frozenset(names)

    def residual_rank(self, r: int, rounds: int, cohort: int | None) -> int | None:
        """Return the highest rank that the residual of a layer can have.

        Args:
            r: rank of the adapter.
            rounds: that have been aggregated.
            cohort: most sites of a round; None where the run does not say.
        Returns: None where nothing bounds it but the layer itself; 0 of rules that leave the base alone.
        """
        return 0

    def download(self, state: GlobalState, round: int) -> Adapter:
        """Return the arrays sent to every site: those of `sent`, and the residual."""
        return state.adapter.subset(self.sent(state.adapter, round)).updated(state.residual)

    def exchanges(self, round: int) -> tuple[Phase, ...]:
        """Return what the cohort is asked in `round`, one after the other; no phase twice.

        Each exchange starts from the state that the one before it left, and has an accumulator of its own.
        """
        return ("fit",)

    def dtype(self, phase: Phase) -> DType:
        """Return what the arrays are that a site sends in an exchange of `phase`."""
        return "float32"

    def site_schema(self, schema: Mapping[str, tuple[int, ...]], site: str) -> dict[str, tuple[int, ...]]:
        """Return names and shapes that `site` gets, trains and sends, of those (or some of those) of all.

        An array that is smaller than the others' along some axes is cropped to its first entries on the way
        to the site and padded with zeros on the way back: a LoRA pair of a smaller rank.
        """
        return dict(schema)

    def init(self, state: GlobalState, round: int, phase: Phase = "fit") -> Accumulator:
        """Start the aggregation of an exchange; by default of a mean, with `step` on it."""
        return MeanAccumulator(lambda mean: self.step(state, mean, round))

    def step(self, state: GlobalState, mean: Adapter, round: int) -> GlobalState:
        """Return the next global state of a linear rule; changes nothing it is given.

        Args:
            state: before the round.
            mean: weighted mean of the uploads.
            round: from 1.
        """
        return replace(state, adapter=state.adapter.updated(mean))
