"""`quorate provision`: what it makes, who may read it, that nothing is made twice, and the sites' kits."""

import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization as pem
from cryptography.x509.verification import PolicyBuilder, Store
from federations import SITES, content, join, kill_at, make, write_config
from refusals import refuses

from quorate.client.policy.site_config import ConnectionConfig, SiteConfig
from quorate.deploy.cli import run
from quorate.deploy.provision.authority import Authority
from quorate.deploy.provision.kit import unpack
from quorate.deploy.provision.node_keys import admitted_key
from quorate.deploy.provision.provisioning import provision
from quorate.server.federation.folder import FederationFolder
from quorate.shared.config.read import load_file
from quorate.shared.errors import ConfigError

KIT = {"README.md", "ca.crt", "compose.yaml", "connection.yaml", "quorate-site.service", "site.yaml"}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that was written; only a power cut does. Busy disks take seconds each time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def verifier(folder: FederationFolder, at: datetime | None = None) -> PolicyBuilder:
    store = Store([certificate(folder.ca / "ca.crt")])
    return PolicyBuilder().store(store).time(at or datetime.now(UTC))


# What is made


def test_the_server_s_certificate_is_good_for_every_name_and_for_loopback(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    leaf = certificate(folder.server / "server.crt")
    for name in ("server.example", "localhost"):
        chain = verifier(folder).build_server_verifier(x509.DNSName(name)).verify(leaf, [])
        assert chain[-1] == certificate(folder.ca / "ca.crt")
    for address in ("192.0.2.17", "2001:db8::1", "127.0.0.1", "::1"):
        verifier(folder).build_server_verifier(x509.IPAddress(ip_address(address))).verify(leaf, [])
    with pytest.raises(x509.verification.VerificationError):
        verifier(folder).build_server_verifier(x509.DNSName("other.example")).verify(leaf, [])
    with pytest.raises(x509.verification.VerificationError):  # no client's certificate
        verifier(folder).build_client_verifier().verify(leaf, [])
    later = datetime.now(UTC) + timedelta(days=366)
    with pytest.raises(x509.verification.VerificationError):
        verifier(folder, later).build_server_verifier(x509.DNSName("localhost")).verify(leaf, [])
    assert certificate(folder.ca / "ca.crt").not_valid_after_utc > datetime.now(UTC) + timedelta(days=3650)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl")
def test_openssl_agrees(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    for name in (["-verify_hostname", "server.example"], ["-verify_ip", "192.0.2.17"]):
        command = ["openssl", "verify", "-x509_strict", "-crl_check", "-purpose", "sslserver", *name]
        command += ["-CAfile", str(folder.ca / "ca.crt"), "-CRLfile", str(folder.ca / "ca.crl")]
        done = subprocess.run([*command, str(folder.server / "server.crt")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_only_its_owner_may_read_what_is_private(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        done = provision(write_config(tmp_path, mutual_tls=True), tmp_path / "home", with_keys=True)
        site = join(done.folder, "north", tmp_path)
    finally:
        os.umask(mask)
    for path in (done.folder.path, *done.folder.path.rglob("*")):
        mode, owner = stat.S_IMODE(path.stat().st_mode), path.stat().st_uid
        assert owner == os.geteuid(), path
        private = path.is_dir() or path.suffix in (".key", ".secret", ".tar", ".json")
        assert mode == (0o700 if path.is_dir() else 0o600 if private else 0o644), path
    for name in ("node.key", "client.key"):
        assert stat.S_IMODE((site / name).stat().st_mode) == 0o600
    assert len((done.folder.server / "superexec.secret").read_bytes()) == 64


def test_a_long_host_name_fits(tmp_path: Path) -> None:
    host = ".".join(["department"] * 12)
    folder, _ = make(tmp_path, "n" * 64, hostname=host)
    leaf = certificate(folder.server / "server.crt")
    verifier(folder).build_server_verifier(x509.DNSName(host)).verify(leaf, [])


# Again and again


def test_a_second_call_changes_nothing(tmp_path: Path) -> None:
    file = write_config(tmp_path, mutual_tls=True)
    first = provision(file, tmp_path / "home", with_keys=True)
    before, times = content(tmp_path), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    second = provision(file, tmp_path / "home", with_keys=True)
    assert first.made and not second.made and not second.notes
    assert content(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_a_site_added_later_gets_its_kit_and_the_others_keep_theirs(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    before = content(folder.path)
    done = provision(write_config(tmp_path, *SITES, "west"), folder.path)
    after = content(folder.path)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"federation.yaml", "sites/west/kit.tar"} and set(before) <= set(after)
    assert {str(path.relative_to(folder.path)) for path in done.made} == changed


def test_the_copy_in_the_folder_may_be_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = make(tmp_path)
    monkeypatch.setenv("QUORATE_HOME", str(tmp_path / "elsewhere"))
    copy = folder.path / "federation.yaml"
    copy.write_text(copy.read_text().replace("- south", "- south\n- west"))
    assert provision(copy).folder == folder
    assert (folder.site("west") / "kit.tar").exists() and not (tmp_path / "elsewhere").exists()


def test_a_removed_site_is_named_and_kept(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    before = content(folder.path / "sites")
    done = provision(write_config(tmp_path, "north"), folder.path)
    assert content(folder.path / "sites") == before
    (note,) = done.notes
    assert "south" in note and "quorate certificates revoke south" in note


def test_what_is_no_longer_as_the_file_says_is_noted_with_the_remedy(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    before = content(folder.path)
    done = provision(write_config(tmp_path, hostname="new.example"), folder.path)
    after = content(folder.path)
    assert {name for name in after if after[name] != before[name]} == {"federation.yaml"}
    assert any("lacks new.example: quorate certificates renew" in note for note in done.notes)
    assert [note.split(":")[0] for note in done.notes if "connection.yaml" in note] == ["north", "south"]
    (folder.site("north") / "kit.tar").unlink()
    again = provision(write_config(tmp_path, hostname="new.example"), folder.path)
    assert [note.split(":")[0] for note in again.notes if "connection.yaml" in note] == ["south"]


def test_the_key_of_the_ca_may_be_kept_elsewhere(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    key = (folder.ca / "ca.key").read_bytes()
    (folder.ca / "ca.key").unlink()
    provision(write_config(tmp_path, *SITES, "west"), folder.path)  # a kit holds nothing that is signed
    with refuses(ConfigError, "ca-key-missing", where=str(folder.ca / "ca.key")):
        provision(write_config(tmp_path, *SITES, "east", mutual_tls=True), folder.path, with_keys=True)
    (folder.ca / "ca.key").write_bytes(key)
    (folder.ca / "ca.key").chmod(0o600)
    provision(write_config(tmp_path, *SITES, "east", mutual_tls=True), folder.path, with_keys=True)


@pytest.mark.slow
def test_killed_at_any_moment_it_is_completed_and_nothing_made_twice(tmp_path: Path) -> None:
    file = write_config(tmp_path, "north", mutual_tls=True)
    expected: set[str] | None = None
    for nth in range(1000):
        home = tmp_path / f"home-{nth}"
        killed = kill_at(lambda home=home: provision(file, home, with_keys=True), home, nth)
        there = {path: path.read_bytes() for path in home.rglob("*") if path.suffix == ".key"}
        provision(file, home, with_keys=True)
        for path, key in there.items():  # a key that was there is the key that is used
            assert not path.exists() or path.read_bytes() == key
        site = home / "sites" / "north"
        assert not (site / "trial-keys").exists()
        issued = json.loads((home / "ca" / "index.json").read_text())["events"]
        assert [each["role"] for each in issued] == ["ca", "server", "client"]
        files = unpack(site / "kit.tar", "north")
        node = pem.load_ssh_private_key(files["node.key"], None)
        folder = FederationFolder(home)
        assert node.public_key() == admitted_key(folder, "north")
        for path, key in there.items():
            if path.name == "node.key":
                assert key == files["node.key"]
        client = pem.load_pem_private_key(files["client.key"], None)
        leaf = x509.load_pem_x509_certificate(files["client.crt"])
        assert leaf.public_key() == client.public_key() and leaf == certificate(site / "client.crt")
        names = set(content(home))
        expected = expected or names
        assert {name for name in names if not Path(name).name.startswith(".")} == {
            name for name in expected if not Path(name).name.startswith(".")
        }
        if not killed:
            assert nth > 40
            break
        shutil.rmtree(home)
    else:
        pytest.fail("it never ended")


# The kit


def test_a_kit_is_one_folder_without_secrets_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    path = folder.site("north") / "kit.tar"
    with tarfile.open(path) as kit:
        members = kit.getmembers()
    assert {each.name for each in members} == {"north", *(f"north/{name}" for name in KIT)}
    assert all(each.isfile() or each.name == "north" for each in members)
    assert {(each.uid, each.gid, each.uname) for each in members} == {(0, 0, "")}
    assert b"PRIVATE KEY" not in path.read_bytes()
    before = path.read_bytes()
    path.unlink()
    provision(write_config(tmp_path), folder.path)
    assert path.read_bytes() == before


def test_a_kit_unpacks_to_files_that_hold_once_they_are_filled_in(tmp_path: Path) -> None:
    folder, _ = make(tmp_path, "1e3", hostname="2001:db8::5", port=1234, mutual_tls=True)
    site = join(folder, "1e3", tmp_path)  # a name that YAML could take for a number
    connection = load_file(ConnectionConfig, site / "connection.yaml")
    assert connection == ConnectionConfig(
        federation="lungs", site="1e3", server="[2001:db8::5]:1234", mutual_tls=True
    )
    assert certificate(site / "ca.crt") == certificate(folder.ca / "ca.crt")
    template = (site / "site.yaml").read_text()
    with pytest.raises(ConfigError) as caught:
        load_file(SiteConfig, site / "site.yaml")
    assert ": data.records.source: " in str(caught.value)
    (site / "site.yaml").write_text(template.replace("source:     ", "source: rows"))
    assert load_file(SiteConfig, site / "site.yaml").data["records"].source == "rows"
    every = template.replace("source:     ", "source: rows").replace("models: []\n", "")
    fields = r"^( *)# ( *(?:- path|sha256|columns|labels|split|models|tasks|users):)"
    (site / "site.yaml").write_text(re.sub(fields, r"\1\2", every, flags=re.M))
    full = load_file(SiteConfig, site / "site.yaml")  # what is commented out is right too
    assert full.models and full.users and full.policy.tasks and full.data["records"].columns
    service = yaml.safe_load((site / "compose.yaml").read_text())["services"]["site"]
    assert service["command"][:3] == ["site", "start", "/site"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs the program systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    site = join(folder, "north", tmp_path)
    unit = site / "quorate-site.service"
    unit.write_text(unit.read_text().replace("/opt/quorate/venv/bin/quorate", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert done.returncode == 0 and str(unit) not in done.stderr, done.stderr


def test_a_kit_with_keys_says_so_and_is_admitted_at_once(tmp_path: Path) -> None:
    done = provision(write_config(tmp_path, mutual_tls=True), tmp_path / "home", with_keys=True)
    site = join(done.folder, "north", tmp_path)
    key = pem.load_ssh_private_key((site / "node.key").read_bytes(), None)
    assert key.public_key() == admitted_key(done.folder, "north")
    leaf = certificate(site / "client.crt")
    assert verifier(done.folder).build_client_verifier().verify(leaf, []).chain[0] == leaf
    assert "made at the coordinator" in (site / "README.md").read_text()
    plain, _ = make(tmp_path / "home", mutual_tls=True)
    assert "made at the coordinator" not in (join(plain, "south", tmp_path) / "README.md").read_text()


# Bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hostname": "https://server.example"}, "server.hostname"),
        ({"hostname": "server.example:9443"}, "host name or an IP address"),
        ({"addresses": ["192.0.2.300"]}, "server.addresses"),
        ({"hostname": "-server"}, "server.hostname"),
        ({"port": 0}, "server.port"),
    ],
)
def test_a_server_that_cannot_be(
    tmp_path: Path, change: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_config(tmp_path, **change)
    assert run(["provision", str(file), "-o", str(tmp_path / "home")]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "site", ["../north", "north/x", "", ".", "..", "-north", "north\n", "nørth", "a" * 65]
)
def test_a_site_s_name_is_no_path(tmp_path: Path, site: str) -> None:
    with pytest.raises(ConfigError) as caught:
        provision(write_config(tmp_path, site), tmp_path / "home")
    assert ": sites[0]: " in str(caught.value)


def test_bad_files_and_folders_are_one_error_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert run(["provision", *arguments]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and "internal" not in error
        return error

    home = tmp_path / "home"
    assert "cannot be read" in refused(str(tmp_path / "nosuch.yaml"))
    (tmp_path / "bad.yaml").write_text("name: [")
    assert "not valid YAML" in refused(str(tmp_path / "bad.yaml"))
    file = write_config(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert "is not empty and holds no federation" in refused(str(file), "-o", str(tmp_path / "full"))
    assert "is no folder" in refused(str(file), "-o", str(tmp_path / "bad.yaml"))
    provision(file, home)
    before = content(home)
    assert "holds the federation 'lungs', not 'hearts'" in refused(
        str(write_config(tmp_path, name="hearts")), "-o", str(home)
    )
    assert "in its case alone" in refused(str(write_config(tmp_path, "North")), "-o", str(home))
    assert content(home) == before


@pytest.mark.parametrize(
    ("lost", "kind", "remedy"),
    [
        ("ca/index.json", "ca-lost", "ca/"),
        ("server/server.key", "server-key-missing", "quorate certificates renew --new-key"),
    ],
)
def test_what_cannot_be_made_again_must_come_back(tmp_path: Path, lost: str, kind: str, remedy: str) -> None:
    folder, _ = make(tmp_path)
    kept = (folder.path / lost).read_bytes()
    (folder.path / lost).unlink()
    before = content(folder.path)
    with refuses(ConfigError, kind, where=str(folder.path / lost)) as caught:
        provision(write_config(tmp_path), folder.path)
    assert remedy in str(caught.value)
    assert content(folder.path) == before
    (folder.path / lost).write_bytes(kept)
    (folder.path / lost).chmod(0o600)
    assert not provision(write_config(tmp_path), folder.path).made


def test_certificates_come_back_from_the_index(tmp_path: Path) -> None:
    folder, authority = make(tmp_path)
    before = content(folder.path)
    for lost in ("ca/ca.crt", "server/server.crt"):
        (folder.path / lost).unlink()
    provision(write_config(tmp_path), folder.path)
    assert content(folder.path) == before
    (folder.ca / "index.json").write_text("{")
    with refuses(ConfigError, "index-damaged", where=str(folder.ca / "index.json")):
        _ = authority.index


def test_a_key_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    (folder.server / "server.key").chmod(0o644)
    with refuses(ConfigError, "key-exposed", where=str(folder.server / "server.key")) as caught:
        provision(write_config(tmp_path), folder.path)
    assert "0644" in str(caught.value) and "chmod 600" in str(caught.value)


def test_another_ca_s_key_signs_nothing(tmp_path: Path) -> None:
    folder, authority = make(tmp_path)
    (tmp_path / "other").mkdir()
    other, _ = make(tmp_path / "other")
    shutil.copy(other.ca / "ca.key", folder.ca / "ca.key")
    with refuses(ConfigError, "other-ca-key", where=str(folder.ca / "ca.key")):
        authority.ready()
    shutil.copy(other.ca / "ca.crt", folder.ca / "ca.crt")
    with refuses(ConfigError, "other-ca-certificate", where=str(folder.ca / "ca.crt")):
        Authority(folder, "lungs").ensure()


# The command


def test_the_command_says_what_it_made_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUORATE_HOME", str(tmp_path / "home"))
    file = write_config(tmp_path)
    assert run(["provision", str(file)]) == 0
    said = capsys.readouterr().out
    assert "made sites/south/kit.tar" in said
    assert run(["provision", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["made"] == [] and report["folder"] == str(tmp_path / "home" / "lungs")
    assert report["ca_sha256"] in said
    assert FederationFolder.find("lungs").config.sites == SITES
