"""What the best model gets right and wrong, class by class."""

from __future__ import annotations

from quorate.server.report import figures
from quorate.server.report.figures import metric_name, show, show_interval
from quorate.server.report.page import Cell, Section, Table
from quorate.server.report.run_files import RunFiles, interval_of
from quorate.server.report.sections.headline import whose_rows
from quorate.server.tracking.records import Evaluation
from quorate.shared.tasks import Task

MOST_CLASSES = 14
"""A larger confusion matrix cannot be read; the most frequent confusions are listed instead."""
_LISTED = 15


def quality_section(files: RunFiles) -> Section:
    """Show all figures of the best model, per class, and what it takes for what."""
    section = Section("quality", "What it gets right and wrong")
    result, best = files.result, files.best
    if result is None or best is None:
        section.say("Nothing was measured, so this is not known.")
        return section
    section.say(
        f"The model of round {best.round} on the {result.split} rows of {whose_rows(files, result)} together."
    )
    confusion, labels = _confusion(result)
    if confusion and len(labels) <= MOST_CLASSES:
        section.blocks.append(_matrix(confusion, labels))
    elif confusion:
        section.blocks.append(_frequent(confusion, labels))
    per_class = result.pooled.get("per_class")
    if isinstance(per_class, dict) and per_class:
        boxes = all("ap" in found for found in per_class.values())
        task = files.config.task
        section.blocks.append(_boxes_per_class(per_class) if boxes else _per_class(per_class, task))
    section.blocks.append(_all_figures(result))
    return section


def _confusion(result: Evaluation) -> tuple[list[list[int]], list[str]]:
    """Return the confusion matrix and its labels; empty where the task has none."""
    confusion, per_class = result.pooled.get("confusion"), result.pooled.get("per_class")
    if not isinstance(confusion, list) or not isinstance(per_class, dict) or len(confusion) != len(per_class):
        return [], []
    return confusion, list(per_class)


def _matrix(confusion: list[list[int]], labels: list[str]) -> Table:
    rows = []
    for i, label in enumerate(labels):
        total = sum(confusion[i])
        row = [Cell(label)]
        for j, found in enumerate(confusion[i]):
            tone = "strong" if i == j and found else "muted" if not found else ""
            row.append(Cell(f"{found:,}", tone, shade=found / total if total else None))  # type: ignore[arg-type]
        row.append(Cell(f"{total:,}", "muted"))
        rows.append(row)
    return Table(
        "What it takes for what (confusion matrix)",
        ["True class", *labels, "rows"],
        rows,
        spanner="the model says",
        hint="Right answers are on the diagonal. Tint: share of the true class.",
    )


def _frequent(confusion: list[list[int]], labels: list[str]) -> Table:
    mistakes = sorted(
        (
            (-found, labels[i], labels[j], sum(confusion[i]))
            for i, row in enumerate(confusion)
            for j, found in enumerate(row)
            if i != j and found
        )
    )
    rows = [
        [Cell(true), Cell(said), Cell(f"{-found:,}"), Cell(show("recall", -found / total))]
        for found, true, said, total in mistakes[:_LISTED]
    ]
    return Table(
        f"The {len(rows)} most frequent confusions ({len(labels)} classes are too many for a matrix)",
        ["True class", "The model says", "Rows", "Of the true class"],
        rows,
        words=(1,),
    )


def _per_class(per_class: dict[str, dict[str, float]], task: Task) -> Table:
    rows = []
    for label, found in per_class.items():
        f1 = figures.number(found.get("f1"))
        support = int(found.get("support", 0))
        shares = [
            Cell(show(name, figures.number(found.get(name))) if support or found.get(name) else figures.DASH)
            for name in ("precision", "recall")
        ]
        rows.append(
            [
                Cell(label, small="" if support else f"none among these {task.unit_name}"),
                Cell(f"{support:,}"),
                *shares,
                Cell(show("f1", f1) if support else figures.DASH, shade=f1 if support else None),
            ]
        )
    return Table(
        f"Per {task.class_name}",
        [task.class_name.capitalize(), task.unit_name.capitalize(), "Precision", "Recall", "F1"],
        rows,
        folded=len(rows) > 2 * MOST_CLASSES,
        hint="Precision: how many of those it named are right. Recall: how many of those there are it found. "
        "F1: the balance of both.",
    )


def _boxes_per_class(per_class: dict[str, dict[str, float]]) -> Table:
    rows = []
    for label, found in per_class.items():
        support = int(found.get("support", 0))
        ap, ap50 = (figures.number(found.get(name)) for name in ("ap", "ap50"))
        name = Cell(label, small="" if support else "no box in these images")
        rows.append([name, Cell(f"{support:,}"), Cell(show("ap50", ap50)), Cell(show("ap", ap), shade=ap)])
    return Table(
        "Per class",
        ["Class", "Boxes", "AP at overlap 0.5", "AP"],
        rows,
        folded=len(rows) > 2 * MOST_CLASSES,
        hint="Average precision: the precision at every recall, averaged; for AP also over overlaps from 0.5 "
        "to 0.95. It is measured as COCO does; it has no interval.",
    )


def _all_figures(result: Evaluation) -> Table:
    names = [name for name, value in result.pooled.items() if figures.number(value) is not None]
    rows = [
        [
            Cell(site or "All rows together", "" if site else "strong"),
            *(
                Cell(
                    show(name, figures.number((result.sites[site] if site else result.pooled).get(name))),
                    "" if site else "strong",
                    show_interval(name, interval_of(result, name, site)),
                )
                for name in names
            ),
        ]
        for site in [*sorted(result.sites), None]
    ]
    rows.append(
        [
            Cell("Mean of the sites"),
            *(Cell(show(name, figures.number(result.mean.get(name)))) for name in names),
        ]
    )
    return Table(
        "Every figure of the best model, per site", ["Site", *map(metric_name, names)], rows, folded=True
    )
