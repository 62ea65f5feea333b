"""The record of a run: what each round did, what was measured, and the summary, as pydantic models.

Files in `output_dir`: `record.jsonl` holds one RoundRecord a line, `metrics.jsonl` one RoundMetrics a line,
`summary.json` one Summary. Readers take what they know and ignore the rest, so fields are only ever added.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints

from quorate.shared.privacy.privacy_event import PrivacyEvent
from quorate.shared.protocol.messages import SiteDescription
from quorate.shared.tasks.task import Metrics

Figure = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A measured number; JSON has no NaN, so that is written as null and read back."""


class Record(BaseModel):
    """Base of everything written to the output folder."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", use_attribute_docstrings=True, ser_json_inf_nan="null"
    )


class Exclusion(Record):
    """Why a site's answer did not count in a round."""

    code: str
    """Error class: the site's own (`data`, `model`, ...), `timeout`, or the check that failed."""
    reason: str
    """One sentence in words; never text that came from a site's data."""


class RoundNoise(Record):
    """The noise of a round with client-level privacy."""

    clipping_norm: float
    """L2 norm that updates were clipped to [parameter units]."""
    deviation: float
    """Standard deviation of the noise on every value of the sum of updates [parameter units]."""
    fraction_within: float | None = None
    """Part of the updates whose norm was up to that, with noise on it; None for a fixed clipping norm."""
    next_norm: float
    """The clipping norm of the round after it."""


class SolvedHead(Record):
    """What came of the exchange before round 1 in which the head was solved (adapter.head.init: analytic)."""

    strength: float
    """Strength of the ridge, relative to the mean of the diagonal that it is added to."""
    validation_rows: int
    """Rows whose squared error picked it; 0 where it is the default."""
    slope: float
    """Slope of validation rows' targets on what the head says of them: below 1 it overfits, and its logits
    are scaled down by as much; 1 where there are none."""
    rows: dict[str, int]
    """Site -> training rows whose sums it was solved from."""
    excluded: dict[str, Exclusion]
    """Sites that were asked and are not in it, and why. They take part in the rounds all the same."""
    bytes_down: dict[str, int]
    """Bytes sent to each site."""
    bytes_up: dict[str, int]
    """Bytes received from each site."""
    seconds: float
    """Wall time of the exchange and the solution [s]."""


class RoundRecord(Record):
    """What one round did."""

    round: int
    """Round, from 1."""
    cohort: tuple[str, ...]
    """Sites that were asked to train."""
    weights: dict[str, float]
    """Aggregation weight of each counted site, summing to 1."""
    num_examples: dict[str, int]
    """Training rows of each counted site."""
    num_steps: dict[str, int]
    """Optimiser steps each counted site took."""
    update_norms: dict[str, float]
    """L2 distance each counted site moved from where it started [parameter units]."""
    excluded: dict[str, Exclusion]
    """Sites asked whose answer did not count, and why."""
    bytes_down: dict[str, int]
    """Bytes sent to each site, training and evaluation together."""
    bytes_up: dict[str, int]
    """Bytes received from each site."""
    seconds: dict[str, float]
    """Wall time of each step of the round: cohort, train (with sending, checking and adding up), aggregate,
    evaluate, checkpoint."""
    state_hash: str
    """Content hash of the global state after the round."""
    early_stop: str | None = None
    """Why no round followed though the run asks for more, in words: early stopping."""
    head: SolvedHead | None = None
    """What round 1 began from, where its head was solved; not in the round's own bytes and seconds."""
    noise: RoundNoise | None = None
    """What was added to the sum of updates, with client-level privacy."""


class Evaluation(Record):
    """One model measured on one split, per site and together."""

    split: Literal["train", "validation", "test"]
    pooled: Metrics
    """All sites' rows together."""
    mean: dict[str, Figure]
    """Unweighted mean over sites of each scalar metric."""
    sites: dict[str, Metrics]
    """Each site's own rows."""
    rows: dict[str, int]
    """Rows per site."""
    missing: dict[str, Exclusion] = {}
    """Sites that have such rows and were not measured, and why; `pooled` and `mean` are without them."""
    intervals: dict[str, Any] = {}
    """95 % intervals, [low, high], of the metrics that have one: `pooled` > metric and `sites` > NAME >
    metric. See `quorate.shared.metrics.intervals`."""


class RoundMetrics(Record):
    """What was measured after one round."""

    round: int
    """Round, from 1."""
    train: dict[str, dict[str, Figure]]
    """Site -> figures of its training (`train_loss`, `grad_norm`, `learning_rate`)."""
    validation: Evaluation | None = None
    """The new global model on validation rows, in rounds that evaluate."""


class Measured(Record):
    """A model of the run, by the round it comes from, with its evaluations."""

    round: int
    """The round after which the model was taken."""
    validation: Evaluation | None = None
    test: Evaluation | None = None


class References(Record):
    """The two reference runs, each with the same budget of optimiser steps."""

    local_only: dict[str, Measured] = {}
    """Site -> its own adapter, trained on its rows alone: `test.sites[SITE]` is at home. A simulation tests
    it on every site's rows (`test.pooled`); in a federation it never leaves the site, and home is all."""
    centralised: Measured | None = None
    """One adapter trained on all rows in one place, with as many steps as all sites took together."""
    failed: dict[str, Exclusion] = {}
    """References left out because they failed: site, or `(all sites)` for the centralised one, and why."""

    @property
    def tested_everywhere(self) -> bool:
        """Whether sites' own adapters were tested on other sites' rows too, as in a simulation."""
        return any(each.test and len(each.test.sites) > 1 for each in self.local_only.values())


class LocalGain(Record):
    """What the federation brought one site, on its own test rows."""

    metric: str
    federated: Figure
    """The federated model (best round)."""
    local_only: Figure
    gain: Figure
    interval: tuple[Figure, Figure] | None = None
    """95 % interval of the gain, for which the two figures are taken for independent (so it is on the wide
    side: the same rows were scored twice)."""


class SampleObject(Record):
    """One box of a sample image."""

    label: str
    box: tuple[float, float, float, float]
    """x, y, width, height [pixels of the image]."""
    score: float | None = None
    """The model's, of a box it found."""


class Sample(Record):
    """A test image with its boxes, true and found; written by simulations alone."""

    file: Annotated[str, StringConstraints(pattern=r"^[0-9]+\.png$")]
    """The image, beside this record."""
    site: str
    """Whose image it is."""
    width: int
    height: int
    true: tuple[SampleObject, ...]
    """The boxes of the data."""
    found: tuple[SampleObject, ...]
    """What the best round's model finds."""
    threshold: float
    """Lowest score of what is counted as found."""


class Answer(Record):
    """What the model said to one of the run file's own public prompts."""

    prompt: str
    """As in the run file."""
    base: str
    """The base model's answer."""
    adapted: str
    """The answer with the adapter of the best round."""


USELESS = 1.0
"""From this noise on the mean over the clipping norm, noise moves the adapter further than all sites can."""


class ClientClaim(Record):
    """Client-level differential privacy: what released adapters tell of whether a site took part at all."""

    epsilon: float
    """Spent so far, by `events`."""
    planned_epsilon: float
    """Spent once all rounds are done."""
    delta: float
    """Probability with which the claim may fail."""
    sites: int
    """Sites when the run began."""
    sampling_probability: float
    """Chance of a site to be drawn for a round."""
    expected_cohort: float
    """Sites expected in a round, by which noised sums are divided."""
    participation_hidden: bool
    """Whether that chance counts as amplification: coins were secret."""
    noise_multiplier: float
    """Noise of a round over what one site can change."""
    sum_multiplier: float
    """Standard deviation of the noise on the sum of updates over the clipping norm."""
    values: int
    """How many values of the adapter move."""
    noise_on_mean: float
    """Expected L2 norm of the noise on the mean update over the clipping norm; above 1 it drowns updates."""
    clipping_norm: float | None
    """Clipping norm of the last round [parameter units]."""
    releases: int
    """Noised models that sites may have seen."""
    events: tuple[PrivacyEvent, ...]
    """What the mechanism did, for any accountant: of the site that it cost most."""


class Summary(Record):
    """The whole run in one object."""

    name: str
    """Name of the run file."""
    run_id: str
    """Identity of this run."""
    status: Literal["done", "interrupted", "quorum-not-met", "diverged"]
    """How it ended; `diverged`: no site could measure the model."""
    rounds: int
    """Rounds completed."""
    metric: str
    """The metric that picks the best round and that references are compared on."""
    seed: int
    config_hash: str
    """SHA-256 of the resolved run configuration."""
    stopped: str | None = None
    """What ended the run before its last round, in words: early stopping (status `done`), or sites and
    reasons (status `quorum-not-met` or `diverged`), never text of data."""
    final: Measured | None = None
    """The model after the last round."""
    best: Measured | None = None
    """The model of the best round by `metric` on pooled validation rows; this is what `adapter/` holds."""
    references: References | None = None
    """Reference runs, where asked for."""
    worth: dict[str, LocalGain] = {}
    """Site -> what the federation brought it; empty without the local_only reference."""
    sites: dict[str, SiteDescription] = {}
    """What the sites said of themselves when they joined."""
    samples: tuple[Answer, ...] = ()
    """Answers to the run file's own prompts, where it has some and the base model is at hand."""
    head: SolvedHead | None = None
    """What round 1 began from, where its head was solved from the sites' sums."""
    excluded: dict[str, dict[int, Exclusion]] = {}
    """Site -> round (0 while joining) -> why it did not count."""
    bytes: dict[str, int]
    """`down`, `up` and `total` over all rounds and sites, training and validation together (`head` and what
    comes before and after the rounds left out); empty where who took part is hidden."""
    seconds: dict[str, float]
    """Wall time of the rounds by step, and `total`; joining, the test and reference runs come on top. Empty
    where who took part is hidden."""
    versions: dict[str, str]
    """Versions of quorate and the libraries that shape the result, at the coordinator."""
    client_privacy: ClientClaim | None = None
    """What the released adapters tell of single sites, where noise was added for that."""
