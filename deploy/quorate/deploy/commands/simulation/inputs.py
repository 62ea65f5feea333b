"""What a simulation reads: run file or recipe, sites file, rows of every site. Not in the wheel for sites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quorate.shared.errors import BadInput, ConfigError

if TYPE_CHECKING:
    from quorate.shared.config.run_config import RunConfig
    from quorate.shared.config.sites_config import SitesConfig
    from quorate.shared.protocol.messages import Split
    from quorate.shared.tasks.task import Row


def find_run(run: str) -> Path:
    """Return the run file that RUN names: a file, else a recipe.

    Raises: ConfigError: there is neither; lists the recipes.
    """
    from quorate.simulations.simulated_sites import find_recipe

    path = Path(run)
    if path.exists():
        return path
    if path.suffix in (".yaml", ".yml", ".json") or path.is_absolute():
        message = f"{run}: there is no such file; check the path, or name a recipe without its ending."
        raise ConfigError(message)
    return find_recipe(run)


def find_sites(sites: Path | None, run_path: Path) -> Path:
    """Return the sites file: the one named, else the one beside the run file.

    Raises: ConfigError: there is none.
    """
    from quorate.simulations.simulated_sites import default_sites_path

    path = sites or default_sites_path(run_path)
    if not path.exists():
        raise ConfigError(
            f"{path}: there is no such file; a simulation needs a sites file, which says where the data of "
            "each site lie: put it there, or name it with --sites."
        )
    return path


def load_rows(sites: SitesConfig, path: Path, run: RunConfig) -> dict[str, dict[Split, list[Row]]]:
    """Load every site's rows: site -> split -> rows.

    Args:
        path: the sites file, which messages name.
    Raises: BadInput: as `load_sites`, with the sites file in front.
    """
    from quorate.simulations.simulated_sites import load_sites

    try:
        return load_sites(sites, path.parent, run)
    except BadInput as error:
        raise type(error)(f"{path}: {error}", kind=error.kind) from error
