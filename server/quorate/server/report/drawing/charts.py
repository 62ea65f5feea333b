"""The charts of the report. Each takes plain numbers and returns one `svg` element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from markupsafe import Markup

from quorate.server.report import figures
from quorate.server.report.drawing.svg import (
    BAD,
    FEDERATED,
    FONT,
    GRID,
    INK,
    MUTED,
    OTHER,
    SERIES,
    SURFACE,
    drawing,
    plain_axes,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, HALF = 960.0, 460.0
"""Widths of charts [px]."""


@dataclass(frozen=True)
class Bar:
    """One bar: a value with its interval, in a sentinel colour."""

    colour: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Grid:
    """Which site did what in which round.

    Args:
        sites: rows, from the top.
        rounds: columns.
        weights: (site, round) -> aggregation weight, where the site counted.
        aside: (site, round) that did not count.
    """

    sites: Sequence[str]
    rounds: Sequence[int]
    weights: Mapping[tuple[str, int], float] = field(default_factory=dict)
    aside: frozenset[tuple[str, int]] = frozenset()


def bars(
    groups: Sequence[tuple[str, Sequence[Bar]]], metric: str, *, name: str, title: str, description: str
) -> Markup:
    """Draw groups of horizontal bars with whiskers, the first group on top."""
    thick, gap = 15.0, 16.0
    height = sum(len(bars) * thick + gap for _, bars in groups) + 44
    share = metric in figures.SHARES
    with drawing(WIDE, height) as figure:
        axes = figure.subplots()
        top = 0.0
        centres = []
        for _, group in groups:
            centres.append(top + len(group) * thick / 2)
            for bar in group:
                _bar(axes, bar, top + thick / 2, thick - 3, metric)
                top += thick
            top += gap
        axes.set_yticks(centres, [short(label) for label, _ in groups], color=INK)
        axes.set_ylim(top - gap + 4, -6)
        plain_axes(axes, grid="x")
        if share:
            axes.set_xlim(0, 1.07)
            axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
            axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        else:
            axes.set_xlabel(figures.metric_name(metric))
        return to_svg(figure, name, title, description)


def _bar(axes: Axes, bar: Bar, y: float, thick: float, metric: str) -> None:
    strong = bar.colour == FEDERATED
    axes.barh(y, bar.value, height=thick, color=bar.colour)
    end = bar.value
    if bar.interval is not None:
        low, high = bar.interval
        axes.hlines(y, low, high, color=INK, linewidth=1.4)
        axes.vlines([low, high], y - 3, y + 3, color=INK, linewidth=1.4)
        end = max(end, high)
    axes.annotate(
        figures.show(metric, bar.value),
        (end, y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=FONT - 2,
        color=INK if strong else MUTED,
        weight="bold" if strong else "normal",
    )


def round_axis(axes: Axes, rounds: Sequence[int]) -> None:
    """Number an x axis by rounds."""
    from matplotlib.ticker import MaxNLocator

    first, last = min(rounds), max(rounds)
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set_xlabel("Round")


def shares(
    rows: Sequence[tuple[str, str, Sequence[float]]], *, name: str, title: str, description: str
) -> Markup:
    """Draw one full-width stacked bar per row.

    Args:
        rows: label, note at the right, parts (summing to 1, or all 0); part k has colour SERIES[k], the last
            one beyond the series the colour OTHER.
    """
    thick, gap = 24.0, 10.0
    with drawing(WIDE, len(rows) * (thick + gap) + 34) as figure:
        axes = figure.subplots()
        for index, (_, note, parts) in enumerate(rows):
            y, left = index * (thick + gap), 0.0
            for number, part in enumerate(parts):
                colour = SERIES[number] if number < len(SERIES) else OTHER
                axes.barh(y, part, left=left, height=thick, color=colour, edgecolor=SURFACE, linewidth=1)
                left += part
            axes.annotate(
                note,
                (1, y),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=MUTED,
                annotation_clip=False,
            )
        axes.set_yticks([i * (thick + gap) for i in range(len(rows))], [short(r[0]) for r in rows], color=INK)
        axes.set_ylim((len(rows) - 1) * (thick + gap) + thick / 2 + 2, -thick / 2 - 2)
        axes.set_xlim(0, 1)
        plain_axes(axes, grid="x")
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        return to_svg(figure, name, title, description)


def stacked_rounds(
    series: Sequence[tuple[str, Sequence[float]]],
    rounds: Sequence[int],
    *,
    name: str,
    title: str,
    description: str,
) -> Markup:
    """Draw one stacked column per round; series are (sentinel colour, values per round)."""
    from matplotlib.ticker import MaxNLocator

    with drawing(HALF, 230) as figure:
        axes = figure.subplots()
        base = [0.0] * len(rounds)
        for colour, values in series:
            axes.bar(rounds, values, bottom=base, width=0.8, color=colour)
            base = [low + value for low, value in zip(base, values, strict=True)]
        plain_axes(axes, grid="y")
        round_axis(axes, rounds)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return to_svg(figure, name, title, description)


def participation(grid: Grid, *, name: str, title: str, description: str) -> Markup:
    """Draw a square per site and round: filled by weight, crossed where set aside, empty where not asked."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    row = 26.0
    heaviest = max(grid.weights.values(), default=1.0)
    squares, colours = [], []
    for y, site in enumerate(grid.sites):
        for x, round in enumerate(grid.rounds):
            squares.append(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84))
            weight = grid.weights.get((site, round))
            tint = GRID if weight is None else FEDERATED
            colours.append(to_rgba(tint, 0.5 if weight is None else 0.25 + 0.75 * weight / heaviest))
    places = {site: y for y, site in enumerate(grid.sites)}
    columns_of = {round: x for x, round in enumerate(grid.rounds)}
    crosses = [(columns_of[r], places[s]) for s, r in sorted(grid.aside) if s in places and r in columns_of]
    with drawing(WIDE, len(grid.sites) * row + 50) as figure:
        axes = figure.subplots()
        axes.add_collection(PatchCollection(squares, facecolors=colours, linewidths=0))
        if crosses:
            axes.plot(*zip(*crosses, strict=True), "x", color=BAD, markersize=9, markeredgewidth=2.6)
        columns = max(len(grid.rounds), 12)  # a few rounds stay squares and do not become bands
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(len(grid.sites) - 0.5, -0.5)
        axes.set_yticks(range(len(grid.sites)), [short(site) for site in grid.sites], color=INK)
        every = max(1, -(-len(grid.rounds) // 20))
        axes.set_xticks(range(0, len(grid.rounds), every), [str(r) for r in grid.rounds[::every]])
        axes.set_xlabel("Round", loc="left")
        plain_axes(axes, grid="x")
        axes.grid(False)
        return to_svg(figure, name, title, description)


def short(label: str, limit: int = 24) -> str:
    """Cut a long name; tables have it whole."""
    return label if len(label) <= limit else label[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
