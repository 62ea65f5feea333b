"""What the model writes: answers to the prompts that the run file itself gives."""

from __future__ import annotations

from quorate.server.report.page import Cell, Section, Table
from quorate.server.report.run_files import RunFiles


def samples_section(files: RunFiles) -> Section:
    """Show each prompt with both models' answers; a section without blocks where the run gives none."""
    samples = files.summary.samples if files.summary else ()
    section = Section("samples", "What it writes")
    if not samples:
        return section
    section.say(
        "Answers to the run file's own prompts, always taking the likeliest token. They show how the model "
        "writes, not how good it is, and come from no site's rows."
    )
    rows = [[Cell(s.prompt), Cell(s.base or "(nothing)"), Cell(s.adapted or "(nothing)")] for s in samples]
    columns = ["Prompt", "Base model", "With the adapter of the best round"]
    section.blocks.append(Table("Answers before and after", columns, rows, words=(1, 2)))
    return section
