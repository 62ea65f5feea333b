"""Sharing one data set out over simulated sites.

Every row lands at exactly one site. The rows of a site keep the order they have in the data. Train,
validation and test are shared out alike, so that what a site is tested on looks like what it trains on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from quorate.client.data.mapping import LABEL, LoadedRow
from quorate.client.data.splits import stratum
from quorate.shared.config.sites_config import Column, Dirichlet, Iid, Partition, Sizes
from quorate.shared.config.template import is_missing
from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import Split
from quorate.shared.seeds import rng

Rows = Mapping[Split, Sequence[LoadedRow]]
_DRAWS = 1000


def partition(kind: Partition, rows: Rows) -> dict[str, dict[Split, list[LoadedRow]]]:
    """Share rows out.

    Args:
        kind: how; its seed decides every draw.
    Returns: site name -> split -> rows, in the order of the sites' names as configured (alphabetical for
        `column`). Every site has training rows; it may lack validation or test rows.
    Raises: DataError: a site would be left without training rows, `min_rows` cannot be met, or a row does not
        name its site.
    """
    if isinstance(kind, Column):
        names, places = _by_column(kind, rows)
    else:
        names = site_names(kind)
        if isinstance(kind, Dirichlet):
            places = _dirichlet(kind, rows, len(names))
        else:
            shares = kind.shares if isinstance(kind, Sizes) else (1.0,) * len(names)
            places = {split: _deal(len(rows[split]), np.array(shares), kind.seed, split) for split in rows}
    sites: dict[str, dict[Split, list[LoadedRow]]] = {name: {split: [] for split in rows} for name in names}
    for split, members in rows.items():
        for row, place in zip(members, places[split], strict=True):
            sites[names[place]][split].append(row)
    if empty := [name for name, splits in sites.items() if not splits["train"]]:
        raise DataError(
            f"site {empty[0]} has no training rows: {len(rows['train'])} rows over {len(names)} sites by "
            f"{kind.by}; use fewer sites or more rows.",
            kind="site-without-rows",
        )
    return sites


def site_names(kind: Iid | Dirichlet | Sizes) -> list[str]:
    """Return the names of a partition's sites: as given, or site-1, site-2, ..."""
    given = kind.sites
    if given is None and isinstance(kind, Sizes):
        given = len(kind.shares)
    if isinstance(given, tuple):
        return list(given)
    return [f"site-{number}" for number in range(1, int(given or 0) + 1)]


def _cut(count: int, shares: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Cut `count` into whole numbers in proportion to `shares`; rounded running totals keep the sum."""
    edges = np.floor(np.cumsum(shares) / shares.sum() * count + 0.5).astype(np.int64)
    edges[-1] = count
    cut: npt.NDArray[np.int64] = np.diff(edges, prepend=0)
    return cut


def _deal(count: int, shares: npt.NDArray[np.float64], seed: int, *path: str) -> npt.NDArray[np.int64]:
    """Deal `count` rows out at random. Returns the site of each row, [count]."""
    places = np.repeat(np.arange(len(shares)), _cut(count, shares))
    return rng(seed, "deal", *path).permutation(places)


def _dirichlet(kind: Dirichlet, rows: Rows, sites: int) -> dict[Split, npt.NDArray[np.int64]]:
    """Draw for each label how it is shared out over the sites, and share every split out so.

    Source: Hsu, Qi and Brown 2019, arXiv:1909.06335, in the form that shares each label out over the sites;
    several labels at once count as one label per combination.
    """
    train = rows["train"]
    if any(not isinstance(row.values.get(LABEL), int | list) for row in train[:1]):
        message = "a Dirichlet partition needs labels, which this task's rows lack; use iid or sizes."
        raise DataError(message, kind="no-labels")
    if len(train) < sites * kind.min_rows:
        raise DataError(
            f"{len(train)} training rows cannot give each of {sites} sites min_rows {kind.min_rows}; "
            "lower min_rows or use fewer sites.",
            kind="below-min-rows",
        )
    strata = {split: _strata(members) for split, members in rows.items()}
    labels = sorted({label for groups in strata.values() for label in groups})
    for draw in range(_DRAWS):
        mixes = rng(kind.seed, "dirichlet", draw).dirichlet(np.full(sites, kind.alpha), size=len(labels))
        shares = dict(zip(labels, mixes, strict=True))
        totals = sum(_cut(len(group), shares[label]) for label, group in strata["train"].items())
        if np.min(totals) >= kind.min_rows:
            break
    else:
        raise DataError(
            f"{_DRAWS} draws with alpha {kind.alpha} gave no partition of {len(train)} training rows into "
            f"{sites} sites with min_rows {kind.min_rows} each; raise alpha or lower min_rows.",
            kind="no-such-partition",
        )
    places = {split: np.zeros(len(members), dtype=np.int64) for split, members in rows.items()}
    for split, groups in strata.items():
        for label, group in groups.items():
            places[split][group] = _deal(len(group), shares[label], kind.seed, split, label)
    return places


def _strata(rows: Sequence[LoadedRow]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[stratum(row)].append(index)
    return groups


def _by_column(kind: Column, rows: Rows) -> tuple[list[str], dict[Split, npt.NDArray[np.int64]]]:
    values = {split: [_site_of(row, kind.column) for row in members] for split, members in rows.items()}
    origins: dict[str, str] = {}
    for pairs in values.values():
        for name, value in pairs:
            if origins.setdefault(name, value) != value:
                raise DataError(
                    f"column {kind.column!r}: {origins[name]!r} and {value!r} would both be site {name}; "
                    "spell them alike if they are one site, or apart by letters or digits.",
                    kind="sites-alike",
                )
    names = sorted(origins)
    index = {name: place for place, name in enumerate(names)}
    places = {
        split: np.array([index[name] for name, _ in pairs], dtype=int) for split, pairs in values.items()
    }
    return names, places


def _site_of(row: LoadedRow, column: str) -> tuple[str, str]:
    if column not in row.raw or is_missing(row.raw[column]):
        message = f"{row.source}: column {column!r} names no site; fill it in, or correct partition.column."
        raise DataError(message, kind="no-site")
    value = str(row.raw[column]).strip()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", value).strip("-._")
    if not name or len(name) > 64:
        raise DataError(
            f"{row.source}: column {column!r} holds no usable site name (letters and digits, at most 64); "
            "correct the value, or correct partition.column.",
            kind="no-site-name",
        )
    return name, value
