"""The sites file of a simulation: what each alias means at each simulated site.

In production every site has a file of its own that the coordinator never sees; a simulation describes all of
its sites in one, either as one data set that is partitioned or as a list of site folders.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from quorate.shared.config.base import ConfigModel
from quorate.shared.config.run import Name


class SplitConfig(ConfigModel):
    """How rows are split where the source has one file only."""

    validation: float = Field(0.15, ge=0, lt=1)
    """Share of rows for validation."""
    test: float = Field(0.2, ge=0, lt=1)
    """Share of rows for the test."""
    seed: int = 0
    """Seed of the split; rows are stratified by label where every label has enough of them."""

    @model_validator(mode="after")
    def _leaves_train(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must leave rows to train on (sum below 1)")
        return self


class SourceConfig(ConfigModel):
    """Where rows come from and how their columns and labels become the task's."""

    source: str = Field(min_length=1)
    """A folder with train, validation and test files; one file (.jsonl, .csv, .parquet); a hub id as
    `hub:ID`; `package:NAME/FILE`; or `sklearn:NAME` for a data set inside scikit-learn. `${VARIABLE}` is
    replaced from the environment; a relative path starts at the sites file's folder."""
    revision: str | None = None
    """Commit of a hub data set."""
    columns: dict[str, str] = {}
    """Task column -> column in the data, where they differ."""
    template: str | None = None
    """Builds the `text` column from other columns: `age {age:.0f}, pressure {trestbps:.0f}`. A part in double
    square brackets is left out when a column in it is missing."""
    labels: dict[str, str] = {}
    """Value in the data -> label name of the run file, where they differ."""
    split: SplitConfig = SplitConfig()
    """How to split a source that is one file."""


class Iid(ConfigModel):
    """Rows dealt out at random, stratified by nothing."""

    by: Literal["iid"]
    """The kind of partition."""
    sites: int | tuple[Name, ...]
    """Number of sites, or their names."""
    seed: int = 0
    """Seed of the partition."""


class Dirichlet(ConfigModel):
    """Unequal label mixes: each label's rows are shared out by a Dirichlet(alpha) draw."""

    by: Literal["dirichlet"]
    """The kind of partition."""
    sites: int | tuple[Name, ...]
    """Number of sites, or their names."""
    alpha: float = Field(gt=0)
    """Concentration; small means very unequal mixes."""
    min_rows: int = Field(10, ge=1)
    """Draw again until every site has this many training rows."""
    seed: int = 0
    """Seed of the partition."""


class Column(ConfigModel):
    """Rows by the value of a column: real origins such as hospitals."""

    by: Literal["column"]
    """The kind of partition."""
    column: str
    """The column that names the site."""


class Sizes(ConfigModel):
    """Unequal sizes with the same mix: site k gets a share in proportion to `shares[k]`."""

    by: Literal["sizes"]
    """The kind of partition."""
    sites: tuple[Name, ...] | None = None
    """Names of the sites; site-1, site-2, ... when left out."""
    shares: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    """Relative sizes."""
    seed: int = 0
    """Seed of the partition."""


Partition = Annotated[Iid | Dirichlet | Column | Sizes, Field(discriminator="by")]


class PartitionedData(SourceConfig):
    """One data set shared out over simulated sites; train, validation and test alike."""

    partition: Partition
    """How rows are shared out."""


class NamedSource(SourceConfig):
    """The data of one simulated site."""

    name: Name
    """The site's name."""


class SiteList(ConfigModel):
    """A list of sites, each with its own folder."""

    sites: tuple[NamedSource, ...] = Field(min_length=1)
    """The sites."""

    @model_validator(mode="after")
    def _unique(self) -> SiteList:
        names = [site.name for site in self.sites]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"site name {twice[0]!r} is given twice; every site needs a name of its own")
        return self


class SitesConfig(ConfigModel):
    """A sites file: for each data alias, where the sites' rows come from."""

    data: dict[Name, PartitionedData | SiteList]
    """Data alias of the run file -> one partitioned data set, or a list of sites."""
