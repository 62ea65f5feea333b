"""The data report of a run: over what one site holds, or, in `quorate.simulations`, over simulated sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quorate.client.data.quality import SiteReport, SourceReport, inspect_site, read_all
from quorate.client.data.quality_rules import Report
from quorate.client.data.split_key import look_beside
from quorate.client.data.splits import image_columns
from quorate.client.policy.site_config import SiteConfig
from quorate.shared.config.run_config import RunConfig
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.errors import BadInput, ConfigError, DataError, ModelError


class DataReport(Report):
    """What `quorate data inspect` prints."""

    run: str
    ok: bool
    """Whether a run could use these data."""
    sources: list[SourceReport]
    sites: list[SiteReport]
    errors: list[str]
    """What would stop a run, a line each; bad rows are counted here and named with their source."""
    notes: list[str]
    """What was not looked at, and why."""


def own_source(site: SiteConfig, run: RunConfig) -> SourceConfig:
    """Return where the rows come from that a run would read at this site.

    Raises: ConfigError: site.yaml does not know the alias.
    """
    source = site.data.get(run.data)
    if source is None:
        raise ConfigError(
            f"site.yaml has no data {run.data!r}; it has {', '.join(sorted(site.data))}. "
            "Add it there, or tell the coordinator that `data` in the run file is wrong."
        )
    return source


def inspect_own_data(site: SiteConfig, base_dir: Path, run: RunConfig) -> DataReport:
    """Look at the data that a run would read at this site.

    Raises: ConfigError: site.yaml does not know the alias.
    """
    source = own_source(site, run)
    notes: list[str] = []
    errors: list[str] = []
    sources: list[SourceReport] = []
    looked: list[SiteReport] = []
    processor = tokenizer(run, notes)
    try:
        held = look_beside(base_dir)
        rows, report = read_all(source, base_dir, run.task, run.data, None if held is None else held.placing)
        if held is not None:
            rows, left = held.leave_out_trained(rows, image_columns(source, run.task.columns))
            if left:
                notes.append(f"{left} measured rows are left out: a private run was trained on them")
        sources.append(report)
        if report.unusable:
            errors.append(f"{run.data}: {report.unusable} rows cannot be used")
        looked.append(inspect_site(run.data, rows, run.task, processor))
    except BadInput as error:
        errors.append(f"{run.data}: {error}")
    errors += errors_of(looked)
    return DataReport(run=run.name, ok=not errors, sources=sources, sites=looked, errors=errors, notes=notes)


def errors_of(looked: list[SiteReport]) -> list[str]:
    """Return what was found that would stop a run, a line each."""
    return [f"{site.name}: {each.text}" for site in looked for each in site.findings if each.level == "error"]


def tokenizer(run: RunConfig, notes: list[str]) -> Any:
    """Return the model's tokenizer, for lengths; without one a note says so, and the rest is looked at."""
    if run.task.processor_class != "AutoTokenizer":
        return None
    from quorate.shared.model.base_model import load_tokenizer

    try:
        return load_tokenizer(run)
    except (ModelError, DataError, ConfigError) as error:
        notes.append(f"lengths in tokens were not measured: {error}")
        return None
