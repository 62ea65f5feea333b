"""The bundle that Flower carries: names of installed code, one declared key, and nothing else."""

import io
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import get_fab_config
from refusals import refuses

import quorate.shared.protocol.bundle as module
from quorate.shared.errors import ConfigError
from quorate.shared.protocol.bundle import RUN_KEY, bundle_dir


def test_flower_builds_it_and_it_holds_no_code() -> None:
    built = build_fab_from_disk(bundle_dir())
    assert zipfile.ZipFile(io.BytesIO(built)).namelist() == ["pyproject.toml", ".info/CONTENT"]
    app = get_fab_config(built)["tool"]["flwr"]["app"]
    assert app["components"] == {
        "serverapp": "quorate.server.federation.flower_app:app",
        "clientapp": "quorate.client.process.flower_app:app",
    }
    assert app["config"] == {RUN_KEY: ""}


def test_a_file_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flower-app").mkdir()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "bundle.py"))
    with refuses(ConfigError, where=str(tmp_path / "flower-app")) as caught:
        bundle_dir()
    assert "pyproject.toml" in str(caught.value)
    (tmp_path / "flower-app" / "pyproject.toml").touch()
    assert bundle_dir() == tmp_path / "flower-app"
    (tmp_path / "flower-app" / "client.py").touch()
    with refuses(ConfigError, where=str(tmp_path / "flower-app")) as caught:
        bundle_dir()
    assert "(client.py)" in str(caught.value)
