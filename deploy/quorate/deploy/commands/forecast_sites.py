"""Printing what was forecast of a run with site-level privacy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from quorate.deploy.commands.common import print_json

if TYPE_CHECKING:
    from quorate.simulations.forecast import ClientForecast, ClientPlanForecast


def print_client_forecast(found: ClientForecast, *, as_json: bool) -> None:
    """Print it as one JSON object, or as a table of other settings and a few lines."""
    if as_json:
        print_json(json.loads(found.model_dump_json()))  # which alone writes infinities as JSON can
        return
    from rich.box import SIMPLE
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    from quorate.deploy.terminal import stdout_console

    table = Table(box=SIMPLE, title=Text(f"{found.run}: {found.sites} sites"))
    table.add_column("")
    for name in ("epsilon", "noise multiplier", "sites in a round", "releases", "noise on mean", "a round"):
        table.add_column(name, justify="right")

    def add(plan: ClientPlanForecast) -> None:
        table.add_row(
            plan.change,
            f"{plan.epsilon:.3g}",
            f"{plan.noise_multiplier:.3g}",
            f"{plan.expected_cohort:g}",
            str(plan.releases),
            f"{plan.noise_on_mean:.3g}",
            decimal(plan.bytes_each_way),
        )

    add(found.configured)
    for plan in found.alternatives:
        add(plan)
    console = stdout_console()
    console.print(table)
    lines = [
        f"delta {found.delta:.2g}; {found.configured.trained_values:,} numbers are trained, updates clipped "
        f"to norm {found.clipping_norm:g} in round 1",
        "noise on mean: of the mean update, over the clipping norm; above 1 it drowns what sites send",
    ]
    if found.minutes is not None and found.peak_memory_bytes is not None:
        lines.append(
            f"about {found.minutes:.2g} minutes of training of all sites, one by one on {found.device} (an "
            f"estimate); memory: {decimal(found.peak_memory_bytes)} at most"
        )
    for line in lines:
        console.print(f"  {line}", markup=False, soft_wrap=True)
