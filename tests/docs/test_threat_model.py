"""Each thing that docs/deployment.md says nobody can do has the name of a test, and that test is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deployment.md").read_text()
MODEL = PAGE.partition("## Threat model\n")[2].partition("\n## ")[0]
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
}


def claims() -> list[str]:
    """The list items below each `Cannot:`, and the paragraphs that say `cannot` outside of lists."""
    found = []
    below = False
    for block in re.split(r"\n(?=- |\n)", MODEL):
        text = " ".join(block.split())
        if text.startswith("- "):
            if below:
                found.append(text)
            continue
        below = text == "Cannot:" or (below and not text)
        if not below and re.search(r"\b[Cc]annot\b", text) and not text.startswith(('"Cannot"', "What each")):
            found.append(text)
    return found


def test_the_model_says_what_nobody_can_do() -> None:
    assert len(claims()) >= 12, claims()


@pytest.mark.parametrize("claim", claims(), ids=lambda claim: claim[2:50])
def test_a_claim_has_tests_that_are_there(claim: str) -> None:
    named = re.findall(r"`(test_\w+)`", claim)
    assert named, f"no test is named for: {claim}"
    assert not [name for name in named if name not in TESTS], claim
