"""From a matplotlib figure to SVG that lives in the page: its colours and fonts are the page's.

Charts are drawn in sentinel colours, which become CSS variables here, so that one chart serves light and dark
mode and print. A unit of a chart is a CSS pixel at full width.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sentinel -> CSS variable. Nothing else may be drawn in these colours, and nothing in others.
INK, MUTED, GRID, SURFACE = "#010101", "#010102", "#010103", "#010104"
FEDERATED, LOCAL, CENTRALISED, BAD = "#010201", "#010202", "#010203", "#010204"
SERIES = tuple(f"#01030{i}" for i in range(8))
OTHER = "#010309"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    SURFACE: "--surface",
    FEDERATED: "--federated",
    LOCAL: "--local",
    CENTRALISED: "--centralised",
    BAD: "--bad",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)},
    OTHER: "--other",
}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
FONT = 13.0
"""Size of text [px]."""
_PADDING = 3.0
"""Around what is drawn [px]."""


def variable(colour: str) -> str:
    """Return the CSS variable that stands for a sentinel."""
    return _VARIABLES[colour]


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of that many pixels, drawn by our settings whatever the user's matplotlibrc."""
    import matplotlib as mpl
    import matplotlib.style
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "font.size": FONT,
        "axes.titlesize": FONT,
        "axes.labelsize": FONT,
        "xtick.labelsize": FONT,
        "ytick.labelsize": FONT,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "axes.facecolor": "none",
        "grid.color": GRID,
        "text.parse_math": False,  # a site may be called $x$
    }
    with matplotlib.style.context("default"), mpl.rc_context(settings):
        yield Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")


def plain_axes(axes: Axes, *, grid: str) -> None:
    """Leave an axes with light grid lines along `grid` ("x" or "y") and nothing else around it."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis=grid, linewidth=1)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def to_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Return the figure as an `svg` element for the page.

    Args:
        name: unique in the page; makes the ids inside unique and the same each time.
        title, description: what a screen reader says.
    """
    import matplotlib as mpl

    for axes in figure.axes:
        _fit(axes, figure)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _tidy(root)
    for element in root.iter():
        _localise(element, name)
    # Fill the page's width and keep the proportions: the size is the style sheet's to say.
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(position, element)
    # Serialised by ElementTree, which escapes every text and attribute.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _fit(axes: Axes, figure: Figure) -> None:
    """Give the only axes of a figure the room that its labels leave.

    matplotlib's own layouts measure every text twice as often and draw the figure twice.
    """
    width, height = figure.bbox.size
    axes.set_position((0, 0, 1, 1))
    box = axes.get_tightbbox(for_layout_only=True)
    assert box is not None
    left, bottom = _PADDING - min(box.x0, 0), _PADDING - min(box.y0, 0)
    right, top = _PADDING + max(box.x1 - width, 0), _PADDING + max(box.y1 - height, 0)
    axes.set_position(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )


def _tidy(parent: ElementTree.Element) -> None:
    """Drop what the page does not need: metadata, a style sheet for the whole page, empty groups, blanks."""
    parent.tail = None
    for child in list(parent):
        _tidy(child)
        if child.tag in (f"{_SVG}metadata", f"{_SVG}style") or (child.tag == f"{_SVG}g" and not len(child)):
            parent.remove(child)
    if parent.tag != f"{_SVG}text":
        parent.text = None


def _localise(element: ElementTree.Element, name: str) -> None:
    """Strip namespaces (HTML knows svg), prefix ids, and turn sentinels into variables."""
    element.tag = element.tag.removeprefix(_SVG)
    attributes = dict(element.attrib)
    element.attrib.clear()
    for key, value in attributes.items():
        if key == "id" and element.tag == "g":
            continue  # nothing refers to it
        if key == "id":
            value = f"{name}-{value}"
        elif key == f"{_XLINK}href":
            key, value = "href", value.replace("#", f"#{name}-", 1)
        elif key == "style":
            value = re.sub(r"#[0-9a-f]{6}\b", lambda found: f"var({variable(found[0])})", value)
            value = _without_family(value)
        elif key == "clip-path":
            value = value.replace("url(#", f"url(#{name}-")
        element.set(key, value)


def _without_family(style: str) -> str:
    """Leave the font's family to the page; matplotlib before 3.11 writes it in the `font` shorthand."""
    style = re.sub(r"font-family: [^;]*;? ?", "", style)
    return re.sub(
        r"font: (?:(\d+|bold) )?([\d.]+px)[^;]*",
        lambda found: (f"font-weight: {found[1]}; " if found[1] else "") + f"font-size: {found[2]}",
        style,
    )
