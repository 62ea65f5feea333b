"""The data report over the sites of a sites file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from quorate.client.data.mapping import LoadedRow
from quorate.client.data.quality import SourceReport, inspect_site, read_all
from quorate.client.data.quality_report import DataReport, errors_of, tokenizer
from quorate.shared.config.run_config import RunConfig
from quorate.shared.config.sites_config import SiteList, SitesConfig, SourceConfig
from quorate.shared.errors import BadInput, ConfigError
from quorate.shared.protocol.messages import Split
from quorate.simulations.partition import partition
from quorate.simulations.simulated_sites import source_of


def inspect_data(sites: SitesConfig, base_dir: Path, run: RunConfig, only: str | None = None) -> DataReport:
    """Look at the data of every site, or of one.

    Args:
        sites: what each alias means.
        base_dir: the sites file's folder.
        run: its data alias, task and model.
        only: the one site to look at.
    Raises: ConfigError: the sites file does not know the alias or the site.
    """
    data = source_of(sites, run)
    listed = data.sites if isinstance(data, SiteList) else ()
    if listed and only is not None and only not in {site.name for site in listed}:
        raise ConfigError(_no_such_site(only, [site.name for site in listed]))
    notes: list[str] = []
    processor = tokenizer(run, notes)
    sources: list[SourceReport] = []
    found: dict[str, Mapping[Split, Sequence[LoadedRow]]] = {}
    errors: list[str] = []
    wanted: list[tuple[str, SourceConfig]] = [(run.data, data)] if not isinstance(data, SiteList) else [
        (site.name, site) for site in listed if only in (None, site.name)
    ]  # fmt: skip
    for name, source in wanted:
        try:
            rows, report = read_all(source, base_dir, run.task, name)
            sources.append(report)
            if report.unusable:
                errors.append(f"{name}: {report.unusable} rows cannot be used")
            found.update({name: rows} if isinstance(data, SiteList) else partition(data.partition, rows))
        except BadInput as error:
            errors.append(f"{name}: {error}")
    if not listed and only is not None and found:
        if only not in found:
            raise ConfigError(_no_such_site(only, list(found)))
        found = {only: found[only]}
    looked = [inspect_site(name, rows, run.task, processor) for name, rows in found.items()]
    errors += errors_of(looked)
    return DataReport(run=run.name, ok=not errors, sources=sources, sites=looked, errors=errors, notes=notes)


def _no_such_site(name: str, known: Sequence[str]) -> str:
    return f"--site: there is no site {name!r}; there are {', '.join(known)}."
