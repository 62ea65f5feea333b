"""What the page is made of: sections of paragraphs, charts and tables, as plain values for the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup

Tone = Literal["", "good", "bad", "muted", "strong"]


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Args:
        text: plain text; the template escapes it.
        tone: `note` is set apart as something to know, `muted` explains.
    """

    text: str
    tone: Literal["", "note", "muted"] = ""
    kind: str = "text"


@dataclass(frozen=True)
class Cell:
    """A table cell.

    Args:
        text: what stands in it.
        tone: how it is coloured.
        small: said in small print after the text, such as an interval.
        shade: 0 to 1, how strongly the cell's background is tinted; None for not at all.
    """

    text: str
    tone: Tone = ""
    small: str = ""
    shade: float | None = None


@dataclass(frozen=True)
class Table:
    """A table whose first column heads the rows.

    Args:
        caption: what the table shows, also its title where it is folded.
        rows: cells, or plain text.
        folded: shown on a click (and in print).
        words: indices of columns that hold words, aligned to the left; all others hold numbers.
        spanner: a heading over all columns but the first.
        hint: how to read it, in small print under the caption.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    folded: bool = False
    words: Sequence[int] = ()
    spanner: str = ""
    hint: str = ""
    kind: str = "table"

    def cells(self) -> list[list[Cell]]:
        return [[each if isinstance(each, Cell) else Cell(each) for each in row] for row in self.rows]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Args:
        svg: ready to be put into the page.
        legend: (CSS colour variable, what it stands for).
        wide: whether it needs the whole width; narrow ones stand two in a row.
        title: what it shows, above it.
    """

    svg: Markup
    legend: Sequence[tuple[str, str]] = ()
    wide: bool = True
    title: str = ""
    kind: str = "chart"


@dataclass(frozen=True)
class Code:
    """Preformatted text under a title, folded where it is long."""

    title: str
    code: str
    folded: bool = False
    kind: str = "code"


Block = Text | Table | Chart | Code


@dataclass
class Section:
    """A section under a heading."""

    id: str
    title: str
    blocks: list[Block] = field(default_factory=list)

    def say(self, text: str, tone: Literal["", "note", "muted"] = "") -> None:
        self.blocks.append(Text(text, tone))


@dataclass(frozen=True)
class Tile:
    """A figure at the head of the page."""

    value: str
    label: str
    detail: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Headline:
    """The result in words."""

    text: str
    more: Sequence[str]
    tiles: Sequence[Tile]
    warnings: Sequence[str] = ()
