"""What a search leaves behind: the best run file, the table of trials, and a page with what mattered."""

from __future__ import annotations

import csv
import io
import math
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from pydantic import Field

from quorate.server.report import figures, render_page
from quorate.server.report.drawing.charts import HALF, WIDE
from quorate.server.report.drawing.svg import (
    CENTRALISED,
    FEDERATED,
    INK,
    LOCAL,
    drawing,
    plain_axes,
    to_svg,
    variable,
)
from quorate.server.report.page import Chart, Code, Headline, Section, Table, Tile
from quorate.server.rounds.run import RUN_FILE
from quorate.server.tracking.records import Figure, Record
from quorate.shared.config.read import dump_yaml
from quorate.shared.config.run_config import RunConfig
from quorate.shared.process.files import BY_UMASK, write_atomically
from quorate.simulations.tuning.privacy_cost import SearchSpending, privacy_cost
from quorate.simulations.tuning.search import settled
from quorate.simulations.tuning.space import Value
from quorate.simulations.tuning.trial import BEST_ROUND, RETRY_OF, SECONDS, Search, trial_dir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from optuna import Study

BEST_FILE, BEST_SITES_FILE = "best.yaml", "best.sites.yaml"
TABLE_FILE, RESULT_FILE, PAGE_FILE = "trials.csv", "tune.json", "tune.html"
_STATES = {"COMPLETE": "done", "PRUNED": "stopped early", "FAIL": "diverged"}
_FEWEST = 4
"""Done trials from which importances are computed; of fewer they would be noise."""


class TrialRecord(Record):
    """One trial."""

    number: int
    """Its number, also that of its run folder."""
    state: str
    """`done`, `stopped early`, `diverged` or `cut off`."""
    value: Figure | None
    """The validation metric of its best round; of its last one where it was stopped early."""
    best_round: int | None
    """The round it comes from."""
    values: dict[str, Value]
    """Dotted field of the run file -> what was tried."""
    seconds: float | None
    """Wall time."""
    retry_of: int | None = None
    """The trial that was cut off and is run again here."""


class Tuned(Record):
    """A search in one object."""

    name: str
    metric: str
    """What was searched for, on validation rows."""
    direction: str
    """`maximize` or `minimize`."""
    best: TrialRecord | None
    """The best trial that was not stopped early."""
    importances: dict[str, float] = Field(default_factory=dict)
    """Field -> its share of what made trials differ (PED-ANOVA, arXiv:2304.10255), largest first."""
    trials: list[TrialRecord]
    spent: SearchSpending | None = None
    """What all of them together spent of the sites' privacy, where the run has record- or group-level one."""


def write_tuned(search: Search, study: Study) -> Tuned:
    """Write best.yaml with its sites file, trials.csv, tune.json and tune.html.

    Raises: OutputError: they cannot be written.
    """
    result = summarise(search, study)
    folder = search.output_dir
    if result.best is not None:
        run_file = trial_dir(folder, result.best.number) / RUN_FILE
        write_atomically(folder / BEST_FILE, run_file.read_text(encoding="utf-8"), BY_UMASK)
        if search.origin is not None:  # beside it, so that the best run needs no --sites
            write_atomically(folder / BEST_SITES_FILE, dump_yaml(search.origin.sites), BY_UMASK)
    write_atomically(folder / TABLE_FILE, _table_text(result, list(search.space.space)), BY_UMASK)
    write_atomically(folder / RESULT_FILE, result.model_dump_json(indent=2) + "\n", BY_UMASK)
    write_atomically(folder / PAGE_FILE, _page(search, result), BY_UMASK)
    return result


def summarise(search: Search, study: Study) -> Tuned:
    """Return the search's result."""
    counted = {each.number for each in settled(study)}
    trials = [
        TrialRecord(
            number=each.number,
            state=_STATES[each.state.name] if each.number in counted else "cut off",
            value=each.value if each.number in counted else None,
            best_round=each.user_attrs.get(BEST_ROUND),
            values=dict(each.params),
            seconds=each.user_attrs.get(SECONDS),
            retry_of=each.user_attrs.get(RETRY_OF),
        )
        for each in study.get_trials(deepcopy=False)
        if each.state.is_finished()
    ]
    done = {each.number: each for each in trials if each.state == "done"}
    return Tuned(
        name=search.base.name,
        metric=search.metric,
        direction=search.direction,
        best=done[study.best_trial.number] if done else None,
        importances=_importances(study, list(done.values())),
        trials=trials,
        spent=privacy_cost(search.rows, _begun(search, study)),
    )


def _begun(search: Search, study: Study) -> list[RunConfig]:
    """Return the run of every trial that may have trained: also of those that were cut off.

    What is run again draws noise of its own, and so costs privacy again.
    """
    return [
        search.config(each.params)
        for each in study.get_trials(deepcopy=False)
        if each.state.is_finished() and set(each.params) == set(search.space.space)
    ]


def _importances(study: Study, done: list[TrialRecord]) -> dict[str, float]:
    from optuna.importance import get_param_importances

    if len(done) < _FEWEST or len({each.value for each in done}) == 1:
        return {}
    found = get_param_importances(study)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _table_text(result: Tuned, names: list[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["trial", "state", result.metric, "best_round", *names, "seconds", "retry_of"])
    for each in result.trials:
        given = [each.values.get(name) for name in names]
        writer.writerow(
            [each.number, each.state, each.value, each.best_round, *given, each.seconds, each.retry_of]
        )
    return buffer.getvalue()


def _page(search: Search, result: Tuned) -> str:
    names = list(search.space.space)
    sections = [_found(search, result)]
    if drawn := [each for each in result.trials if each.value is not None]:
        section = Section("trials", "What was tried")
        section.blocks.append(
            Chart(
                _history(drawn, result),
                [
                    (variable(FEDERATED), "done"),
                    (variable(CENTRALISED), "stopped early"),
                    (variable(LOCAL), "best so far"),
                ],
                title=f"{figures.metric_name(result.metric)} on validation rows, trial by trial",
            )
        )
        for index, name in enumerate(names):
            section.blocks.append(Chart(_slice(drawn, result, name, search, index), wide=False, title=name))
        section.blocks.append(_trials(result, names))
        sections.append(section)
    return render_page(result.name, _headline(result), sections, "Search of settings")


def _headline(result: Tuned) -> Headline:
    count = {state: sum(each.state == state for each in result.trials) for state in
             ("done", "stopped early", "diverged", "cut off")}  # fmt: skip
    counted = sum(count.values()) - count["cut off"]
    best = result.best
    text = "No trial came to its end"
    if best is not None:
        shown = figures.show(result.metric, best.value)
        text = f"{figures.metric_name(result.metric)} {shown} on validation rows, in trial {best.number}"
    more = [
        "The best of many trials looks better on the validation rows it was chosen by than it is. What it is "
        "worth, the test rows say, which no trial has seen: run best.yaml."
    ]
    if result.spent is not None:
        more.append(result.spent.sentence)
    tiles = [Tile(str(counted), "trials", f"{count['cut off']} more cut off and run again", strong=True)]
    tiles += [Tile(str(count[state]), state) for state in ("done", "stopped early", "diverged")]
    return Headline(text, more, tiles)


def _found(search: Search, result: Tuned) -> Section:
    section = Section("found", "What was found")
    if result.best is not None:
        settings = "\n".join(f"{key}: {value}" for key, value in result.best.values.items())
        section.blocks.append(Code(f"The best trial's settings ({BEST_FILE})", settings))
    if result.importances:
        section.blocks.append(
            Chart(
                _importance(result.importances), title="Which setting made trials differ (shares, PED-ANOVA)"
            )
        )
        done = sum(each.state == "done" for each in result.trials)
        section.say(f"From {done} trials that came to their end; of so few, a rough guide.", "muted")
    space = search.space
    section.say(f"Sampler {space.sampler}, pruner {space.pruner}, seed {space.seed}.", "muted")
    return section


def _trials(result: Tuned, names: list[str]) -> Table:
    columns = ["Trial", "State", figures.metric_name(result.metric), "Round", *names, "Seconds"]
    rows = []
    for each in result.trials:
        state = each.state + (f", again for {each.retry_of}" if each.retry_of is not None else "")
        given = [_plain(each.values.get(name)) for name in names]
        value = figures.show(result.metric, each.value)
        rows.append([str(each.number), state, value, _plain(each.best_round), *given, _plain(each.seconds)])
    return Table("All trials", columns, rows, words=(1,))


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return figures.DASH if value is None else str(value)


def _importance(importances: dict[str, float]) -> Markup:
    with drawing(WIDE, len(importances) * 34.0 + 50) as figure:
        axes = figure.subplots()
        names, values = list(importances), list(importances.values())
        axes.barh(range(len(names)), values, height=0.6, color=FEDERATED)
        for y, value in enumerate(values):
            axes.annotate(
                f"{value:.2f}", (value, y), (6, 0), textcoords="offset points", va="center", color=INK
            )
        axes.set_yticks(range(len(names)), names, color=INK)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, max(values) * 1.12 or 1)
        plain_axes(axes, grid="x")
        described = ", ".join(f"{name} {value:.2f}" for name, value in importances.items())
        return to_svg(figure, "importance", "Importance of each setting", described)


def _history(trials: list[TrialRecord], result: Tuned) -> Markup:
    from matplotlib.ticker import MaxNLocator

    better = max if result.direction == "maximize" else min
    so_far: list[tuple[int, float]] = []
    for each in trials:
        if each.state == "done" and each.value is not None:
            so_far.append((each.number, better([each.value, *(value for _, value in so_far[-1:])])))
    with drawing(WIDE, 260) as figure:
        axes = figure.subplots()
        if so_far:
            axes.step(*zip(*so_far, strict=True), where="post", color=LOCAL, linewidth=1.6)
        _dots(axes, [(each.number, each) for each in trials], result)
        axes.set_xlabel("Trial")
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        return to_svg(figure, "history", "Trials", f"{len(trials)} trials with their {result.metric}")


def _slice(trials: list[TrialRecord], result: Tuned, name: str, search: Search, index: int) -> Markup:
    parameter = search.space.space[name]
    choices = [] if hasattr(parameter, "low") else parameter.points
    with drawing(HALF, 220) as figure:
        axes = figure.subplots()
        places = [
            (choices.index(each.values[name]) if choices else each.values[name], each) for each in trials
        ]
        if getattr(parameter, "log", False):
            axes.set_xscale("log")
            # Plain figures: the default's powers are markup, which an SVG with real text shows as it is.
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: "")
        if choices:
            axes.set_xticks(range(len(choices)), [str(choice) for choice in choices])
            axes.set_xlim(-0.5, len(choices) - 0.5)
        _dots(axes, places, result)
        return to_svg(figure, f"slice-{index}", name, f"{result.metric} over {name}")


def _dots(axes: Axes, places: list[tuple[Any, TrialRecord]], result: Tuned) -> None:
    for state, colour in (("stopped early", CENTRALISED), ("done", FEDERATED)):
        points = [(x, each.value) for x, each in places if each.state == state]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=6)
    if result.metric in figures.SHARES:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    plain_axes(axes, grid="y")
