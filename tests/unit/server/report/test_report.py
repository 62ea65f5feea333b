"""The report: whole, safe, true for runs that lack something, and the same each time."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from refusals import refuses
from report_data import LABELS, MIX, Shape, round_metrics, write_run
from report_data import config as run_config

from quorate.server.report import write_report
from quorate.server.report.drawing.curves import spread
from quorate.server.report.drawing.svg import FEDERATED, drawing, to_svg
from quorate.server.report.figures import DASH, MINUS, listed, show_bytes, show_gain, show_seconds, spans
from quorate.server.tracking.records import RoundMetrics
from quorate.shared.errors import ConfigError, OutputError

SECTIONS = ["worth", "learning", "quality", "data", "sites", "cost", "limits", "made"]
VOID = {"meta", "link", "img", "br", "hr", "input", "col", "wbr"}
FAST = Shape(rounds=4, planned=4)


class Page(HTMLParser):
    """A parsed page: sections, text per section, tags, and every attribute that could load or link."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.sections: dict[str, str] = {}
        self.charts: dict[str, int] = {}
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.unclosed: list[str] = []
        self.header = ""
        self._section = "header"
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = {key: value or "" for key, value in attrs}
        if "id" in values:
            self.ids.append(values["id"])
        self.references += [
            values[key] for key in ("href", "src", "srcset", "data", "action") if key in values
        ]
        self.references += re.findall(
            r"url\(([^)]*)\)", values.get("style", "") + values.get("clip-path", "")
        )
        if tag == "section":
            self._section = values["id"]
            self.sections[self._section] = ""
        if tag == "svg":
            self.charts[self._section] = self.charts.get(self._section, 0) + 1
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.unclosed.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed, f"</{tag}> closes nothing"
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._section == "header":
            self.header += data
        else:
            self.sections[self._section] += data


def report(folder: Path, shape: Shape = FAST, *, summary: bool = True) -> Page:
    return Page(write_report(write_run(folder, shape, summary=summary)).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    folder = tmp_path_factory.mktemp("whole")
    page = report(folder, Shape())
    return folder, page


def test_every_section_is_there_and_closed(whole: tuple[Path, Page]) -> None:
    _, page = whole
    assert list(page.sections) == SECTIONS
    assert page.unclosed == []
    assert len(page.ids) == len(set(page.ids))
    assert page.charts == {"worth": 1, "learning": 2, "data": 1, "sites": 1, "cost": 2}


def test_every_site_and_label_is_named_where_it_matters(whole: tuple[Path, Page]) -> None:
    _, page = whole
    for section in ("worth", "learning", "quality", "data", "sites"):
        assert [site for site in MIX if site not in page.sections[section]] == []
    for section in ("quality", "data"):
        assert [label for label in LABELS if label not in page.sections[section]] == []


def test_nothing_is_loaded_or_run(whole: tuple[Path, Page]) -> None:
    folder, page = whole
    text = (folder / "report.html").read_text()
    assert page.references and all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "form"}
    assert "default-src 'none'" in text


def test_the_same_files_give_the_same_page(whole: tuple[Path, Page]) -> None:
    folder, _ = whole
    before = (folder / "report.html").read_bytes()
    write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [
        "metrics.jsonl", "record.jsonl", "report.html", "run.yaml", "summary.json",
    ]  # fmt: skip


def test_the_headline_says_what_the_summary_says(whole: tuple[Path, Page]) -> None:
    folder, page = whole
    summary = json.loads((folder / "summary.json").read_text())
    test = summary["best"]["test"]
    assert f"{100 * test['pooled']['accuracy']:.1f}\u00a0%" in page.header
    assert f"{sum(test['rows'].values()):,}\u00a0test rows of all 5 sites" in page.header
    low, high = test["intervals"]["pooled"]["accuracy"]
    assert f"{100 * low:.1f}{DASH}{100 * high:.1f}" in page.header
    gains = {site: round(100 * each["gain"], 1) for site, each in summary["worth"].items()}
    better = sum(gain > 0 for gain in gains.values())
    assert 0 < better < 5, "the example should show both"
    assert f"better for {better} of 5 sites" in page.header
    assert all(site in page.header for site, gain in gains.items() if gain <= 0)
    total = sum(test["pooled"]["confusion"][i][i] for i in range(5)) / sum(test["rows"].values())
    assert math.isclose(total, test["pooled"]["accuracy"])


def test_who_was_set_aside_and_why(whole: tuple[Path, Page]) -> None:
    text = whole[1].sections["sites"]
    assert "did not reply in time" in text and f"5{DASH}6" in text
    assert "sent an update with NaN or infinity" in text and "non-finite" in text


def test_texts_from_outside_are_shown_not_run(tmp_path: Path) -> None:
    site, label = '<script>alert("x")</script>', "</style><img src=x onerror=alert(1)> $x^2$ & co"
    shape = replace(FAST, sites=(site, "b"), labels=(label, "two"), local={site: 0.7, "b": 0.7})
    page = report(tmp_path, shape)
    raw = (tmp_path / "report.html").read_text()
    assert "<script" not in raw and "<img" not in raw and raw.count("</style>") == 1
    assert site in page.sections["worth"] and label in page.sections["quality"]
    assert page.unclosed == [] and list(page.sections) == SECTIONS


def test_a_page_without_references_says_so(tmp_path: Path) -> None:
    page = report(tmp_path, replace(FAST, references=()))
    assert "without the local-only reference" in page.header
    assert "nothing beside them to be compared with" in page.sections["worth"]
    assert "Local only" not in page.sections["worth"] and "one machine" not in page.sections["limits"]


def test_it_is_said_why_some_sites_have_no_interval_and_others_have(tmp_path: Path) -> None:
    whole = report(tmp_path, FAST).sections["worth"]
    file = tmp_path / "summary.json"
    summary = json.loads(file.read_text())
    for measured in (summary["best"], summary["final"]):
        del measured["test"]["intervals"]["sites"]["heart"]["macro_f1"]
    file.write_text(json.dumps(summary))
    assert "No interval for heart: " in Page(write_report(tmp_path).read_text()).sections["worth"]
    assert "No interval" not in whole


def test_intervals_are_announced_only_where_a_figure_has_one(tmp_path: Path) -> None:
    assert "intervals" in report(tmp_path, FAST).sections["worth"]
    file = tmp_path / "summary.json"
    summary = json.loads(file.read_text())
    for measured in (
        summary["best"],
        summary["final"],
    ):  # as a language model's loss leaves it: names, no figures
        intervals = measured["test"]["intervals"]
        measured["test"]["intervals"] = {"pooled": {}, "sites": {site: {} for site in intervals["sites"]}}
    file.write_text(json.dumps(summary))
    assert "intervals" not in Page(write_report(tmp_path).read_text()).sections["worth"]


def test_a_worse_model_is_called_worse(tmp_path: Path) -> None:
    page = report(tmp_path, replace(FAST, federated=0.3))
    assert "not better for any of the 5 sites" in page.header and "not worth it" in page.header
    gains = json.loads((tmp_path / "summary.json").read_text())["worth"].values()
    bounds = [gain["interval"] for gain in gains if gain["interval"] is not None]
    assert len(bounds) >= 3 and all(high < 0 for _, high in bounds)
    # Sites with a handful of rows of a class have no interval of a mean over classes.
    assert f"worse for {len(bounds)} of 5" in page.header


def test_one_site_is_not_called_a_federation(tmp_path: Path) -> None:
    page = report(tmp_path, replace(FAST, sites=("heart",), references=()))
    assert "single site" in page.header and "the only site" in page.header
    assert "nothing to share" in page.sections["worth"]


def test_without_test_rows_validation_stands_in_and_is_called_so(tmp_path: Path) -> None:
    page = report(tmp_path, replace(FAST, splits=("validation",)))
    assert "validation rows of all 5 sites" in page.header and "flatter" in page.header
    assert "test rows" not in page.sections["worth"]


def test_without_any_rows_to_measure_there_is_no_figure_and_no_best(tmp_path: Path) -> None:
    page = report(tmp_path, replace(FAST, splits=(), references=()))
    assert "not measured" in page.header and "best" not in page.header
    assert "worth" not in page.charts and page.charts["learning"] == 1
    assert "not known" in page.sections["quality"]


def test_an_interrupted_run_has_its_validation_figures(tmp_path: Path) -> None:
    page = report(tmp_path, replace(FAST, planned=9, status="interrupted"))
    assert "interrupted after 4 of 9 rounds" in page.header
    assert "validation rows" in page.header and "reference runs could be" in page.header


def test_a_run_without_a_quorum_says_who_was_missing(tmp_path: Path) -> None:
    page = report(tmp_path, replace(FAST, rounds=0, status="quorum-not-met"))
    assert "neuro: did not reply in time" in page.header and "no federated model" in page.header
    assert list(page.sections) == SECTIONS and page.charts == {"data": 1}
    assert "every site that was asked counted" not in page.sections["sites"]


def test_a_run_that_was_killed_has_no_summary_and_still_a_page(tmp_path: Path) -> None:
    page = report(tmp_path, replace(FAST, planned=9), summary=False)
    assert "has not finished: 4 of 9 rounds" in page.header
    assert page.charts["learning"] == 2 and "none yet" in page.sections["data"]


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, FAST, summary=False)
    with (tmp_path / "record.jsonl").open("a") as stream:
        stream.write('{"round": 5, "coh')
    assert "4 of 4 rounds" in Page(write_report(tmp_path).read_text()).header


def test_one_round_many_labels_several_labels(tmp_path: Path) -> None:
    many = tuple(f"label {i}" for i in range(30))
    page = report(tmp_path / "a", replace(FAST, rounds=1, planned=1, labels=many))
    assert "30 classes are too many for a matrix" in page.sections["quality"]
    assert "23 other labels" in page.sections["data"]
    multi = report(tmp_path / "b", replace(FAST, multi_label=True))
    assert "gets all labels right on" in multi.header and "confusion" not in multi.sections["quality"]


def test_many_sites_are_cut_in_charts_and_whole_in_tables(tmp_path: Path) -> None:
    sites = tuple(f"site-{i:02d}" for i in range(30))
    shape = replace(FAST, rounds=1, planned=1, sites=sites, local=dict.fromkeys(sites, 0.7))
    page = report(tmp_path, shape)
    assert "the table has all 30" in page.sections["worth"]
    assert "one grey line per site" in page.sections["learning"]
    assert all(site in page.sections["worth"] for site in sites)


def test_figures_that_are_not_numbers_read_back_and_are_dashes(tmp_path: Path) -> None:
    write_run(tmp_path, FAST)
    metrics = round_metrics(run_config(FAST), FAST, 1)
    train = {**metrics.train, "heart": {"train_loss": math.nan}}
    validation = metrics.validation.model_copy(
        update={"mean": {"loss": math.nan}, "pooled": {**metrics.validation.pooled, "macro_f1": math.nan}}
    )
    line = metrics.model_copy(update={"train": train, "validation": validation}).model_dump_json()
    assert "NaN" not in line
    back = RoundMetrics.model_validate_json(line)
    assert math.isnan(back.train["heart"]["train_loss"]) and math.isnan(back.validation.mean["loss"])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([line, *lines[1:]]) + "\n")
    page = Page(write_report(tmp_path).read_text())
    assert not re.search(r"\bnan\b", page.sections["learning"], re.IGNORECASE)


def test_bad_folders_are_refused_with_the_file_named(tmp_path: Path) -> None:
    with refuses(OutputError, "no-run-file") as caught:
        write_report(tmp_path)
    assert "run.yaml" in str(caught.value)
    write_run(tmp_path, FAST)
    (tmp_path / "record.jsonl").write_text('{"round": "x"}\n')
    with refuses(OutputError, "not-as-written", where=f"{tmp_path}/record.jsonl") as caught:
        write_report(tmp_path)
    assert "line 1: round" in str(caught.value)
    (tmp_path / "record.jsonl").write_bytes(b"\xff\n")
    with refuses(OutputError, "unreadable", where=f"{tmp_path}/record.jsonl"):
        write_report(tmp_path)
    (tmp_path / "run.yaml").write_text("name: [\n")
    with pytest.raises(ConfigError):
        write_report(tmp_path)


def test_the_users_matplotlib_settings_do_not_matter(whole: tuple[Path, Page]) -> None:
    import matplotlib as mpl

    folder, _ = whole
    before = (folder / "report.html").read_bytes()
    with mpl.rc_context({"font.size": 31, "axes.facecolor": "#00ff00", "svg.fonttype": "path"}):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before


def test_a_chart_has_the_pages_colours_and_its_own_ids() -> None:
    def draw(name: str) -> str:
        with drawing(200, 100) as figure:
            axes = figure.subplots()
            axes.plot([1, 2], [1, 2], color=FEDERATED)
            axes.set_xticks([1, 2], ["<&>", "$x$"])
            return str(to_svg(figure, name, 'a "title"', "b"))

    one, two = draw("one"), draw("two")
    assert "var(--federated)" in one and not re.search(r"#[0-9a-f]{6}\b", one)
    assert "&lt;&amp;&gt;" in one and "$x$" in one and "font-family" not in one
    assert set(re.findall(r'id="([^"]*)"', one)).isdisjoint(re.findall(r'id="([^"]*)"', two))
    assert 'role="img"' in one and 'a "title"</title>' in one


def test_every_colour_of_a_chart_is_defined_in_light_and_dark(whole: tuple[Path, Page]) -> None:
    text = (whole[0] / "report.html").read_text()
    light, dark = text.split("prefers-color-scheme: dark", 1)
    dark = dark.split("* { box-sizing", 1)[0]
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text)) - {"--shade"}
    assert {"--federated", "--ink", "--series-0", "--bad"} <= used
    assert [name for name in used if f"{name}:" not in light] == []
    assert [name for name in used if f"{name}:" not in dark] == []


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0, 1.0], [0.0, 5.0, 9.9, 10.0], [3.0, 3.1, 3.2]])
def test_labels_are_spread_in_order_and_apart(values: list[float]) -> None:
    places = spread(values, 0.5, 10.0)
    assert len(places) == len(values)
    assert all(b - a >= 0.5 - 1e-9 for a, b in pairwise(places))
    assert all(place <= 10.0 for place in places)
    far_apart = [0.0, 2.0, 4.0]
    assert spread(far_apart, 0.5, 10.0) == far_apart


def test_numbers_in_words() -> None:
    assert [show_bytes(n) for n in (0, 999, 1000, 123_456, 999_499, 999_999, 2_500_000_000)] == [
        "0\u00a0B", "999\u00a0B", "1.0\u00a0kB", "123\u00a0kB", "999\u00a0kB", "1.0\u00a0MB", "2.5\u00a0GB",
    ]  # fmt: skip
    assert [show_seconds(s) for s in (0, 0.02, 1, 59.6, 130, 7260)] == [
        "0\u00a0ms", "20\u00a0ms", "1.0\u00a0s",
        "1\u00a0min 0\u00a0s", "2\u00a0min 10\u00a0s", "2\u00a0h 1\u00a0min",
    ]  # fmt: skip
    assert show_gain("accuracy", 0.0312) == "+3.1 points" and show_gain("accuracy", -0.0004) == "±0.0 points"
    assert show_gain("accuracy", -0.5, unit=False) == f"{MINUS}50.0"
    assert spans([6, 1, 5, 4]) == f"1, 4{DASH}6"
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c"
    assert listed(list("abcdefgh"), limit=3) == "a, b and 6 more"
