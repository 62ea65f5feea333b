"""What the model finds in a few images: true boxes dashed, found ones solid, in the colour of their label.

There are such images where a simulation wrote them into the output folder. No production run has them: there,
no image ever leaves its site.
"""

from __future__ import annotations

import base64

from markupsafe import Markup

from quorate.server.report.drawing.svg import OTHER, SERIES, variable
from quorate.server.report.figures import count
from quorate.server.report.page import Chart, Section
from quorate.server.report.run_files import RunFiles
from quorate.server.tracking.records import Sample, SampleObject

_LINE = Markup(
    '<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="none" '
    'stroke="{colour}" stroke-width="{stroke}" stroke-dasharray="{dashes}" '
    'vector-effect="non-scaling-stroke"><title>{title}</title></rect>'
)


def finds_section(files: RunFiles) -> Section:
    """Show the samples; a section without blocks where there are none."""
    section = Section("finds", "What it finds")
    if not files.samples:
        return section
    first = files.samples[0]
    section.say(
        f"The first test images of {first.site}, and what the model of the best round finds in them with "
        f"a score of at least {first.threshold:g}. Dashed: true boxes. Solid: found. One colour a label."
    )
    section.say(
        "A simulation alone shows images, as it holds every site's. In production no image leaves its site, "
        "and this section is not there.",
        "note",
    )
    labels = sorted({each.label for sample in files.samples for each in (*sample.true, *sample.found)})
    known = [label for label in getattr(files.config.task, "labels", ()) if label in labels] or labels
    colours = {label: variable(SERIES[i] if i < len(SERIES) else OTHER) for i, label in enumerate(known)}
    for number, sample in enumerate(files.samples, start=1):
        section.blocks.append(_picture(sample, files.images[sample.file], number, colours))
    return section


def _picture(sample: Sample, image: bytes, number: int, colours: dict[str, str]) -> Chart:
    words = f"Image {number}: {count(len(sample.true), 'true box', 'true boxes')}, {len(sample.found)} found"
    data = base64.b64encode(image).decode("ascii")
    parts = [
        Markup('<svg viewBox="0 0 {w} {h}" role="img" aria-label="{words}">').format(
            w=sample.width, h=sample.height, words=words
        ),
        Markup('<image href="data:image/png;base64,{data}" width="{w}" height="{h}"/>').format(
            data=data, w=sample.width, h=sample.height
        ),
        *(_box(each, colours, found=False) for each in sample.true),
        *(_box(each, colours, found=True) for each in sample.found),
        Markup("</svg>"),
    ]
    shown = {each.label for each in (*sample.true, *sample.found)}
    legend = [(colour, label) for label, colour in colours.items() if label in shown]
    return Chart(Markup("").join(parts), legend, wide=False, title=words)


def _box(each: SampleObject, colours: dict[str, str], *, found: bool) -> Markup:
    x, y, width, height = each.box
    return _LINE.format(
        x=x,
        y=y,
        width=width,
        height=height,
        colour=f"var({colours[each.label]})",
        stroke=2.5 if found else 1.5,
        dashes="none" if found else "5 3",
        title=f"found: {each.label}, score {each.score:.2f}"
        if each.score is not None
        else f"true: {each.label}",
    )
