"""Data sets from a model hub, through the `datasets` library where that is installed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from importlib import import_module, metadata
from typing import Any

from quorate.client.data.readers.tables import split_of
from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import Split
from quorate.shared.tasks.task import Row

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def read_hub(repo_id: str, revision: str | None) -> dict[Split, list[Row]]:
    """Read the train, validation and test splits of a hub data set; other splits are left alone.

    Args:
        repo_id: ORGANISATION/NAME.
        revision: commit, tag or branch.
    Returns: raw rows per split; values of class-label columns are label names, for their numbers follow the
        data set's order and not the run's.
    Raises: DataError: `datasets` is missing or so old that it would run a data set's own code, or the hub
        cannot give the data set.
    """
    origin = f"hub:{repo_id}"
    if not _HUB_ID.fullmatch(repo_id):
        raise DataError(f"{origin} is not hub:ORGANISATION/NAME.", kind="not-a-hub-id")
    library = _datasets(origin)
    log.warning("reading %s from the local cache or the hub (HF_HUB_OFFLINE=1 forbids fetching)", origin)
    try:
        loaded = library.load_dataset(repo_id, revision=revision)
    except (OSError, RuntimeError, ValueError, library.exceptions.DatasetsError) as error:
        raise DataError(
            f"{origin} cannot be loaded ({type(error).__name__}); check the name, the revision, your access "
            "and the network. Data sets that need code of their own are not read."
        ) from None  # the library's own message may quote rows
    splits: dict[Split, list[Row]] = {}
    for name, table in loaded.items():
        if (split := split_of(name)) is not None:
            for column, feature in table.features.items():
                if isinstance(feature, library.Image):  # as files have it: opened later, by the task
                    table = table.cast_column(column, library.Image(decode=False))
            splits[split] = list(_rows(table, table.features, f"{origin}/{name}"))
            if not splits[split]:
                raise DataError(f"{origin}/{name} is empty: it holds no row.")
    return splits


def _datasets(origin: str) -> Any:
    try:
        library = import_module("datasets")
    except ImportError as error:
        message = f"{origin} needs the library datasets: pip install 'datasets>=4', or give a file or folder."
        raise DataError(message, kind="no-datasets-library") from error
    version = metadata.version("datasets")
    if int(version.split(".")[0]) < 4:
        raise DataError(f"{origin}: datasets {version} can run a data set's code; pip install 'datasets>=4'.")
    return library


def _rows(table: Iterable[Mapping[str, Any]], features: Mapping[str, Any], origin: str) -> Iterable[Row]:
    classes = {column: feature for column, feature in features.items() if _has_names(feature)}
    for number, values in enumerate(table, start=1):
        named = {column: _named(values[column], feature) for column, feature in classes.items()}
        yield Row({**values, **named}, f"{origin}:{number}")


def _has_names(feature: Any) -> bool:
    """Whether a feature is class labels, or lists or fields of them (the categories of boxes)."""
    if isinstance(feature, Mapping):
        return any(map(_has_names, feature.values()))
    inner = getattr(feature, "feature", None)
    return bool(getattr(feature, "names", None)) or (inner is not None and _has_names(inner))


def _named(value: Any, feature: Any) -> Any:
    inner = getattr(feature, "feature", None)
    if isinstance(value, Mapping):  # a sequence of fields may be read as fields of sequences
        fields = feature if isinstance(feature, Mapping) else inner if isinstance(inner, Mapping) else {}
        return {key: _named(each, fields.get(key)) for key, each in value.items()}
    if isinstance(value, list):
        return [_named(item, feature if inner is None else inner) for item in value]
    names = getattr(feature, "names", None)
    # -1 says that a label is held back; it stays, to be refused with the row's number.
    return value if not names or value is None or value < 0 else names[value]
