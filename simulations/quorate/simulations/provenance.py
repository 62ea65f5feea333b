"""What a simulated run came from, kept beside its run.yaml, so that it can be made again.

`sites.yaml` says where the rows were read (relative paths made absolute, `${VARIABLE}` as written), and
`environment.json` holds what else shapes the result: versions, threads, device, and a hash of every split of
every site as it was loaded. Both hold paths of data, so a coordinator in production never writes them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from quorate.client.site.data_source import SiteRows
from quorate.server.rounds.run import RUN_FILE
from quorate.server.tracking.records import Record
from quorate.shared.config.load import load_run, load_sites_file
from quorate.shared.config.read import dump_yaml
from quorate.shared.config.run_config import RunConfig
from quorate.shared.config.sites_config import SiteList, SitesConfig, SourceConfig
from quorate.shared.errors import DataError, OutputError
from quorate.shared.model.base_model import default_device
from quorate.shared.model.sources import PACKAGE, expand, is_hub_id
from quorate.shared.process.files import BY_UMASK, write_atomically
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Kind, Row
from quorate.simulations.simulated_sites import load_sites

log = logging.getLogger(__name__)

SITES_FILE, ENVIRONMENT_FILE = "sites.yaml", "environment.json"
_LIBRARIES = ("quorate", "flwr", "torch", "transformers", "peft", "numpy", "tokenizers", "safetensors")
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_KINDS = (PACKAGE, "hub:", "sklearn:")
"""Sources that are no paths."""


class SplitHash(Record):
    """The rows of one split of one site."""

    rows: int
    sha256: str
    """Of their task columns, in order; of the content of image files."""


class Environment(Record):
    """What shapes a simulated run beside its run file."""

    versions: dict[str, str]
    """Of quorate and the libraries that compute."""
    python: str
    """Of the interpreter."""
    platform: str
    """Operating system and kind of processor."""
    device: str
    """`cpu`, or the GPU's name."""
    threads: int
    """Of torch on the CPU; sums come out differently in their last bits with another number."""
    working_directory: str
    """Where a relative path of a model starts."""
    variables: dict[str, str]
    """Environment variables that run and sites file name."""
    data: dict[str, dict[Split, SplitHash]]
    """Site -> split -> what was loaded."""


@dataclass(frozen=True)
class Origin:
    """Where a run came from.

    Args:
        sites: the run's data alias alone, with sources that any working directory understands.
        environment: the rest.
    """

    sites: SitesConfig
    environment: Environment

    @classmethod
    def of(
        cls, config: RunConfig, sites: SitesConfig, base_dir: Path, rows: Mapping[str, SiteRows]
    ) -> Origin:
        """Describe a run that is about to start.

        Args:
            rows: what was loaded: site name -> split -> rows.
        """
        data = sites.data[config.data]
        if isinstance(data, SiteList):
            moved = tuple(_absolute(site, base_dir) for site in data.sites)
            kept = SitesConfig(data={config.data: SiteList(sites=moved)})
        else:
            kept = SitesConfig(data={config.data: _absolute(data, base_dir)})
        texts = [config.model.model_name_or_path, kept.canonical_json()]
        names = sorted({name for text in texts for name in _VARIABLE.findall(text)})
        environment = Environment(
            versions={name: version(name) for name in _LIBRARIES},
            python=platform.python_version(),
            platform=f"{platform.system()} {platform.machine()}",
            device=_device(),
            threads=torch.get_num_threads(),
            working_directory=str(Path.cwd()),
            variables={name: os.environ[name] for name in names if name in os.environ},
            data=hash_data(rows, config.task.columns),
        )
        return cls(kept, environment)

    def keep(self, output_dir: Path) -> None:
        """Write both files; where a run that goes on has them already, check that its data are the same.

        Raises: DataError: naming the site and the split that changed. OutputError: they cannot be written.
        """
        if (output_dir / ENVIRONMENT_FILE).exists():
            check_same(read_environment(output_dir), self.environment, output_dir)
            return
        write_atomically(output_dir / SITES_FILE, dump_yaml(self.sites), BY_UMASK)
        write_atomically(
            output_dir / ENVIRONMENT_FILE, self.environment.model_dump_json(indent=2) + "\n", BY_UMASK
        )


def reopen(folder: Path) -> tuple[RunConfig, dict[str, dict[Split, list[Row]]], Origin]:
    """Return what a run was made from, in its state, ready to be simulated again.

    Variables that are not set get the values they had; torch gets as many threads as it had.

    Returns: run, rows (site -> split -> rows), and the origin of the run to be made.
    Raises: OutputError: the folder holds no run that a simulation wrote. DataError: naming the site and the
        split that changed. ConfigError, DataError: run, sites or data cannot be read.
    """
    if not (folder / RUN_FILE).is_file():
        raise OutputError(f"{folder}: holds no run (no {RUN_FILE}); name the output folder of a run.")
    before = read_environment(folder)
    for name, value in before.variables.items():
        if not os.environ.get(name):
            log.info("%s is not set; using the run's %s", name, value)
            os.environ[name] = value
    config = _with_absolute_model(load_run(folder / RUN_FILE), Path(before.working_directory))
    sites = load_sites_file(folder / SITES_FILE)
    torch.set_num_threads(before.threads)
    rows = load_sites(sites, folder, config)
    origin = Origin.of(config, sites, folder, rows)
    check_same(before, origin.environment, folder)
    return config, rows, origin


def read_environment(folder: Path) -> Environment:
    """Read environment.json.

    Raises: OutputError: there is none, or it is damaged.
    """
    path = folder / ENVIRONMENT_FILE
    try:
        return Environment.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OutputError(
            f"{folder}: has no {ENVIRONMENT_FILE}, so what the run read is not known: a simulation writes it "
            "since this release, production never does; use `quorate simulate` with the sites file."
        ) from error
    except (OSError, ValidationError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({type(error).__name__}); restore it.") from error


def check_same(before: Environment, now: Environment, folder: Path) -> None:
    """Refuse other data than the run's, and warn of whatever else may change the last bits.

    Raises: DataError: naming every site and split whose rows are not those of the run.
    """
    problems = []
    for site in dict.fromkeys([*before.data, *now.data]):
        for split in _SPLITS:
            old, new = before.data.get(site, {}).get(split), now.data.get(site, {}).get(split)
            if old != new and (old or new):
                problems.append(f"site {site}, split {split}: {_rows(old)} then, {_rows(new)} now")
    if problems:
        raise DataError(
            f"the data are not those of the run in {folder}: {'; '.join(problems)}. Restore the data, or "
            "start a new run with `quorate simulate`."
        )
    for name in sorted({*before.versions, *now.versions}):
        _warn_of(f"version of {name}", before.versions.get(name), now.versions.get(name))
    for name in ("python", "platform", "device", "threads"):
        _warn_of(name, getattr(before, name), getattr(now, name))


def hash_data(rows: Mapping[str, SiteRows], kinds: Mapping[str, Kind]) -> dict[str, dict[Split, SplitHash]]:
    """Return site -> split -> number and hash of its rows, in order; a split without rows has none."""
    return {
        site: {
            split: SplitHash(rows=len(splits[split]), sha256=_hash(splits[split], kinds))
            for split in _SPLITS
            if splits.get(split)
        }
        for site, splits in rows.items()
    }


def _hash(rows: Sequence[Row], kinds: Mapping[str, Kind]) -> str:
    images = [name for name, kind in kinds.items() if kind == "image"]
    total = hashlib.sha256()
    for row in rows:
        values = {**row.values, **{name: _content(row.values.get(name)) for name in images}}
        total.update(json.dumps(values, sort_keys=True, default=_plain).encode() + b"\n")
    return total.hexdigest()


def _content(image: Any) -> Any:
    """Return the hash of an image file, for its path may differ where the picture does not."""
    path = Path(image) if isinstance(image, str | Path) else None
    if path is None or not path.is_file():
        return image
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _absolute(source: SourceConfig, base_dir: Path) -> SourceConfig:
    """Return the source with a path that does not depend on where the sites file lay."""
    text = source.source
    if text.startswith(_KINDS) or Path(expand(text, "source")).expanduser().is_absolute():
        return source
    return source.model_copy(update={"source": str(base_dir.resolve() / text)})


def _with_absolute_model(config: RunConfig, working_directory: Path) -> RunConfig:
    """Return the run with a model folder that was relative to the run's working directory written out."""
    reference = config.model.model_name_or_path
    text = expand(reference, "model.model_name_or_path")
    no_folder = text.startswith(PACKAGE) or (text == reference and is_hub_id(text, working_directory))
    if no_folder or Path(text).expanduser().is_absolute():
        return config
    model = config.model.model_copy(update={"model_name_or_path": str(working_directory / text)})
    return config.model_copy(update={"model": model})


def _device() -> str:
    device = default_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _rows(split: SplitHash | None) -> str:
    return f"{split.rows} rows with hash {split.sha256[:8]}" if split else "no rows"


def _warn_of(what: str, before: object, now: object) -> None:
    if before != now:
        log.warning("%s was %s, is %s: the adapter may come out differently", what, before, now)
