"""The data of simulated sites, and where recipes and sites files lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from quorate.client.data.mapping import LoadedRow
from quorate.client.data.placement import Placement
from quorate.client.data.splits import image_columns, load_splits, measured_apart
from quorate.shared.config.privacy_config import SitePrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.config.sites_config import PartitionedData, SiteList, SitesConfig, SourceConfig
from quorate.shared.errors import BadInput, ConfigError, DataError
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row
from quorate.simulations.partition import partition

_HERE = Path(__file__).resolve().parent


def load_sites(sites: SitesConfig, base_dir: Path, run: RunConfig) -> dict[str, dict[Split, list[Row]]]:
    """Load the rows of every simulated site for a run.

    Args:
        sites: what each alias means.
        base_dir: the sites file's folder, where relative paths start.
        run: its data alias, task columns and labels.
    Returns: site name -> split -> rows with the task's columns alone. Every site has training rows; it may
        lack labels, and validation or test rows.
    Raises: ConfigError: the sites file does not know the alias, or does not fit the run. DataError: the data
        cannot be read, partitioned or used; names the site.
    """
    data = source_of(sites, run)
    loaded: Mapping[str, Mapping[Split, Sequence[LoadedRow]]]
    if isinstance(data, SiteList):
        loaded = {
            site.name: _load_one(site, base_dir, run, f"data.{run.data}, site {site.name}")
            for site in data.sites
        }
    else:
        where = f"data.{run.data}"
        rows = _load_one(data, base_dir, run, where)
        try:
            loaded = partition(data.partition, rows)
        except DataError as error:
            raise DataError(f"{where}: {error}", kind=error.kind) from error
    if isinstance(run.privacy, SitePrivacy):
        loaded = {name: _measured_apart(data, name, splits, run) for name, splits in loaded.items()}
    # The task gets its own columns and no others: what a run does not name stays out of it.
    return {
        name: {
            split: [Row(row.values, row.source, group=row.group) for row in rows]
            for split, rows in splits.items()
        }
        for name, splits in loaded.items()
    }


def source_of(sites: SitesConfig, run: RunConfig) -> PartitionedData | SiteList:
    """Return what the run's data alias means.

    Raises: ConfigError: the sites file does not know it.
    """
    data = sites.data.get(run.data)
    if data is None:
        raise ConfigError(
            f"the sites file has no data {run.data!r}; it has {', '.join(sorted(sites.data))}. "
            "Add it there, or correct `data` in the run file.",
            kind="unknown-data",
        )
    return data


def _load_one(
    source: SourceConfig, base_dir: Path, run: RunConfig, where: str
) -> dict[Split, list[LoadedRow]]:
    # Not every task has labels; those that have list them under this name.
    labels: tuple[str, ...] = getattr(run.task, "labels", ())
    try:
        return load_splits(source, base_dir, run.task.columns, labels)
    except BadInput as error:
        raise type(error)(f"{where}: {error}", kind=error.kind) from error


def _measured_apart(
    data: PartitionedData | SiteList, name: str, splits: Mapping[Split, Sequence[LoadedRow]], run: RunConfig
) -> Mapping[Split, Sequence[LoadedRow]]:
    """Leave out of a site's training rows what is measured too, as a site does under privacy."""
    (source,) = [site for site in data.sites if site.name == name] if isinstance(data, SiteList) else [data]
    images = image_columns(source, run.task.columns)
    return measured_apart(splits, Placement.of_seed(source.split.seed), images, by_group=False)[0]


def default_sites_path(run_path: Path) -> Path:
    """Return where a run file's sites file lies unless named: medquad.sites.yaml beside medquad.yaml."""
    return run_path.with_name(f"{run_path.stem}.sites{run_path.suffix}")


def recipes() -> dict[str, Path]:
    """Return the run files that come with Quorate: name (such as `demo` or `hub/medquad`) -> file."""
    # In a wheel the recipes lie inside this package, in a checkout beside it.
    for folder in (_HERE / "recipes", _HERE.parents[1] / "recipes"):
        if folder.is_dir():
            found = {
                path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")
            }
            return {name: path for name, path in sorted(found.items()) if not name.endswith(".sites")}
    raise ConfigError(f"the recipes are missing beside {_HERE}; install quorate again.")


def find_recipe(name: str) -> Path:
    """Find a run file that comes with Quorate.

    Args:
        name: as `recipes` lists it, without `.yaml`.
    Raises: ConfigError: there is none of this name; lists those there are.
    """
    known = recipes()
    if name not in known:
        message = f"there is no recipe {name!r}; there are {', '.join(known)}. A file is named by its path."
        raise ConfigError(message, kind="no-such-recipe")
    return known[name]
