"""`privacy:` of a run file: whose presence is hidden, by how much, and by which mechanism."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from quorate.shared.config.config_model import ConfigModel

if TYPE_CHECKING:
    from quorate.shared.aggregation import AggregationRule
    from quorate.shared.config.evaluation_config import EvaluationConfig

LEAST_DELTA = 1e-12
"""A smaller delta is beyond what the accountants can tell from zero."""


class _Noise(ConfigModel):
    """How much noise: exactly one of the first two fields is given."""

    target_epsilon: float | None = Field(None, gt=0)
    """Largest epsilon after all rounds; the noise multiplier is calibrated to it before the first step."""
    noise_multiplier: float | None = Field(None, gt=0, le=1e6)
    """Standard deviation of the noise over the clipping norm."""
    secure_rng: bool = True
    """Draw noise (and a site's batches) from AES-256 in counter mode, and each number of noise as a sum of
    four; `false` draws from NumPy's PCG64, which is faster for adapters of many millions of numbers. Either
    starts from the operating system's secret numbers, never from `seed`."""

    @model_validator(mode="after")
    def _one_measure_of_noise(self) -> Self:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either target_epsilon or noise_multiplier")
        return self


class SitePrivacy(_Noise):
    """DP-SGD at every site (arXiv:1607.00133): the unit is a record, or a group of records such as a patient.

    A step's batch is a Poisson sample whose expected size is `training.per_device_train_batch_size` times
    `training.gradient_accumulation_steps`; for groups that is an expected number of groups.
    """

    unit: Literal["record", "group"]
    """What one difference between neighbouring data sets is: a training row, or all rows that share the value
    of the data's `group` column."""
    delta: float | None = Field(None, ge=LEAST_DELTA, lt=1)
    """Probability with which the claim may fail; below 1 / units of a site, else the site refuses. Left out:
    1e-5, or a tenth of 1 / units where that is smaller."""
    max_grad_norm: float = Field(1.0, gt=0, le=1e20)
    """Clip each unit's gradient to this global L2 norm (takes the place of training.max_grad_norm)."""
    max_records_per_group: int = Field(1, ge=1)
    """Rows of a sampled group that enter a batch, drawn afresh each time; for unit group alone."""


class ClientPrivacy(_Noise):
    """Noise at the server on the sum of clipped updates (DP-FedAvg, arXiv:1710.06963): the unit is a site."""

    unit: Literal["client"]
    """What one difference between neighbouring data sets is: a whole site."""
    delta: float = Field(ge=LEAST_DELTA, lt=1)
    """Probability with which the claim may fail; below 1 / sites."""
    clipping_norm: float = Field(1.0, gt=0, le=1e20)
    """L2 norm that updates are clipped to; with `adaptive_quantile` only the first round's."""
    adaptive_quantile: float | None = Field(None, gt=0, lt=1)
    """Follow this quantile of the updates' norms (arXiv:1905.03871); a fixed norm when left out."""
    participation_hidden: bool = False
    """Sites are drawn by secret coins and nobody but the server learns which; only then is the sampling of
    sites counted as amplification."""

    def check_fits(self, aggregation: AggregationRule, evaluation: EvaluationConfig) -> None:
        """Raise ValueError, with reason and remedy, for what would void the claim."""
        if not aggregation.linear:
            raise ValueError(
                f"privacy.unit client: aggregation {aggregation.name} needs every site's own update, but "
                "noise hides no more than their sum; choose aggregation fedavg, ffa or reptile"
            )
        if any(len(aggregation.exchanges(round)) != 1 for round in (1, 2)):
            raise ValueError(
                f"privacy.unit client: aggregation {aggregation.name} asks the sites more than once a round, "
                "and one noised answer is accounted for; choose aggregation fedavg, ffa or reptile"
            )
        if aggregation.weighting != "uniform":
            raise ValueError(
                f"privacy.unit client: aggregation.weighting {aggregation.weighting} would let a site count "
                "for more than the clipping norm, by figures of its own data; set aggregation.weighting: "
                "uniform"
            )
        if evaluation.early_stopping_patience is not None:
            raise ValueError(
                "privacy.unit client: evaluation.early_stopping_patience would end the run by the sites' "
                "validation rows, to which no noise is added; leave it out and set federation.rounds"
            )


PrivacyConfig = Annotated[SitePrivacy | ClientPrivacy, Field(discriminator="unit")]
