"""`report.html`: a run's result in one self-contained page, made from its output folder alone."""

# The page asks nothing of the network, holds no script, follows light and dark mode, prints, and is the same
# byte for byte when made again from the same files.

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from quorate.server.report.page import Headline, Section
from quorate.server.report.run_files import RunFiles
from quorate.server.report.sections.answers import samples_section
from quorate.server.report.sections.audit_findings import audit_section
from quorate.server.report.sections.class_quality import quality_section
from quorate.server.report.sections.comparison import comparison_section
from quorate.server.report.sections.cost import cost_section
from quorate.server.report.sections.detections import finds_section
from quorate.server.report.sections.guarantee import privacy_section
from quorate.server.report.sections.headline import headline
from quorate.server.report.sections.learning import data_section, learning_section
from quorate.server.report.sections.participation import participation_section
from quorate.server.report.sections.reproduction import limits_section, origin_section
from quorate.shared.process.files import BY_UMASK, write_atomically

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["REPORT_FILE", "render_page", "write_report"]

REPORT_FILE = "report.html"
_SECTIONS = (
    comparison_section,
    learning_section,
    quality_section,
    finds_section,
    samples_section,
    data_section,
    participation_section,
    cost_section,
    privacy_section,
    audit_section,
    limits_section,
    origin_section,
)


def write_report(output_dir: Path) -> Path:
    """Write `report.html` into a run's output folder, from run.yaml, the JSONL records and summary.json.

    Returns: the page's path.

    Raises:
        OutputError: the folder holds no run, a file in it is damaged, or the page cannot be written.
        ConfigError: run.yaml does not validate.
    """
    page = render(RunFiles.read(output_dir))
    path = output_dir / REPORT_FILE
    write_atomically(path, page, BY_UMASK)
    return path


def render(files: RunFiles) -> str:
    """Return the page."""
    sections = [section for make in _SECTIONS if (section := make(files)).blocks]
    return render_page(files.config.name, headline(files), sections)


def render_page(
    name: str, headline: Headline, sections: Sequence[Section], kicker: str = "Federated run"
) -> str:
    """Return a page in the report's style; `kicker` says what kind of page it is."""
    return _template().render(name=name, headline=headline, sections=sections, kicker=kicker)


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("quorate.server", "templates"),
        autoescape=True,  # site names and labels come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
