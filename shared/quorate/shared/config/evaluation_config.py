"""`evaluation:` of a run file: what is measured, and against what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from quorate.shared.config.config_model import ConfigModel


class EvaluationConfig(ConfigModel):
    """What is measured, and against what."""

    every: int = Field(1, ge=1)
    """Evaluate on validation rows every so many rounds (and always after the last)."""
    metric_for_best_model: str | None = None
    """Pooled validation metric that picks the best round; the task's own when left out."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluated rounds in a row without an improvement of that metric; the schedule of
    the learning rate stays that of all rounds, and reference runs keep all of them."""
    early_stopping_threshold: float = Field(0.0, ge=0)
    """How much the metric must improve on the best round so far to count as an improvement."""
    references: tuple[Literal["local_only", "centralised"], ...] = ()
    """Reference runs: each site alone, and all rows in one place, both with the same budget of steps."""
    bootstrap_samples: int = Field(1000, ge=0)
    """0 leaves the 95 % intervals of test figures out. Any other number gives them: they are computed, no
    longer resampled, so it does not matter which."""
    share_outcomes: bool = True
    """Sites send what the model gets right and wrong on their validation and test rows, as exact counts and
    sums. False: they send none, so nothing is measured and the last round is the result."""

    @model_validator(mode="after")
    def _what_needs_outcomes(self) -> EvaluationConfig:
        needs = {
            "early_stopping_patience": self.early_stopping_patience is not None,
            "metric_for_best_model": self.metric_for_best_model is not None,
            "references": bool(self.references),
        }
        if not self.share_outcomes and any(needs.values()):
            named = " and ".join(name for name, asked in needs.items() if asked)
            raise ValueError(
                f"{named} cannot be had with share_outcomes false, as sites then send nothing of their "
                f"validation and test rows; leave {named} out, or set share_outcomes: true"
            )
        return self
