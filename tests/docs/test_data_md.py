"""docs/data.md: its YAML is valid, and the error it shows is the one that is raised."""

import re
from pathlib import Path

import pytest

from quorate.client.data.splits import load_splits
from quorate.shared.config.dialect import parse
from quorate.shared.config.sites_config import SiteList, SitesConfig, SourceConfig
from quorate.shared.errors import DataError

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_yaml_blocks_are_valid(block: str) -> None:
    content = parse(block, "docs/data.md")
    if "data" in content:
        SitesConfig.model_validate(content)
    else:
        SourceConfig.model_validate({"source": "rows.csv"} | content)


def test_partitions_of_the_table_are_valid() -> None:
    partitions = re.findall(r"^\| `(\{by: .*?\})` \|", TEXT, re.MULTILINE)
    assert len(partitions) == 4
    for partition in partitions:
        source = {"source": "rows.csv", "partition": parse(partition, "docs/data.md")}
        SitesConfig.model_validate({"data": {"rows": source}})


def test_the_error_shown_is_the_one_raised(tmp_path: Path) -> None:
    block = next(block for block in BLOCKS if "budapest" in block)
    data = SitesConfig.model_validate(parse(block, "docs/data.md")).data["heart"]
    assert isinstance(data, SiteList)
    rows = ["szoveg,kimenet", *["köhög,beteg"] * 15, "köhög,beteg?"]
    (tmp_path / "budapest.csv").write_text("\n".join(rows), encoding="utf-8")
    source = data.sites[1].model_copy(update={"source": "budapest.csv"})
    with pytest.raises(DataError) as caught:
        load_splits(source, tmp_path, {"text": "text", "label": "label"}, ("no_disease", "heart_disease"))
    shown = " ".join(TEXT.split())
    assert str(caught.value).removeprefix(f"{tmp_path}/") in shown.replace(
        "/data/budapest.csv", "budapest.csv"
    )
