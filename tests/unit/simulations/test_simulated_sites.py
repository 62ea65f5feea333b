"""The data of simulated sites, and the recipes that come with Quorate."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from refusals import refuses

from quorate.shared.config.load import load_run, load_sites_file
from quorate.shared.config.run_config import RunConfig
from quorate.shared.config.sites_config import SiteList, SitesConfig
from quorate.shared.config.template import TextTemplate
from quorate.shared.errors import ConfigError, DataError
from quorate.shared.tasks import TokenClassification
from quorate.simulations.simulated_sites import default_sites_path, find_recipe, load_sites, recipes

SECRET = "Mrs Miller of 4 Mill Lane"
RECIPES = recipes()
REAL = {
    "medquad": "medquad_qtype",
    "heart": "heart_hospitals",
    "sentiment": "sentiment_3sites",
    "banking77": "banking77",
}
# Recipes on data or columns that no model hub has in this form.
LOCAL = {"heart_columns": "heart_hospitals", "medical_abstracts": "medical_abstracts"}


@pytest.fixture
def run() -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "data": "ward",
            "task": {"name": "sequence_classification", "labels": ["ill", "well"]},
            "model": {"model_name_or_path": "unused"},
            "federation": {"rounds": 1},
        }
    )


def sites(**data: Any) -> SitesConfig:
    return SitesConfig.model_validate({"data": data})


def write(path: Path, count: int, **row: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"text": f"{SECRET} {i}", "label": i % 2} | row) + "\n" for i in range(count))
    )
    return path


def test_a_partitioned_data_set(tmp_path: Path, run: RunConfig) -> None:
    write(tmp_path / "rows.jsonl", 100, ward="north")
    config = sites(ward={"source": "rows.jsonl", "partition": {"by": "iid", "sites": ["a", "b"]}})
    loaded = load_sites(config, tmp_path, run)
    counts = {
        name: [len(of[split]) for split in ("train", "validation", "test")] for name, of in loaded.items()
    }
    assert list(counts) == ["a", "b"] and sum(map(sum, counts.values())) == 100
    assert all(0 <= a - b <= 1 for a, b in zip(*counts.values(), strict=True)), (
        "each split is shared out alike"
    )
    # Nothing but the task's columns reaches the task.
    assert all(
        set(row.values) == {"text", "label"} for of in loaded.values() for rows in of.values() for row in rows
    )


def test_a_list_of_sites_with_mappings_of_their_own(tmp_path: Path, run: RunConfig) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / "north" / f"{split}.jsonl", 10)
    (tmp_path / "south.csv").write_text("note,state\n" + "fever,sick\n" * 5)
    config = sites(
        ward={
            "sites": [
                {"name": "north", "source": "north"},
                {
                    "name": "south",
                    "source": "south.csv",
                    "columns": {"text": "note", "label": "state"},
                    "labels": {"sick": "ill"},
                    "split": {"validation": 0, "test": 0.2},
                },
            ]
        }
    )
    loaded = load_sites(config, tmp_path, run)
    assert list(loaded) == ["north", "south"]
    assert not loaded["south"]["validation"]
    # Rows that are the same lie on one side: each is placed by what it says.
    assert {len(loaded["south"]["train"]), len(loaded["south"]["test"])} == {0, 5}
    # A site that lacks a class is normal.
    assert {row.values["label"] for row in loaded["south"]["train"]} == {0}


def test_an_unknown_alias_lists_those_there_are(tmp_path: Path, run: RunConfig) -> None:
    other = {"source": "x", "partition": {"by": "iid", "sites": 2}}
    with refuses(ConfigError, "unknown-data") as caught:
        load_sites(sites(xray=other, lab=other), tmp_path, run)
    assert "'ward'" in str(caught.value) and "lab, xray" in str(caught.value)


def test_errors_name_the_site_and_keep_their_kind(tmp_path: Path, run: RunConfig) -> None:
    write(tmp_path / "north.jsonl", 4)
    (tmp_path / "south.jsonl").write_text(json.dumps({"text": SECRET, "label": "sick"}) + "\n")
    listed = [{"name": name, "source": f"{name}.jsonl"} for name in ("north", "south")]
    with refuses(DataError, where="data.ward, site south") as caught:
        load_sites(sites(ward={"sites": listed}), tmp_path, run)
    assert all(said in str(caught.value) for said in ("south.jsonl:1: ", "'sick'", "ill, well"))
    assert SECRET not in str(caught.value)
    listed[1]["labels"] = {"sick": "dead"}  # type: ignore[assignment]
    with refuses(ConfigError, where="data.ward, site south") as caught:
        load_sites(sites(ward={"sites": listed}), tmp_path, run)
    assert all(said in str(caught.value) for said in (": labels: ", "'sick'", "'dead'"))
    (tmp_path / "south.jsonl").write_text("")
    with refuses(DataError, "no-rows", where="data.ward, site south") as caught:
        load_sites(
            sites(ward={"sites": [*listed[:1], {"name": "south", "source": "south.jsonl"}]}), tmp_path, run
        )
    assert "south.jsonl" in str(caught.value)
    one = {"source": "north.jsonl", "partition": {"by": "iid", "sites": 9}}
    with refuses(DataError, "site-without-rows", where="data.ward"):
        load_sites(sites(ward=one), tmp_path, run)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sites": []}, "the list of sites is empty"),
        (
            {"sites": [{"name": "n", "source": "a"}, {"name": "n", "source": "b"}]},
            "site name 'n' is given twice",
        ),
        ({"source": "a"}, "data.ward.partition: is missing"),
        (
            {"source": "a", "partition": {"by": "iid", "sites": 2}, "colums": {}},
            "data.ward.colums: there is no such",
        ),
    ],
)
def test_sites_files_that_cannot_be(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    (tmp_path / "x.sites.yaml").write_text(json.dumps({"data": {"ward": data}}))
    with pytest.raises(ConfigError) as caught:
        load_sites_file(tmp_path / "x.sites.yaml")
    assert message in str(caught.value)


def test_the_sites_file_lies_beside_the_run_file() -> None:
    assert default_sites_path(Path("a/medquad.yaml")) == Path("a/medquad.sites.yaml")


def test_recipes_are_found_by_name() -> None:
    assert {"demo", *REAL, *LOCAL, "ner_disease", *(f"hub/{name}" for name in REAL)} <= set(RECIPES)
    assert find_recipe("demo").name == "demo.yaml"
    for name in ("absent", "demo.sites", "../demo", ""):
        with refuses(ConfigError, "no-such-recipe") as caught:
            find_recipe(name)
        assert f"'{name}'" in str(caught.value) and "banking77, " in str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid(name: str) -> None:
    run = load_run(RECIPES[name])
    config = load_sites_file(default_sites_path(RECIPES[name]))
    assert run.data in config.data
    assert run.name == name.removeprefix("hub/") + ("-hub" if name.startswith("hub/") else "")
    assert name.startswith("hub/") == ("Needs a hub" in RECIPES[name].read_text())


def test_the_demos_hospitals_differ() -> None:
    pytest.importorskip("sklearn")
    path = find_recipe("demo")
    loaded = load_sites(load_sites_file(default_sites_path(path)), path.parent, load_run(path))
    assert list(loaded) == ["north", "south", "east", "west"]
    totals = Counter(split for of in loaded.values() for split, rows in of.items() for _ in rows)
    assert totals == {"train": 327, "validation": 97, "test": 145}
    mixes = [Counter(row.values["label"] for row in of["train"]) for of in loaded.values()]
    assert max(mix[1] / mix.total() for mix in mixes) > 0.9
    assert min(mix[1] / mix.total() for mix in mixes) < 0.4
    assert loaded["north"]["train"][0].values["text"].startswith("radius ")


@pytest.mark.skipif("QUORATE_DATA" not in os.environ, reason="QUORATE_DATA is not set")
@pytest.mark.parametrize("name", [*REAL, *LOCAL])
def test_recipes_on_real_data_have_the_published_counts(name: str) -> None:
    info = json.loads((Path(os.environ["QUORATE_DATA"]) / (REAL | LOCAL)[name] / "info.json").read_text())
    run = load_run(RECIPES[name])
    assert list(run.task.labels) == info["label_names"]
    loaded = load_sites(load_sites_file(default_sites_path(RECIPES[name])), RECIPES[name].parent, run)
    for split, count in info["splits"].items():
        rows = [row for of in loaded.values() for row in of[split]]
        assert len(rows) == count
        labels = Counter(run.task.labels[row.values["label"]] for row in rows)
        assert labels == info["class_balance"][split]
        if "site_rows" in info:
            assert {site: len(of[split]) for site, of in loaded.items()} == info["site_rows"][split]


@pytest.mark.skipif("QUORATE_DATA" not in os.environ, reason="QUORATE_DATA is not set")
def test_the_columns_of_hearts_are_written_where_they_were_measured() -> None:
    path = find_recipe("heart_columns")
    config = load_sites_file(default_sites_path(path))
    source = config.data["heart"]
    assert not isinstance(source, SiteList) and source.template is not None
    columns = TextTemplate.parse(source.template).columns
    assert len(columns) == 13 and not {"num", "label", "text", "site"} & set(columns), "that would be to peek"
    rows = [
        json.loads(line)
        for split in ("train", "validation", "test")
        for line in (Path(os.environ["QUORATE_DATA"]) / f"heart_hospitals/{split}.jsonl")
        .read_text()
        .splitlines()
    ]
    texts = [
        row.values["text"]
        for of in load_sites(config, path.parent, load_run(path)).values()
        for split in of.values()
        for row in split
    ]
    assert len(texts) == len(rows) and not any(
        word in text for text in texts for word in ("None", "nan", ", ,")
    )
    for column, words in (("chol", "cholesterol"), ("ca", "vessels"), ("thal", "thallium")):
        measured = sum(row[column] is not None for row in rows)
        assert 0 < measured < len(rows)
        assert sum(words in text for text in texts) == measured
    # Every figure of a row stands in its text, rounded as the template says, and nothing else does.
    shown = Counter(tuple(re.findall(r"-?[0-9.]+", text)) for text in texts)
    expected = Counter(
        tuple(f"{row[c]:.{int(c == 'oldpeak')}f}" for c in columns if row[c] is not None) for row in rows
    )
    assert shown == expected


@pytest.mark.skipif("QUORATE_DATA" not in os.environ, reason="QUORATE_DATA is not set")
def test_the_diseases_of_the_recipe_are_those_published() -> None:
    info = json.loads((Path(os.environ["QUORATE_DATA"]) / "ner_disease" / "info.json").read_text())
    path = find_recipe("ner_disease")
    run = load_run(path)
    assert isinstance(run.task, TokenClassification) and list(run.task.labels) == info["label_names"]
    loaded = load_sites(load_sites_file(default_sites_path(path)), path.parent, run)
    for split, count in info["splits"].items():
        assert {site: len(of[split]) for site, of in loaded.items()} == info["site_rows"][split]
        tags = [row.values["ner_tags"] for of in loaded.values() for row in of[split]]
        assert len(tags) == count
        assert sum(1 for each in tags for _ in run.task.entities(each)) == info["entities"][split]["Disease"]
