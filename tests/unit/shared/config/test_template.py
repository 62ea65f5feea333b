"""Texts from columns: what the language does, and that it can do nothing else."""

import pytest
from pydantic import ValidationError
from refusals import refuses

from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.config.template import TextTemplate
from quorate.shared.errors import DataError

SECRET = "Mrs Miller of 4 Mill Lane"


def render(template: str, **values: object) -> str:
    return TextTemplate.parse(template).render(values, "rows.csv:7")


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        ("age {age:.0f}", {"age": 62.7}, "age 63"),
        ("age {age:.0f}", {"age": "62.7"}, "age 63"),
        ("{n:d} of {m:,}", {"n": 3.0, "m": 12000}, "3 of 12,000"),
        ("{p:.1%} {x:.3g} {y:+05.1f}", {"p": 0.5, "x": 1234.5, "y": 2.25}, "50.0% 1.23e+03 +02.2"),
        ("{sex}, {flag}, {n}", {"sex": "f", "flag": True, "n": 4}, "f, True, 4"),
        ("{{kept}} {a}", {"a": "x"}, "{kept} x"),
        ("a [single] bracket {a}", {"a": 1}, "a [single] bracket 1"),
        ("{a}[[, b {b}]][[, c {c:.1f}]].", {"a": 1, "b": None, "c": float("nan")}, "1."),
        ("{a}[[, b {b}]][[, c {c:.1f}]].", {"a": 1, "b": " ", "c": 2}, "1, c 2.0."),
        ("{a}[[, b {b} c {c}]]", {"a": 1, "b": 2}, "1"),
        ("{a}[[ {b}]]", {"a": 0, "b": 0}, "0 0"),
    ],
)
def test_renders(template: str, values: dict[str, object], text: str) -> None:
    assert render(template, **values) == text


def test_columns_may_hold_spaces_and_dots() -> None:
    template = TextTemplate.parse("{mean radius:.1f} {a.b} {mean radius}")
    assert template.columns == ("mean radius", "a.b")
    assert template.render({"mean radius": 1.25, "a.b": "x"}, "f:1") == "1.2 x 1.25"


@pytest.mark.parametrize("field", ["a.__class__", "a[0]", "a.__init__.__globals__"])
def test_a_field_is_a_columns_name_and_nothing_more(field: str) -> None:
    template = TextTemplate.parse(f"{{{field}}}")
    assert template.columns == (field,)
    with refuses(DataError, "template-value-missing", where="f:1") as caught:
        template.render({"a": SECRET}, "f:1")
    assert repr(field) in str(caught.value)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{a!r}", "conversion !r of column 'a'"),
        ("{a:{b}}", "format '{b}' of column 'a'"),
        ("{a:>20}", "format '>20' of column 'a'"),
        ("{a:99999999d}", "format '99999999d' of column 'a'"),
        ("{a:.999f}", "format '.999f' of column 'a'"),
        ("{}", "{} names no column"),
        ("{a", "'}'"),
        ("a}", "'}'"),
        ("[[{a}", "brackets"),
        ("{a}]]", "brackets"),
        ("[[ {a} [[ {b} ]] ]]", "brackets"),
        ("{a} [[always]]", "[[always]]"),
        ("no column", "no {column}"),
    ],
)
def test_bad_templates_are_refused_with_the_sites_file(template: str, named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SourceConfig(source="rows.csv", template=template)
    said = caught.value.errors()[0]["msg"]
    assert "template: " in said and named in said


@pytest.mark.parametrize("value", [None, float("nan"), "", "  "])
def test_a_missing_value_is_named(value: object) -> None:
    with refuses(DataError, "template-value-missing", where="rows.csv:7") as caught:
        render("{a} {b}", a=1, b=value)
    assert "column 'b'" in str(caught.value) and "[[ ]]" in str(caught.value)


@pytest.mark.parametrize(
    ("form", "value"), [(":.1f", SECRET), (":d", 1.5), (":.1f", [SECRET]), (":d", "inf")]
)
def test_a_value_that_is_no_number_is_not_quoted(form: str, value: object) -> None:
    with refuses(DataError, "template-format", where="rows.csv:7") as caught:
        render(f"{{b{form}}}", b=value)
    assert "column 'b'" in str(caught.value) and SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


def test_lists_are_no_text() -> None:
    with refuses(DataError, "template-value-is-no-text") as caught:
        render("{b}", b=[SECRET])
    assert "column 'b'" in str(caught.value) and SECRET not in str(caught.value)
