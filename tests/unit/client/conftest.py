"""A whole site on disk, for tests that ask it as a coordinator would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from site_folder import sha256_of, write_folder
from whole_site import WholeSite


@pytest.fixture
def make_site(tmp_path: Path, tiny_bert: Path) -> Iterator[Callable[..., WholeSite]]:
    """Make the site with this policy; it is stopped after the test."""
    made: list[WholeSite] = []

    def make(**policy: Any) -> WholeSite:
        made.append(WholeSite(write_folder(tmp_path / "kit", tiny_bert, **policy)))
        return made[0]

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def pinned(tiny_bert: Path, make_run: Any) -> Any:
    """Build a run that names its model by the content hash alone."""

    def make(**sections: Any) -> Any:
        model = {"model_name_or_path": "/nowhere", "sha256": sha256_of(tiny_bert)}
        return make_run(model=model, **sections)

    return make
