"""What the report is made from: the files of one output folder, and what follows from them directly."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from quorate.server.report.figures import bounds, number
from quorate.server.tracking.records import Evaluation, Measured, RoundMetrics, RoundRecord, Sample, Summary
from quorate.shared.config.load import load_run
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import OutputError
from quorate.shared.privacy.audit.audit_record import AUDIT_FILE, AuditRecord

_R = TypeVar("_R", bound=BaseModel)
_HIDDEN: dict[str, Any] = {
    "cohort": (),
    "seconds": {},
    **{
        name: {}
        for name in (
            "weights",
            "num_examples",
            "num_steps",
            "update_norms",
            "excluded",
            "bytes_down",
            "bytes_up",
        )
    },
}
"""What of a round's record depends on who was drawn."""
SAMPLES_DIR, SAMPLES_FILE = "samples", "samples.jsonl"


@dataclass(frozen=True)
class RunFiles:
    """A run as its output folder tells it.

    Args:
        config: run.yaml.
        config_text: the same, as written.
        records: lines of record.jsonl, by round.
        metrics: lines of metrics.jsonl, by round.
        summary: summary.json; None while the run goes on, or where it was killed.
        samples: lines of samples/samples.jsonl, of a simulation that was asked for them.
        images: their files, name -> PNG.
        audit: audit.json, where the run was audited.
    """

    config: RunConfig
    config_text: str
    records: list[RoundRecord]
    metrics: list[RoundMetrics]
    summary: Summary | None
    samples: list[Sample] = field(default_factory=list)
    images: dict[str, bytes] = field(default_factory=dict)
    audit: AuditRecord | None = None

    @classmethod
    def read(cls, output_dir: Path) -> RunFiles:
        """Read the folder.

        Raises:
            OutputError: it holds no run, or a file of it is damaged.
            ConfigError: run.yaml does not validate.
        """
        path = output_dir / "run.yaml"
        if not path.is_file():
            raise OutputError(
                f"{output_dir} holds no run (there is no run.yaml in it); name the output folder of a run.",
                kind="no-run-file",
            )
        summary = output_dir / "summary.json"
        audit = output_dir / AUDIT_FILE
        samples = _lines(output_dir / SAMPLES_DIR / SAMPLES_FILE, Sample)
        config = load_run(path)
        records = _lines(output_dir / "record.jsonl", RoundRecord)
        metrics = _lines(output_dir / "metrics.jsonl", RoundMetrics)
        if config.hides_participation:  # no section can show what it is not given
            records = [each.model_copy(update=_HIDDEN) for each in records]
            metrics = [each.model_copy(update={"train": {}}) for each in metrics]
        return cls(
            config=config,
            config_text=path.read_text(encoding="utf-8"),
            records=records,
            metrics=metrics,
            summary=_parse(Summary, _text(summary), str(summary)) if summary.is_file() else None,
            samples=samples,
            images={each.file: _bytes(output_dir / SAMPLES_DIR / each.file) for each in samples},
            audit=_parse(AuditRecord, _text(audit), str(audit)) if audit.is_file() else None,
        )

    @property
    def metric(self) -> str:
        """The metric that picks the best round."""
        return self.config.metric

    @cached_property
    def sites(self) -> list[str]:
        """All sites that the files know of, those that could not join included."""
        names: set[str] = set()
        if self.summary:
            names |= {*self.summary.sites, *self.summary.excluded}
        for record in self.records:
            names |= {*record.cohort, *record.excluded, *record.weights}
        return sorted(names)

    @cached_property
    def members(self) -> list[str]:
        if self.summary and self.summary.sites:
            return sorted(self.summary.sites)
        return sorted({site for record in self.records for site in record.cohort})

    @property
    def picks_best(self) -> bool:
        """Whether validation rows pick the round that is kept; else it is the last."""
        return self.config.picks_best

    @cached_property
    def best(self) -> Measured | None:
        """The model that is kept, with its validation figures looked up where the summary lacks them."""
        best = self.summary.best if self.summary else None
        validated = {each.round: each.validation for each in self.metrics if each.validation}
        if best is None:
            scored = {r: number(v.pooled.get(self.metric)) for r, v in validated.items()}
            values = {r: v for r, v in scored.items() if v is not None}
            if not values:
                return None
            sign = self.config.task.sign(self.metric)
            picked = max(values, key=lambda r: (sign * values[r], -r))
            best = Measured(round=picked if self.picks_best else self.records[-1].round)
        return best.model_copy(update={"validation": best.validation or validated.get(best.round)})

    @property
    def final(self) -> Measured | None:
        return self.summary.final if self.summary else None

    @cached_property
    def result(self) -> Evaluation | None:
        """The best model's figures: on test rows, else on validation rows; None where none were taken."""
        best = self.best
        found = [each for each in (best.test, best.validation) if each and each.pooled] if best else []
        return found[0] if found else None


def value_of(evaluation: Evaluation | None, metric: str, site: str | None = None) -> float | None:
    """Return a metric on all rows, or on those of `site`; None where it was not measured."""
    if evaluation is None:
        return None
    return number((evaluation.pooled if site is None else evaluation.sites.get(site, {})).get(metric))


def interval_of(
    evaluation: Evaluation | None, metric: str, site: str | None = None
) -> tuple[float, float] | None:
    """Return the 95 % interval of `value_of`, where there is one."""
    if evaluation is None:
        return None
    found = evaluation.intervals.get("pooled", {})
    if site is not None:
        found = evaluation.intervals.get("sites", {}).get(site, {})
    return bounds(found.get(metric))


def _lines(path: Path, kind: type[_R]) -> list[_R]:
    """Read a JSONL file; a last line that a crash cut off is left out."""
    if not path.is_file():
        return []
    # Not splitlines(): JSON text may hold line separators of other scripts unescaped.
    lines = _text(path).split("\n")
    return [_parse(kind, line, f"{path}: line {i}") for i, line in enumerate(lines[:-1], 1)]


def _parse(kind: type[_R], text: str, where: str) -> _R:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise OutputError(
            f"{where}: {field} is not what a run writes; the file was edited or damaged. Restore it, or "
            "resume the run, which writes it again.",
            kind="not-as-written",
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"{path}: cannot be read ({error}); run the simulation again with --resume."
        raise OutputError(message) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path}: cannot be read ({error}); restore it, or resume the run."
        raise OutputError(message, kind="unreadable") from error
