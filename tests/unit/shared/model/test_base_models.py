"""Base models at a site: the site's folder whatever the run file says, and archives that hold surprises."""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refuses
from safetensors.torch import load_file, save_file
from site_folder import sha256_of, write_folder

from quorate.client.health.site_check import Line, check
from quorate.client.models.base_models import at_site, find, import_archive
from quorate.client.policy.site_config import SiteConfig
from quorate.deploy.cli import run
from quorate.shared.config.read import dump_yaml
from quorate.shared.errors import ConfigError, ModelError
from quorate.shared.model.lora_model import load_model


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
    with refuses(ModelError, "other-weights"):
        load_model(at_site(run, site_with(str(tiny_bert), "0" * 64), tiny_bert))


def test_nothing_is_fetched(tmp_path: Path, make_run: Any) -> None:
    with refuses(ModelError, "model-not-here", where="site.yaml, models.path"):
        find("google-bert/bert-base-uncased", tmp_path)
    with refuses(ModelError, "model-not-listed") as caught:
        at_site(make_run(), site_with("x", "0" * 64), tmp_path)
    assert "sha256 None" in str(caught.value)
    (tmp_path / "file").touch()
    with refuses(ModelError, "model-is-a-file", where="site.yaml, models.path"):
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
    with refuses(ModelError, "model-there-already") as caught:
        import_archive(archive, tmp_path / "models")
    assert str(caught.value).startswith(str(got.folder))


def test_what_the_command_says_goes_into_site_yaml_and_is_checked(
    tiny_bert: Path, make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, archive = write_folder(tmp_path / "north", tiny_bert), pack(tmp_path / "bert.tar.gz", tiny_bert)
    before = os.umask(0o077)  # as root's may be
    try:
        assert run(["site", "models", "import", str(archive), "--folder", str(site.path)]) == 0
    finally:
        os.umask(before)
    path, said = site.path / "site.yaml", capsys.readouterr().out
    (model,) = yaml.safe_load(said.partition("Add to site.yaml:")[2])["models"]
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "models": [model]}))
    folder = Path(model["path"])
    assert folder.parent == site.path / "models"
    modes = {stat.S_IMODE(each.stat().st_mode) for each in (folder, folder.parent, *folder.iterdir())}
    assert modes == {0o755, 0o644}

    def looked_at(**sections: Any) -> dict[str, Line]:
        asked = {"model_name_or_path": "/nowhere", "sha256": model["sha256"]}
        (tmp_path / "run.yaml").write_text(dump_yaml(make_run(**{"model": asked, **sections})))
        return {line.what: line for line in check(site.path, tmp_path / "run.yaml")}

    lines = looked_at()
    assert lines["models[0]"].ok and lines["run run.yaml"].ok, lines
    rows = re.search(r"train (\d+), validation (\d+), test (\d+) rows", lines["run run.yaml"].found)
    assert rows is not None and sum(map(int, rows.groups())) == 90
    for sections, why in (
        ({"adapter": {"r": 65}}, "policy.max_rank is 64"),
        ({"adapter": {"modules_to_save": ["pooler"]}}, "policy.modules_to_save allows nothing"),
        ({"data": "letters"}, "data allows notes, the run asks for data letters"),
        ({"task": {"labels": ["cardiac", "renal"]}}, "is not among the run's labels"),
    ):
        line = looked_at(**sections)["run run.yaml"]
        assert not line.ok and why in line.found
    # `quorate run` fills the hash in: a run file without it is right, whether or not its model lies here.
    unpinned = {"model_name_or_path": model["path"], "sha256": None}
    line = looked_at(model=unpinned)["run run.yaml"]
    assert line.ok and model["sha256"][:12] in line.found
    line = looked_at(model={**unpinned, "model_name_or_path": "organisation/elsewhere"})["run run.yaml"]
    assert line.ok and "ask the coordinator which hash" in line.found
    other = tmp_path / "other"
    shutil.copytree(model["path"], other)
    weights = load_file(other / "model.safetensors")
    first = min(weights)
    save_file({**weights, first: weights[first] + 1}, other / "model.safetensors", {"format": "pt"})
    line = looked_at(model={**unpinned, "model_name_or_path": str(other)})["run run.yaml"]
    assert not line.ok and "the run asks for the model with sha256" in line.found
    looked_at(data="letters")
    assert run(["site", "check", str(site.path), "--run", str(tmp_path / "run.yaml")]) == 2


@pytest.mark.parametrize(
    ("info", "kind"),
    [
        (member("bert/vocab-link.txt", tarfile.SYMTYPE, "/etc/passwd"), "not-a-plain-file"),
        (member("bert/vocab-hard.txt", tarfile.LNKTYPE, "bert/config.json"), "not-a-plain-file"),
        (member("bert/vocab-pipe", tarfile.FIFOTYPE), "not-a-plain-file"),
        (member("/bert/vocab.txt"), "leads-out"),
        (member("bert/../../vocab.txt"), "leads-out"),
        (member("bert/config.json"), "file-twice"),
    ],
)
def test_an_archive_with_a_surprise_leaves_nothing(
    info: tarfile.TarInfo, kind: str, tiny_bert: Path, tmp_path: Path
) -> None:
    archive = pack(tmp_path / "bert.tar.gz", tiny_bert, info)
    with refuses(ModelError, kind) as caught:
        import_archive(archive, tmp_path / "models")
    assert repr(info.name) in str(caught.value)
    assert list((tmp_path / "models").iterdir()) == []


def test_archives_that_are_not_the_model(tiny_bert: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "bert.tar.gz", tiny_bert)
    models = tmp_path / "models"
    with refuses(ModelError, "archive-of-other-weights", where=str(archive)) as caught:
        import_archive(archive, models, sha256="0" * 64)
    assert "0" * 64 in str(caught.value)
    (tmp_path / "cut.tar.gz").write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with refuses(ModelError, "not-an-archive"):
        import_archive(tmp_path / "cut.tar.gz", models)
    (tmp_path / "text.tar").write_text("no archive")
    with refuses(ModelError, "not-an-archive") as caught:
        import_archive(tmp_path / "text.tar", models)
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with refuses(ModelError, "no-model-in-archive"):
        import_archive(pack(tmp_path / "none.tar.gz", tmp_path / "empty"), models)
    assert list(models.iterdir()) == []
    with refuses(ConfigError, where=str(tmp_path / "text.tar" / "models")):
        import_archive(archive, tmp_path / "text.tar" / "models")
