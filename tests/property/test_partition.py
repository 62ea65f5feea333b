"""Partitions over random rows, sites, concentrations and seeds."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quorate.client.data.splits import LoadedRow
from quorate.shared.config.sites_config import Column, Dirichlet, Iid, Partition, Sizes
from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import Split
from quorate.simulations.partition import partition

fast = settings(max_examples=60)
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
WARDS = ("A", "B-2", "St. Mary")


def make(sizes: tuple[int, int, int], classes: int, seed: int) -> dict[Split, list[LoadedRow]]:
    rng = np.random.default_rng(seed)
    return {
        split: [
            LoadedRow(
                {"text": "x", "label": int(rng.integers(classes))},
                f"{split}:{index}",
                {"ward": WARDS[int(rng.integers(3))]},
            )
            for index in range(size)
        ]
        for split, size in zip(SPLITS, sizes, strict=True)
    }


sites = st.integers(1, 6)
seeds = st.integers(0, 2**31)
kinds = st.one_of(
    st.builds(Iid, by=st.just("iid"), sites=sites, seed=seeds),
    st.builds(
        Dirichlet,
        by=st.just("dirichlet"),
        sites=sites,
        seed=seeds,
        alpha=st.sampled_from([0.05, 0.5, 5.0, 1000.0]),
        min_rows=st.integers(1, 5),
    ),
    st.builds(
        Sizes,
        by=st.just("sizes"),
        seed=seeds,
        shares=st.lists(st.floats(0.01, 10), min_size=1, max_size=6).map(tuple),
    ),
    st.builds(Column, by=st.just("column"), column=st.just("ward")),
)
rows = st.builds(
    make,
    st.tuples(st.integers(1, 120), st.integers(0, 40), st.integers(0, 40)),
    st.integers(2, 5),
    st.integers(0, 2**31),
)


@fast
@given(kinds, rows)
def test_every_row_lands_at_one_site_in_its_order(
    kind: Partition, rows: dict[Split, list[LoadedRow]]
) -> None:
    try:
        parts = partition(kind, rows)
    except DataError:
        assume(False)
    for split, members in rows.items():
        landed = [row.source for site in parts.values() for row in site[split]]
        assert sorted(landed) == sorted(row.source for row in members)
        order = {row.source: index for index, row in enumerate(members)}
        for site in parts.values():
            places = [order[row.source] for row in site[split]]
            assert places == sorted(places)
    least = kind.min_rows if isinstance(kind, Dirichlet) else 1
    assert all(len(site["train"]) >= least for site in parts.values())


@fast
@given(kinds, rows)
def test_the_seed_decides(kind: Partition, rows: dict[Split, list[LoadedRow]]) -> None:
    try:
        first = partition(kind, rows)
    except DataError as error:
        with pytest.raises(DataError) as again:
            partition(kind, rows)
        assert str(again.value) == str(error)
    else:
        assert partition(kind, rows) == first


@fast
@given(sites, st.integers(0, 200), st.integers(0, 40), seeds)
def test_iid_sites_have_equal_sizes(count: int, train: int, test: int, seed: int) -> None:
    assume(train >= count)
    parts = partition(Iid(by="iid", sites=count, seed=seed), make((train, 0, test), 2, seed))
    for split in ("train", "test"):
        sizes = [len(site[split]) for site in parts.values()]
        assert max(sizes) - min(sizes) <= 1


@fast
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), seeds)
def test_sizes_follow_the_shares(shares: list[int], seed: int) -> None:
    parts = partition(Sizes(by="sizes", shares=tuple(shares), seed=seed), make((300, 50, 0), 3, seed))
    for split, total in (("train", 300), ("validation", 50)):
        for site, share in zip(parts.values(), shares, strict=True):
            assert abs(len(site[split]) - total * share / sum(shares)) <= 1


@fast
@given(sites, st.sampled_from([0.1, 0.5, 2.0]), seeds)
def test_dirichlet_sites_are_tested_on_the_mix_they_train_on(count: int, alpha: float, seed: int) -> None:
    data = make((600, 0, 300), 3, seed)
    parts = partition(Dirichlet(by="dirichlet", sites=count, alpha=alpha, min_rows=1, seed=seed), data)
    totals = {split: Counter(row.values["label"] for row in data[split]) for split in ("train", "test")}
    for site in parts.values():
        counts = {split: Counter(row.values["label"] for row in site[split]) for split in ("train", "test")}
        for label in range(3):
            share = [counts[split][label] / totals[split][label] for split in ("train", "test")]
            # Each count is within a row of the drawn share.
            assert abs(share[0] - share[1]) <= 1 / totals["train"][label] + 1 / totals["test"][label]
