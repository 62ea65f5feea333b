"""What docs/deployment.md tells people to type is there: commands, options, files, links."""

import re
from pathlib import Path

import click
import pytest
import typer

from quorate.deploy.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deployment.md").read_text()
# In code blocks and between backticks; up to a comment, a quote's end, or what comes after.
LINES = sorted(
    {
        line.strip()
        for line in re.findall(r"(?:^    |`|&& |exec \w+ |:\d+ )(quorate [a-z][^`#\n;&]*)", PAGE, re.M)
    }
)


def test_the_page_names_commands() -> None:
    assert len(LINES) > 20, LINES


@pytest.mark.parametrize("line", LINES)
def test_commands_and_options_are_there(line: str) -> None:
    command: click.Command = typer.main.get_command(app)
    words = line.split()[1:]
    while isinstance(command, click.Group):
        name = words.pop(0).rstrip(",.:")
        assert name in command.commands, f"there is no `quorate ... {name}`"
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        if word.startswith("-"):
            assert word.rstrip(".,:)") in known, f"{line}: no option {word}"
    given = [word for word in words if not word.startswith(("-", "("))]
    if given and words == given:
        assert any(isinstance(parameter, click.Argument) for parameter in command.params), line


@pytest.mark.parametrize(
    "path",
    sorted(set(re.findall(r"deploy/[\w./-]*[\w/](?![\w*@.-])|constraints\.txt|shared/[\w./-]*\w", PAGE))),
)
def test_files_are_there(path: str) -> None:
    assert (ROOT / path).exists(), path


def test_links_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", PAGE, re.M)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGE):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (ROOT / "docs" / target.split("#")[0]).exists(), target
