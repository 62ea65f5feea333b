"""Partitions by example, and what is said when there is none."""

from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

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
    with pytest.raises(DataError, match=r"rows\.csv:3: column 'ward' names no site; fill it in"):
        partition(Column(by="column", column="ward"), make("north", value))


def test_columns_that_cannot_name_sites() -> None:
    with pytest.raises(DataError, match=r"rows\.csv:2: column 'hospital' names no site; .*partition\.column"):
        partition(Column(by="column", column="hospital"), make("north"))
    with pytest.raises(DataError, match=r"rows\.csv:2: column 'ward' holds no usable site name"):
        partition(Column(by="column", column="ward"), make("???"))
    with pytest.raises(DataError, match="holds no usable site name") as caught:
        partition(Column(by="column", column="ward"), make("Mrs Miller " * 9))
    assert "Miller" not in str(caught.value)
    with pytest.raises(
        DataError, match=r"column 'ward': 'ward 1' and 'ward/1' would both be site ward-1; spell"
    ):
        partition(Column(by="column", column="ward"), make("ward 1", "ward/1"))


def test_a_site_without_training_rows() -> None:
    rows = make("north")
    rows["test"] = make("south")["train"]
    with pytest.raises(DataError, match=r"site south has no training rows"):
        partition(Column(by="column", column="ward"), rows)
    with pytest.raises(DataError, match=r"site site-3 has no training rows: 3 rows over 4 sites by iid"):
        partition(Iid(by="iid", sites=4), make("a", "b", "c"))
    with pytest.raises(DataError, match=r"site tiny has no training rows: 3 rows over 2 sites by sizes"):
        partition(Sizes(by="sizes", sites=("big", "tiny"), shares=(1000, 1)), make("a", "b", "c"))


def test_min_rows_that_cannot_be_met() -> None:
    with pytest.raises(
        DataError, match=r"30 training rows cannot give each of 4 sites min_rows 10; lower min_rows"
    ):
        partition(Dirichlet(by="dirichlet", sites=4, alpha=0.5), make(*["x"] * 30))
    with pytest.raises(
        DataError, match=r"1000 draws with alpha 0\.001 gave no partition of 40 .*raise alpha"
    ):
        partition(Dirichlet(by="dirichlet", sites=4, alpha=0.001), make(*["x"] * 40))


def test_dirichlet_needs_labels() -> None:
    rows: dict[Split, list[LoadedRow]] = {"train": [LoadedRow({"text": "x"}, "f:1", {})] * 20}
    with pytest.raises(DataError, match=r"a Dirichlet partition needs labels.*use iid or sizes"):
        partition(Dirichlet(by="dirichlet", sites=2, alpha=1.0), rows)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"by": "iid", "sites": 0}, "greater than or equal to 1"),
        ({"by": "iid", "sites": []}, "at least 1 item"),
        ({"by": "iid", "sites": ["a", "a"]}, "site name 'a' is given twice"),
        ({"by": "iid", "sites": ["a b"]}, "pattern"),
        ({"by": "sizes", "shares": [1, 2], "sites": ["a"]}, "2 shares for 1 sites"),
        ({"by": "sizes", "shares": [1, 0]}, "greater than 0"),
        ({"by": "dirichlet", "sites": 2, "alpha": 0}, "greater than 0"),
        ({"by": "magic", "sites": 2}, "magic"),
    ],
)
def test_partitions_that_cannot_be(kind: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PartitionedData.model_validate({"source": "rows.csv", "partition": kind})
