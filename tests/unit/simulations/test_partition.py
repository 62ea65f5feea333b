"""Partitions by example, and what is said when there is none."""

from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError
from refusals import refuses

from quorate.client.data.splits import LoadedRow
from quorate.shared.config.sites_config import Column, Dirichlet, Iid, PartitionedData, Sizes
from quorate.shared.errors import DataError
from quorate.shared.protocol.messages import Split
from quorate.simulations.partition import partition


def make(*wards: Any, labels: int = 2) -> dict[Split, list[LoadedRow]]:
    train = [
        LoadedRow({"text": "x", "label": index % labels}, f"rows.csv:{index + 2}", {"ward": ward})
        for index, ward in enumerate(wards)
    ]
    return {"train": train, "validation": [], "test": []}


def test_sites_are_named_as_asked_or_numbered() -> None:
    rows = make(*"abcdefghij")
    assert list(partition(Iid(by="iid", sites=("south", "north")), rows)) == ["south", "north"]
    assert list(partition(Iid(by="iid", sites=2), rows)) == ["site-1", "site-2"]
    assert list(partition(Sizes(by="sizes", shares=(1, 2, 3)), rows)) == ["site-1", "site-2", "site-3"]


def test_a_column_names_the_sites() -> None:
    rows = make("St. Mary's", "north", 7, "north")
    parts = partition(Column(by="column", column="ward"), rows)
    assert {name: [row.source for row in site["train"]] for name, site in parts.items()} == {
        "7": ["rows.csv:4"],
        "St.-Mary-s": ["rows.csv:2"],
        "north": ["rows.csv:3", "rows.csv:5"],
    }


def test_small_alpha_is_more_unequal_than_large() -> None:
    rows = make(*["x"] * 2000, labels=4)

    def largest_share(alpha: float) -> float:
        parts = partition(Dirichlet(by="dirichlet", sites=5, alpha=alpha, min_rows=1), rows)
        mixes = [Counter(row.values["label"] for row in site["train"]) for site in parts.values()]
        return max(max(mix.values()) / mix.total() for mix in mixes)

    assert largest_share(1000.0) < 0.3
    assert largest_share(0.05) > 0.8


def test_several_labels_at_once_can_be_partitioned() -> None:
    rows = make(*["x"] * 100)
    several = [LoadedRow({"label": [[], [0], [1, 0], [0, 1]][i % 4]}, str(i), {}) for i in range(100)]
    parts = partition(Dirichlet(by="dirichlet", sites=3, alpha=1.0), rows | {"train": several})
    assert sum(len(site["train"]) for site in parts.values()) == 100


@pytest.mark.parametrize("value", [None, "", float("nan")])
def test_a_row_without_a_site(value: Any) -> None:
    with refuses(DataError, "no-site", where="rows.csv:3") as caught:
        partition(Column(by="column", column="ward"), make("north", value))
    assert "'ward'" in str(caught.value)


def test_columns_that_cannot_name_sites() -> None:
    with refuses(DataError, "no-site", where="rows.csv:2") as caught:
        partition(Column(by="column", column="hospital"), make("north"))
    assert "'hospital'" in str(caught.value) and "partition.column" in str(caught.value)
    with refuses(DataError, "no-site-name", where="rows.csv:2") as caught:
        partition(Column(by="column", column="ward"), make("???"))
    assert "'ward'" in str(caught.value)
    with refuses(DataError, "no-site-name") as caught:
        partition(Column(by="column", column="ward"), make("Mrs Miller " * 9))
    assert "Miller" not in str(caught.value)
    with refuses(DataError, "sites-alike", where="column 'ward'") as caught:
        partition(Column(by="column", column="ward"), make("ward 1", "ward/1"))
    assert all(name in str(caught.value) for name in ("'ward 1'", "'ward/1'", "ward-1"))


def test_a_site_without_training_rows() -> None:
    rows = make("north")
    rows["test"] = make("south")["train"]
    with refuses(DataError, "site-without-rows") as caught:
        partition(Column(by="column", column="ward"), rows)
    assert "site south " in str(caught.value)
    with refuses(DataError, "site-without-rows") as caught:
        partition(Iid(by="iid", sites=4), make("a", "b", "c"))
    assert all(said in str(caught.value) for said in ("site site-3 ", "3 rows", "4 sites", "iid"))
    with refuses(DataError, "site-without-rows") as caught:
        partition(Sizes(by="sizes", sites=("big", "tiny"), shares=(1000, 1)), make("a", "b", "c"))
    assert all(said in str(caught.value) for said in ("site tiny ", "3 rows", "2 sites", "sizes"))


def test_min_rows_that_cannot_be_met() -> None:
    with refuses(DataError, "below-min-rows") as caught:
        partition(Dirichlet(by="dirichlet", sites=4, alpha=0.5), make(*["x"] * 30))
    assert all(said in str(caught.value) for said in ("30 ", "4 sites", "min_rows 10"))
    with refuses(DataError, "no-such-partition") as caught:
        partition(Dirichlet(by="dirichlet", sites=4, alpha=0.001), make(*["x"] * 40))
    assert all(said in str(caught.value) for said in ("1000 ", "alpha 0.001", "40 "))


def test_dirichlet_needs_labels() -> None:
    rows: dict[Split, list[LoadedRow]] = {"train": [LoadedRow({"text": "x"}, "f:1", {})] * 20}
    with refuses(DataError, "no-labels"):
        partition(Dirichlet(by="dirichlet", sites=2, alpha=1.0), rows)


@pytest.mark.parametrize(
    ("kind", "place", "wrong"),
    [
        ({"by": "iid", "sites": 0}, ("iid", "sites", "one"), "greater_than_equal"),
        ({"by": "iid", "sites": []}, ("iid", "sites", "list"), "too_short"),
        ({"by": "iid", "sites": ["a", "a"]}, ("iid", "sites", "list"), "value_error"),
        ({"by": "iid", "sites": ["a b"]}, ("iid", "sites", "list", 0), "string_pattern_mismatch"),
        ({"by": "sizes", "shares": [1, 2], "sites": ["a"]}, ("sizes",), "value_error"),
        ({"by": "sizes", "shares": [1, 0]}, ("sizes", "shares", 1), "greater_than"),
        ({"by": "dirichlet", "sites": 2, "alpha": 0}, ("dirichlet", "alpha"), "greater_than"),
        ({"by": "magic", "sites": 2}, (), "union_tag_invalid"),
    ],
)
def test_partitions_that_cannot_be(kind: dict[str, Any], place: tuple[str, ...], wrong: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PartitionedData.model_validate({"source": "rows.csv", "partition": kind})
    first = caught.value.errors()[0]
    assert (first["loc"], first["type"]) == (("partition", *place), wrong)
