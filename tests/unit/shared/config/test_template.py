"""Texts from columns: what the language does, and that it can do nothing else."""

import pytest
from pydantic import ValidationError

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
    with pytest.raises(DataError, match="has no value there"):
        template.render({"a": SECRET}, "f:1")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a!r}", "conversion !r"),
        ("{a:{b}}", "not a number format"),
        ("{a:>20}", "not a number format"),
        ("{a:99999999d}", "not a number format"),
        ("{a:.999f}", "not a number format"),
        ("{}", "names no column"),
        ("{a", "expected"),
        ("a}", "Single '}'"),
        ("[[{a}", "in pairs"),
        ("{a}]]", "in pairs"),
        ("[[ {a} [[ {b} ]] ]]", "in pairs"),
        ("{a} [[always]]", "could never be left out"),
        ("no column", "every text would be the same"),
    ],
)
def test_bad_templates_are_refused_with_the_sites_file(template: str, message: str) -> None:
    with pytest.raises(ValidationError, match="template") as caught:
        SourceConfig(source="rows.csv", template=template)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [None, float("nan"), "", "  "])
def test_a_missing_value_is_named(value: object) -> None:
    with pytest.raises(
        DataError, match=r"rows\.csv:7: the template needs column 'b', which has no value.*\[\[ \]\]"
    ):
        render("{a} {b}", a=1, b=value)


@pytest.mark.parametrize(
    ("form", "value"), [(":.1f", SECRET), (":d", 1.5), (":.1f", [SECRET]), (":d", "inf")]
)
def test_a_value_that_is_no_number_is_not_quoted(form: str, value: object) -> None:
    with pytest.raises(
        DataError, match=r"rows\.csv:7: the value of column 'b' does not fit format"
    ) as caught:
        render(f"{{b{form}}}", b=value)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


def test_lists_are_no_text() -> None:
    with pytest.raises(DataError, match="column 'b' holds a list") as caught:
        render("{b}", b=[SECRET])
    assert SECRET not in str(caught.value)
