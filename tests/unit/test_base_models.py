"""Base models at a site: the site's folder whatever the run file says, and archives that hold surprises."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from site_folder import sha256_of

from quorate.client.base_models import at_site, find, import_archive
from quorate.client.config import SiteConfig
from quorate.shared.errors import ConfigError, ModelError
from quorate.shared.model import load_model


def site_with(path: str, sha256: str) -> SiteConfig:
    return SiteConfig.model_validate(
        {"data": {"notes": {"source": "x.csv"}}, "models": [{"path": path, "sha256": sha256}]}
    )


def pack(archive: Path, model: Path, *more: tarfile.TarInfo, folder: str = "bert/") -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        for file in sorted(model.iterdir()):
            tar.add(file, f"{folder}{file.name}")
        for info in more:
            tar.addfile(info, io.BytesIO(b"\0" * info.size))
    return archive


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def test_the_sites_own_folder_is_used(tiny_bert: Path, make_run: Any) -> None:
    sha256 = sha256_of(tiny_bert)
    run = make_run(model={"model_name_or_path": "../../etc", "revision": "main", "sha256": sha256})
    local = at_site(run, site_with(tiny_bert.name, sha256), tiny_bert.parent)
    assert Path(local.model.model_name_or_path) == tiny_bert
    assert load_model(local).sha256 == sha256


def test_a_folder_with_other_weights_is_found_out_when_it_is_loaded(tiny_bert: Path, make_run: Any) -> None:
    run = make_run(model={"sha256": "0" * 64})
    with pytest.raises(ModelError, match="get the right model"):
        load_model(at_site(run, site_with(str(tiny_bert), "0" * 64), tiny_bert))


def test_nothing_is_fetched(tmp_path: Path, make_run: Any) -> None:
    with pytest.raises(ModelError, match="Models are never fetched"):
        find("google-bert/bert-base-uncased", tmp_path)
    with pytest.raises(ModelError, match="lists no model with sha256 None"):
        at_site(make_run(), site_with("x", "0" * 64), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"is a file; name the folder"):
        find("file", tmp_path)


@pytest.mark.parametrize("folder", ["", "./", "bert/", "a/bert/"])
def test_an_archive_becomes_a_folder(folder: str, tiny_bert: Path, tmp_path: Path) -> None:
    more = [
        member(f"{folder}README.md"),
        member(f"{folder}model.bin"),
        member(f"{folder}1_Pooling/config.json"),
    ]
    archive = pack(tmp_path / "bert.tar.gz", tiny_bert, *more, folder=folder)
    got = import_archive(archive, tmp_path / "models", sha256=sha256_of(tiny_bert))
    assert got.sha256 == sha256_of(tiny_bert) == sha256_of(got.folder)
    assert [name.rpartition("/")[2] for name in got.left_out] == ["config.json", "README.md", "model.bin"]
    assert {path.name for path in got.folder.iterdir()} == {path.name for path in tiny_bert.iterdir()}
    assert got.lines.splitlines()[1:] == [f"  - path: {got.folder}", f"    sha256: {got.sha256}"]
    with pytest.raises(ModelError, match="is there already"):
        import_archive(archive, tmp_path / "models")


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (member("bert/vocab-link.txt", tarfile.SYMTYPE, "/etc/passwd"), "is a link or a device"),
        (member("bert/vocab-hard.txt", tarfile.LNKTYPE, "bert/config.json"), "is a link or a device"),
        (member("bert/vocab-pipe", tarfile.FIFOTYPE), "is a link or a device"),
        (member("/bert/vocab.txt"), "leads out of the folder"),
        (member("bert/../../vocab.txt"), "leads out of the folder"),
        (member("bert/config.json"), "twice"),
    ],
)
def test_an_archive_with_a_surprise_leaves_nothing(
    info: tarfile.TarInfo, said: str, tiny_bert: Path, tmp_path: Path
) -> None:
    archive = pack(tmp_path / "bert.tar.gz", tiny_bert, info)
    with pytest.raises(ModelError, match=said):
        import_archive(archive, tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_archives_that_are_not_the_model(tiny_bert: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "bert.tar.gz", tiny_bert)
    models = tmp_path / "models"
    with pytest.raises(ModelError, match=r"have sha256 .* not 0000"):
        import_archive(archive, models, sha256="0" * 64)
    (tmp_path / "cut.tar.gz").write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(ModelError, match="get it again"):
        import_archive(tmp_path / "cut.tar.gz", models)
    (tmp_path / "text.tar").write_text("no archive")
    with pytest.raises(ModelError, match="not a whole tar archive"):
        import_archive(tmp_path / "text.tar", models)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no config.json"):
        import_archive(pack(tmp_path / "none.tar.gz", tmp_path / "empty"), models)
    assert list(models.iterdir()) == []
    with pytest.raises(ConfigError, match="choose a folder"):
        import_archive(archive, tmp_path / "text.tar" / "models")
