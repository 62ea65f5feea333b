"""Curves over rounds, with their names at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from quorate.server.report import figures
from quorate.server.report.drawing.charts import HALF, round_axis, short
from quorate.server.report.drawing.svg import FONT, INK, MUTED, OTHER, drawing, plain_axes, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Curve:
    """One curve: (round, value) points."""

    label: str
    points: Sequence[tuple[int, float]]
    colour: str = OTHER
    strong: bool = False


def curves(
    lines: Sequence[Curve],
    *,
    name: str,
    title: str,
    description: str,
    metric: str,
    mark: tuple[int, str] | None = None,
) -> Markup:
    """Draw values over rounds; lines that have a colour of their own carry their name at the right end.

    Args:
        mark: (round, words) of a round to point at.
    """
    with drawing(HALF, 300) as figure:
        axes = figure.subplots()
        plain_axes(axes, grid="y")
        for line in sorted(lines, key=lambda each: each.strong):
            x, y = zip(*line.points, strict=True)
            axes.plot(
                x,
                y,
                color=line.colour,
                linewidth=2.8 if line.strong else 1.4,
                marker="o" if len(x) == 1 else None,
            )
        round_axis(axes, [r for line in lines for r, _ in line.points])
        if metric in figures.SHARES:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        if mark is not None:
            axes.axvline(mark[0], color=MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=0.5)
            axes.annotate(
                mark[1],
                (mark[0], 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=FONT - 2,
                color=MUTED,
                annotation_clip=False,
            )
        _end_labels(axes, [line for line in lines if line.colour != OTHER])
        return to_svg(figure, name, title, description)


def _end_labels(axes: Axes, lines: Sequence[Curve]) -> None:
    """Write names to the right of the lines' ends, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    ends = sorted(((line.points[-1], line) for line in lines), key=lambda end: end[0][1])
    places = spread([value for (_, value), _ in ends], (high - low) * 0.07, high)
    for (point, line), place in zip(ends, places, strict=True):
        axes.annotate(
            short(line.label, 16),
            point,
            xytext=(1.04, place),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=FONT - 1,
            color=INK,
            weight="bold" if line.strong else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": line.colour,
                "linewidth": 1,
                "patchA": None,  # cutting the line off at a box around the name takes long
                "shrinkA": 4,
                "shrinkB": 3,
                "relpos": (0, 0.5),  # from the middle of the name's left edge
            },
        )


def spread(values: Sequence[float], step: float, high: float) -> list[float]:
    """Move ascending `values` so that neighbours are at least `step` apart and none is above `high`."""
    places = list(values)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + step)
    ceiling = high
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - step
    return places
