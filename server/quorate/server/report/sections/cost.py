"""What a run cost: bytes and seconds."""

from __future__ import annotations

from collections.abc import Mapping

from quorate.server.report.drawing import charts
from quorate.server.report.drawing.svg import FEDERATED, OTHER, SERIES, variable
from quorate.server.report.figures import show_bytes, show_seconds
from quorate.server.report.page import Cell, Chart, Section, Table
from quorate.server.report.run_files import RunFiles
from quorate.server.tracking.records import RoundRecord

_STEPS = {
    "cohort": "choosing whom to ask",
    "train": "training at the sites, sending, checking",
    "aggregate": "making one model of the updates",
    "evaluate": "testing at the sites",
    "checkpoint": "saving",
}


def cost_section(files: RunFiles) -> Section:
    """Show traffic and time."""
    section = Section("cost", "What it cost")
    records = files.records
    if files.config.hides_participation:
        section.say("Traffic and times of a round depend on who was drawn, which is hidden.")
        return section
    if not records:
        section.say("No round was finished, so no cost was recorded.")
        return section
    down = [sum(record.bytes_down.values()) for record in records]
    up = [sum(record.bytes_up.values()) for record in records]
    seconds = _by_step(records)
    section.say(
        f"{show_bytes(sum(down))} went to the sites and {show_bytes(sum(up))} came back, "
        f"{show_bytes(sum(down) + sum(up))} in all, training and validation together. The rounds took "
        f"{show_seconds(sum(sum(each) for each in seconds.values()))}. "
        "Joining, the final test and reference runs come on top."
    )
    section.blocks += [_traffic(records, down, up), _time(records, seconds), _steps(seconds)]
    section.blocks.append(_per_round(records, down, up))
    return section


def _by_step(records: list[RoundRecord]) -> dict[str, list[float]]:
    """Return step -> seconds per round, steps in the order of a round."""
    steps = [step for step in _STEPS if any(step in record.seconds for record in records)]
    steps += sorted({step for record in records for step in record.seconds} - set(steps))
    return {step: [record.seconds.get(step, 0.0) for record in records] for step in steps}


def _traffic(records: list[RoundRecord], down: list[int], up: list[int]) -> Chart:
    divisor, unit = (1e6, "MB") if max(down + up) >= 1e6 else (1e3, "kB")
    svg = charts.stacked_rounds(
        [(OTHER, [b / divisor for b in down]), (FEDERATED, [b / divisor for b in up])],
        [record.round for record in records],
        name="traffic",
        title="Traffic of each round",
        description=f"To the sites {show_bytes(sum(down))}, from them {show_bytes(sum(up))} over all rounds.",
    )
    legend = [(variable(FEDERATED), "from the sites"), (variable(OTHER), "to the sites")]
    return Chart(svg, legend, wide=False, title=f"Traffic of each round [{unit}]")


def _time(records: list[RoundRecord], seconds: Mapping[str, list[float]]) -> Chart:
    colours = {"train": SERIES[0], "evaluate": SERIES[1]}
    rest = [sum(seconds[s][i] for s in seconds if s not in colours) for i in range(len(records))]
    series = [(colour, seconds[step]) for step, colour in colours.items() if step in seconds]
    svg = charts.stacked_rounds(
        [*series, (SERIES[2], rest)],
        [record.round for record in records],
        name="time",
        title="Seconds of each round, by step",
        description="; ".join(f"{step}: {show_seconds(sum(each))}" for step, each in seconds.items()),
    )
    legend = [
        (variable(SERIES[2]), "all else"),
        (variable(SERIES[1]), "evaluate"),
        (variable(SERIES[0]), "train"),
    ]
    return Chart(svg, legend, wide=False, title="Time of each round [s]")


def _steps(seconds: Mapping[str, list[float]]) -> Table:
    total = sum(sum(each) for each in seconds.values()) or 1.0
    rows = [
        [
            Cell(step.capitalize()),
            Cell(_STEPS.get(step, "")),
            Cell(show_seconds(sum(each))),
            Cell(show_seconds(sum(each) / len(each))),
            Cell(f"{100 * sum(each) / total:.1f}\u00a0%", shade=sum(each) / total),
        ]
        for step, each in seconds.items()
    ]
    return Table("Time by step", ["Step", "What it is", "In all", "A round", "Share"], rows, words=(1,))


def _per_round(records: list[RoundRecord], down: list[int], up: list[int]) -> Table:
    rows = [
        [
            f"{record.round}",
            show_bytes(to),
            show_bytes(back),
            show_seconds(sum(record.seconds.values())),
            f"{sum(record.num_steps.values()):,}",
        ]
        for record, to, back in zip(records, down, up, strict=True)
    ]
    columns = ["Round", "To the sites", "From the sites", "Time", "Steps at all sites"]
    return Table("The same in figures, per round", columns, rows, folded=True)
