"""Sources of rows, and the sites file of a simulation: what each alias means at each simulated site.

In production every site has a file of its own that the coordinator never sees; a simulation describes all of
its sites in one, either as one data set that is partitioned or as a list of site folders.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from quorate.shared.config.config_model import LIST, ONE, ONE_OR_LIST, ConfigModel, Name
from quorate.shared.config.template import TextTemplate


def _unique_names(names: int | tuple[str, ...] | None) -> int | tuple[str, ...] | None:
    if isinstance(names, tuple) and (twice := sorted({name for name in names if names.count(name) > 1})):
        raise ValueError(f"site name {twice[0]!r} is given twice; every site needs a name of its own")
    return names


SiteNames = Annotated[tuple[Name, ...], Field(min_length=1), AfterValidator(_unique_names)]
NumberOrNames = Annotated[
    Annotated[int, Field(ge=1, le=100_000), ONE] | Annotated[SiteNames, LIST], ONE_OR_LIST
]


class SplitConfig(ConfigModel):
    """Shares of the training rows that become splits for which the source has no file of its own."""

    validation: float = Field(0.15, ge=0, lt=1)
    """Share of rows for validation, to within chance: each row (or group) is placed by itself."""
    test: float = Field(0.2, ge=0, lt=1)
    """Share of rows for the test, likewise."""
    seed: int = 0
    """What the splits of simulated sites follow from. A site's own rows are placed by a secret that it keeps,
    whatever the seed."""

    @model_validator(mode="after")
    def _leaves_train(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must leave rows to train on (sum below 1)")
        return self


class SourceConfig(ConfigModel):
    """Where rows come from and how their columns and labels become the task's."""

    source: str = Field(min_length=1)
    """A folder with train, validation and test files; one file (.jsonl, .csv, .tsv, .parquet); a hub id as
    `hub:ID`; `package:NAME/PATH`; or `sklearn:NAME` for a data set inside scikit-learn. `${VARIABLE}` is
    replaced from the environment; a relative path starts at the sites file's folder."""
    revision: str | None = None
    """Commit of a hub data set."""
    columns: dict[str, str] = {}
    """Task column -> column in the data, where they differ. `group: COLUMN` says whose row it is, such as a
    patient's: what `privacy.unit: group` protects; rows of a group are not split over several splits."""
    template: str | None = None
    """Builds the `text` column from other columns: `age {age:.0f}, pressure {trestbps:.0f}`. A part in double
    square brackets is left out when a column in it is missing."""
    labels: dict[str, str] = {}
    """Value in the data -> label name of the run file, where they differ."""
    split: SplitConfig = SplitConfig()
    """How to make the splits the source has no files for."""

    @field_validator("labels", mode="before")
    @classmethod
    def _numbers_are_values_too(cls, labels: Any) -> Any:
        """Take the numbers and truth values of YAML as keys, written as in the data."""
        if not isinstance(labels, dict):
            return labels
        texts = {
            str(value).lower() if isinstance(value, bool) else str(value): labels[value] for value in labels
        }
        if len(texts) < len(labels):
            raise ValueError("two keys stand for the same value; keep one")
        return texts

    @model_validator(mode="after")
    def _template_and_revision_fit(self) -> SourceConfig:
        if self.template is not None:
            if "text" in self.columns:
                raise ValueError("template and columns.text both say where the text comes from; keep one")
            try:
                TextTemplate.parse(self.template)
            except ValueError as error:
                raise ValueError(f"template: {error}") from error
        if self.revision is not None and not self.source.startswith("hub:"):
            raise ValueError("revision belongs to a hub data set (source: hub:ID); leave it out")
        return self


class Iid(ConfigModel):
    """Rows dealt out at random, stratified by nothing."""

    by: Literal["iid"]
    """The kind of partition."""
    sites: NumberOrNames
    """Number of sites, or their names."""
    seed: int = 0
    """Seed of the partition."""


class Dirichlet(ConfigModel):
    """Unequal label mixes: each label's rows are shared out by a Dirichlet(alpha) draw (arXiv:1909.06335)."""

    by: Literal["dirichlet"]
    """The kind of partition."""
    sites: NumberOrNames
    """Number of sites, or their names."""
    alpha: float = Field(gt=0)
    """Concentration; small means very unequal mixes."""
    min_rows: int = Field(10, ge=1)
    """Draw again until every site has this many training rows."""
    seed: int = 0
    """Seed of the partition."""


class Column(ConfigModel):
    """Rows by the value of a column: real origins such as hospitals. Sites are in alphabetical order."""

    by: Literal["column"]
    """The kind of partition."""
    column: str = Field(min_length=1)
    """The column of the data that names the site; characters other than letters, digits, `_`, `.` and `-`
    become `-` in the site's name."""


class Sizes(ConfigModel):
    """Unequal sizes with about the same mix: site k gets rows at random in proportion to `shares[k]`."""

    by: Literal["sizes"]
    """The kind of partition."""
    sites: SiteNames | None = None
    """Names of the sites; site-1, site-2, ... when left out."""
    shares: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    """Relative sizes."""
    seed: int = 0
    """Seed of the partition."""

    @model_validator(mode="after")
    def _one_share_per_site(self) -> Sizes:
        if self.sites is not None and len(self.sites) != len(self.shares):
            raise ValueError(f"{len(self.shares)} shares for {len(self.sites)} sites; give one for each")
        return self


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

    sites: tuple[NamedSource, ...]
    """The sites."""

    @model_validator(mode="after")
    def _unique(self) -> SiteList:
        if not self.sites:
            raise ValueError("the list of sites is empty; name at least one site")
        _unique_names(tuple(site.name for site in self.sites))
        return self


def _kind_of_data(data: Any) -> str:
    """Tell the two forms apart by the one field that only the second has, so that errors name one form."""
    listed = "sites" in data if isinstance(data, dict) else isinstance(data, SiteList)
    return "SiteList" if listed else "PartitionedData"


SiteData = Annotated[
    Annotated[PartitionedData, Tag("PartitionedData")] | Annotated[SiteList, Tag("SiteList")],
    Discriminator(_kind_of_data),
]


class SitesConfig(ConfigModel):
    """A sites file: for each data alias, where the sites' rows come from."""

    data: dict[Name, SiteData] = Field(min_length=1)
    """Data alias of the run file -> one partitioned data set, or a list of sites."""
    samples: int = Field(0, ge=0, le=24)
    """How many test images of the first site the report shows with the boxes found in them. The images then
    lie in the output folder and in the report; a task without pictures refuses this."""
