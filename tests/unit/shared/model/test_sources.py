"""Where models and data are looked for, and what is said when they are not there."""

import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from refusals import refuses

from quorate.shared.errors import ConfigError, DataError, ModelError
from quorate.shared.model.sources import expand, resolve_local, resolve_model

PACKAGE = "somewhere_on_the_path"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that must not be imported: importing it raises."""
    folder = tmp_path / "installed" / PACKAGE
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "rows.csv").write_text("text,label\n")
    (tmp_path / "outside.csv").write_text("text,label\n")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_variables_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUORATE_TEST_ROOT", "/data")
    assert expand("${QUORATE_TEST_ROOT}/a/${QUORATE_TEST_ROOT}", "f") == "/data/a//data"
    assert expand("no variables, $HOME and $5 stay", "f") == "no variables, $HOME and $5 stay"


def test_a_variables_value_is_not_expanded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUORATE_TEST_ROOT", "${HOME}")
    assert expand("${QUORATE_TEST_ROOT}", "f") == "${HOME}"


@pytest.mark.parametrize("value", [None, ""])
def test_an_unset_variable_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("QUORATE_TEST_ROOT", raising=False)
    if value is not None:
        monkeypatch.setenv("QUORATE_TEST_ROOT", value)
    with refuses(ConfigError, "variable-unset", where="heart.sites.yaml") as caught:
        expand("${QUORATE_TEST_ROOT}/x", "heart.sites.yaml: source")
    assert ": source: " in str(caught.value) and "export QUORATE_TEST_ROOT=" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("${}", "not-a-variable"),
        ("${a b}", "not-a-variable"),
        ("${1A}", "not-a-variable"),
        ("${A", "variable-open"),
        ("x ${", "variable-open"),
    ],
)
def test_a_malformed_variable_is_refused(text: str, kind: str) -> None:
    with refuses(ConfigError, kind, where="f") as caught:
        expand(text, "f")
    assert repr(text) in str(caught.value)


def test_local_paths(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert resolve_local("data", tmp_path) == tmp_path / "data"
    assert resolve_local(str(tmp_path / "data"), Path("/elsewhere")) == tmp_path / "data"


def test_a_missing_path_names_the_variable_it_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUORATE_TEST_ROOT", str(tmp_path))
    with refuses(DataError, "nothing-there", where="source") as caught:
        resolve_local("${QUORATE_TEST_ROOT}/absent", tmp_path)
    assert f"{tmp_path}/absent (from ${{QUORATE_TEST_ROOT}}/absent)" in str(caught.value)


def test_a_package_is_found_and_not_imported(package: Path, tmp_path: Path) -> None:
    assert resolve_local(f"package:{PACKAGE}/rows.csv", tmp_path) == package / "rows.csv"
    assert resolve_model(f"package:{PACKAGE}/model", None) == package / "model"
    assert PACKAGE not in sys.modules


@pytest.mark.parametrize(
    ("reference", "kind", "named"),
    [
        (f"package:{PACKAGE}/../outside.csv", "not-a-package-path", "package:NAME/PATH"),
        (f"package:{PACKAGE}//etc/hosts", "not-a-package-path", "package:NAME/PATH"),
        (f"package:{PACKAGE}\\..\\x/rows.csv", "not-a-package-path", "package:NAME/PATH"),
        ("package:os.path/x", "not-a-package-path", "package:NAME/PATH"),
        ("package:/x", "not-a-package-path", "package:NAME/PATH"),
        ("package:no_such_package_at_all/x", "no-such-package", "no_such_package_at_all "),
        ("package:json_is_a_file/x", "no-such-package", "json_is_a_file "),
        ("package:__main__/x", "no-such-package", "__main__ "),
        (f"package:{PACKAGE}/absent.csv", "not-in-package", "absent.csv"),
    ],
)
def test_bad_package_references(package: Path, tmp_path: Path, reference: str, kind: str, named: str) -> None:
    (package.parent / "json_is_a_file.py").write_text("")
    with refuses(DataError, kind, where="source") as caught:
        resolve_local(reference, tmp_path)
    assert named in str(caught.value)
    with refuses(ModelError, kind, where="model.model_name_or_path") as caught:
        resolve_model(reference, None)
    assert named in str(caught.value)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache in the layout of huggingface_hub, which must not reach out."""
    commit = "0123456789" * 4
    repo = tmp_path / "cache" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_cached_hub_model_is_used(hub_cache: Path) -> None:
    assert resolve_model("org/tiny", None) == hub_cache
    assert resolve_model("org/tiny", hub_cache.name) == hub_cache


def test_an_existing_folder_wins_over_a_hub_id(hub_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert resolve_model("org/tiny", None, base_dir=tmp_path) == tmp_path / "org" / "tiny"


def test_offline_nothing_is_fetched(hub_cache: Path) -> None:
    with refuses(ModelError, "fetching-forbidden") as caught:
        resolve_model("org/tiny", "v9")
    assert all(said in str(caught.value) for said in ("'org/tiny'", "revision v9", "HF_HUB_OFFLINE"))
    with refuses(ModelError, "fetching-forbidden") as caught:
        resolve_model("org/absent", None)
    assert "'org/absent'" in str(caught.value) and "HF_HUB_OFFLINE" in str(caught.value)


def test_a_hub_that_does_not_answer(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    with refuses(ModelError, "hub-gives-nothing") as caught:
        resolve_model("org/absent", None)
    assert "'org/absent'" in str(caught.value)
    assert "fetching model org/absent from the hub (HF_HUB_OFFLINE=1 forbids it)" in caplog.text


@pytest.mark.parametrize("reference", ["./models/absent", "/no/such/model", "a/b/c"])
def test_a_path_is_never_taken_for_a_hub_id(hub_cache: Path, reference: str) -> None:
    with refuses(ModelError, "no-model-there", where="model.model_name_or_path"):
        resolve_model(reference, None)


def test_a_variable_is_never_taken_for_a_hub_id(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUORATE_TEST_ROOT", "org")
    with refuses(ModelError, "no-model-there"):
        resolve_model("${QUORATE_TEST_ROOT}/tiny", None)


def test_a_model_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with refuses(ModelError, "model-is-a-file"):
        resolve_model("model.safetensors", None, base_dir=tmp_path)
    with refuses(ModelError, "neither-folder-nor-hub-id"):
        resolve_model("a--b..c", None, base_dir=tmp_path)
