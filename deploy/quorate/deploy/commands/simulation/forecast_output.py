"""Printing what was forecast of a run with site-level privacy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.filesize import decimal

from quorate.deploy.commands.both.options import print_model
from quorate.deploy.terminal import print_line, stdout_console, table_of
from quorate.shared.privacy.rounding import at_most, delta_shown

if TYPE_CHECKING:
    from quorate.simulations.central_forecast import ClientForecast, ClientPlanForecast


def print_client_forecast(found: ClientForecast, *, as_json: bool) -> None:
    """Print it as one JSON object, or as a table of other settings and a few lines."""
    if as_json:
        print_model(found)
        return

    def row(plan: ClientPlanForecast) -> tuple[str, ...]:
        return (
            plan.change,
            at_most(plan.epsilon),
            f"{plan.noise_multiplier:.3g}",
            f"{plan.expected_cohort:g}",
            str(plan.releases),
            f"{plan.noise_on_mean:.3g}",
            decimal(plan.bytes_each_way),
        )

    table = table_of(
        ("", "epsilon", "noise multiplier", "sites in a round", "releases", "noise on mean", "a round"),
        map(row, (found.configured, *found.alternatives)),
        title=f"{found.run}: {found.sites} sites",
    )
    console = stdout_console()
    console.print(table)
    for line in _facts(found):
        print_line(console, f"  {line}")


def _facts(found: ClientForecast) -> list[str]:
    plan = found.configured
    lines = [
        f"delta {delta_shown(found.delta)}; {plan.trained_values:,} numbers are trained, updates clipped to "
        f"norm {found.clipping_norm:g} in round 1"
    ]
    if plan.sampling_probability == 1:
        lines.append("every site takes part in every round")
    else:
        seen = "in secret" if found.participation_hidden else "for all to see"
        lines.append(f"each site is drawn for a round with chance {plan.sampling_probability:.3g}, {seen}")
    if plan.sum_multiplier != plan.noise_multiplier:
        lines.append(
            f"noise multiplier of the sum: {plan.sum_multiplier:.4g}, as adaptive clipping needs noise on a "
            "count too"
        )
    lines.append(
        f"the sites send {decimal(found.bytes_up)} and receive {decimal(found.bytes_down)} in "
        f"{plan.rounds} rounds, all of them together"
    )
    if found.minutes is not None and found.peak_memory_bytes is not None:
        lines.append(
            f"about {found.minutes:.2g} minutes of training of all sites, one by one on {found.device} (an "
            f"estimate); memory: {decimal(found.peak_memory_bytes)} at most"
        )
    lines += [f"{change} cannot be had: {why}" for change, why in found.impossible.items()]
    lines.append(
        "noise on mean: of the mean update, over the clipping norm; above 1 it drowns what sites send"
    )
    if found.warning is not None:
        lines.append(found.warning)
    return lines
