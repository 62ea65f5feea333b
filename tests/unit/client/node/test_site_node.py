"""A site's guard, folders and programs: what is admitted, who owns what, and what the environment says."""

import json
import stat
import subprocess
import time
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from refusals import refuses

from quorate.client.flower.allowed_commands import GUARDED, REFUSING, write_commands
from quorate.client.flower.bundle_guard import BundleRefused, check_bundle, check_overrides, own_bundle
from quorate.client.node.connection_state import SILENT_SECONDS, Contact, read_connection_state, silent
from quorate.client.node.folder import SiteFolder
from quorate.client.node.names import CONTACT, SOCKET
from quorate.client.node.programs import Ports, flower_environment, flower_programs, site_program
from quorate.client.node.supervise import read_programs
from quorate.client.node.users import prepare_folders
from quorate.client.policy.approvals import (
    approve,
    is_withdrawn,
    note_waiting,
    rejoin,
    withdraw,
    withdrawn_runs,
)
from quorate.shared.errors import ConfigError
from quorate.shared.protocol.bundle import bundle_dir

# flwr's builder uses an old name of pathspec's.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


def packed(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


# Bundles


def test_our_bundle_is_admitted_however_it_is_compressed() -> None:
    built = build_fab_from_disk(bundle_dir())
    assert built == build_fab_from_disk(bundle_dir())
    check_bundle(built)
    check_bundle(packed(own_bundle(), zipfile.ZIP_STORED))


@pytest.mark.parametrize(
    "change",
    [
        {"client/app.py": b"print('mine')"},
        {"quorate/client/app.py": b"print('mine')"},
        {"pyproject.toml": b""},
        {"../pyproject.toml": b"x"},
    ],
)
def test_a_file_more_or_another_content_is_refused(change: dict[str, bytes]) -> None:
    with refuses(BundleRefused, "other-files"):
        check_bundle(packed({**own_bundle(), **change}))


def test_the_same_sizes_with_another_byte_are_refused() -> None:
    ours = own_bundle()["pyproject.toml"]
    changed = ours.replace(b"process.flower_app:app", b"process.flower_apq:app")
    with refuses(BundleRefused, "changed-files") as caught:
        check_bundle(packed({**own_bundle(), "pyproject.toml": changed}))
    assert "pyproject.toml" in str(caught.value)


def test_a_name_twice_is_refused() -> None:
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as archive, pytest.warns(UserWarning):
        for name, content in [*own_bundle().items(), ("pyproject.toml", b"")]:
            archive.writestr(name, content)
    with pytest.raises(BundleRefused):
        check_bundle(stream.getvalue())


@pytest.mark.parametrize("content", [b"", b"PK", b"not an archive", b"PK\x05\x06" + b"\0" * 18])
def test_what_is_no_bundle_is_refused(content: bytes) -> None:
    with pytest.raises(BundleRefused):
        check_bundle(content)


def test_a_cut_off_bundle_is_refused() -> None:
    built = build_fab_from_disk(bundle_dir())
    for length in range(0, len(built), 37):
        with pytest.raises(BundleRefused):
            check_bundle(built[:length])


def test_overrides_hold_a_run_id_and_nothing_else() -> None:
    check_overrides({"run": "0123456789abcdef"})
    for wrong in (
        {},
        {"run": "../../etc"},
        {"run": 1},
        {"run": "0123456789ABCDEF"},
        {"run": "0" * 16 + "\n"},
    ):
        with pytest.raises(BundleRefused):
            check_overrides(wrong)
    with refuses(BundleRefused, "other-overrides"):
        check_overrides({"run": "0123456789abcdef", "data": "x"})


# Commands


def test_flower_finds_our_commands_alone(tmp_path: Path) -> None:
    write_commands(tmp_path / "bin")
    (tmp_path / "bin" / "flwr-clientapp-of-old").touch()
    write_commands(tmp_path / "bin")
    found = {path.name: path for path in (tmp_path / "bin").iterdir()}
    assert set(found) == {GUARDED, *REFUSING}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o755 for path in found.values())
    for name in REFUSING:
        done = subprocess.run([found[name], "--token", "x"], capture_output=True, text=True)
        assert done.returncode == 1 and f"refused to start {name}" in done.stderr


# Folders and programs


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / "notes.csv").write_text("text,label\nfever,yes\n")
    (folder / "site.yaml").write_text("data: {notes: {source: notes.csv}}\n")
    (folder / "connection.yaml").write_text("federation: f\nsite: north\nserver: example.org:9443\n")
    for name in ("node.key", "ca.crt"):
        (folder / name).write_text("x")
    (folder / "node.key").chmod(0o644)
    return SiteFolder.find(folder)


def test_folders_are_private_to_whoever_starts_the_site(site: SiteFolder) -> None:
    prepare_folders(site)
    secret = site.secret.read_bytes()
    prepare_folders(site)
    assert site.secret.read_bytes() == secret and len(secret) == 32
    for private in (site.node_key, site.secret):
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    for folder in (site.state, site.logs, site.supervisor, site.supernode, site.anchor):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_link_in_place_of_the_state_is_refused(site: SiteFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    site.state.symlink_to(tmp_path / "elsewhere")
    with refuses(ConfigError, "link-for-a-folder", str(site.state)):
        prepare_folders(site)


def test_a_folder_without_a_kit_is_refused(tmp_path: Path) -> None:
    with refuses(ConfigError, where=str(tmp_path)) as caught:
        SiteFolder.find(tmp_path)
    assert "connection.yaml" in str(caught.value)


def test_users_must_exist_and_differ(site: SiteFolder) -> None:
    for users, kind in (
        ("{site: no-such-user, supernode: nobody}", "no-user"),
        ("{site: nobody, supernode: nobody}", "one-user-for-both"),
    ):
        (site.path / "site.yaml").write_text(f"data: {{notes: {{source: notes.csv}}}}\nusers: {users}\n")
        with refuses(ConfigError, kind, "users"):
            prepare_folders(SiteFolder(site.path))


def test_flower_gets_the_proxy_but_never_for_loopback(site: SiteFolder) -> None:
    env = flower_environment(site, None, {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "intra.example"})
    assert env["no_proxy"] == env["NO_PROXY"] == "intra.example,127.0.0.1,localhost,::1"
    assert env["PATH"] == str(site.bin)
    assert (env[SOCKET], env[CONTACT]) == (str(site.socket), str(site.contact))
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert Path(env["FLWR_HOME"]).is_relative_to(site.state)


def test_programs_come_back_from_their_file_as_they_were(site: SiteFolder, tmp_path: Path) -> None:
    from dataclasses import asdict

    programs = [site_program(site), *flower_programs(site, Ports.free())]
    (tmp_path / "programs.json").write_text(json.dumps([asdict(each) for each in programs], default=str))
    again = read_programs(tmp_path / "programs.json")
    assert [(*p.command,) for p in again] == [(*p.command,) for p in programs]
    assert [(p.log, p.cwd, p.env) for p in again] == [(p.log, p.cwd, p.env) for p in programs]


# How the SuperNode stands


def test_contact_keeps_when_a_state_began(tmp_path: Path) -> None:
    path = tmp_path / "contact.json"
    assert read_connection_state(path) is None
    contact, now = Contact(path), time.time()
    for state, detail, at in [
        ("connected", "", now - 60),
        ("connected", "", now - 30),
        ("unreachable", "ConnectError", now),
    ]:
        contact.note(state, detail, at)  # type: ignore[arg-type]
        found = read_connection_state(path)
        assert found is not None and (found.state, found.detail) == (state, detail)
        assert found.since == (now if state == "unreachable" else now - 60)
        assert found.last == pytest.approx(at, abs=1e-3)
    assert not silent(now) and silent(now - SILENT_SECONDS - 1)
    path.write_text("{")
    assert read_connection_state(path) is None


# Withdrawal


def test_a_site_leaves_a_run_and_comes_back(tmp_path: Path) -> None:
    withdraw(tmp_path, "0123456789abcdef")
    assert is_withdrawn(tmp_path, "0123456789abcdef") and not is_withdrawn(tmp_path, "fedcba9876543210")
    assert withdrawn_runs(tmp_path) == ["0123456789abcdef"]
    rejoin(tmp_path, "0123456789abcdef")
    assert withdrawn_runs(tmp_path) == []
    with refuses(ConfigError, "not-withdrawn"):
        rejoin(tmp_path, "0123456789abcdef")
    with refuses(ConfigError, "no-run-id"):
        withdraw(tmp_path, "../node.key")


def test_approving_a_run_ends_its_withdrawal_and_withdrawing_ends_the_approval(tmp_path: Path) -> None:
    note_waiting(tmp_path, "run1", "{}")
    approve(tmp_path, "run1")
    withdraw(tmp_path, "run1")
    assert not (tmp_path / "approved" / "run1").exists()
    approve(tmp_path, "run1")
    assert not is_withdrawn(tmp_path, "run1")
    assert (tmp_path / "approved" / "run1").exists()
