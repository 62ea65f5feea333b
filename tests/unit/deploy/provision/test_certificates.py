"""Certificates and node keys at the coordinator, and the keys that a site makes for itself."""

import json
import os
import shutil
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from federations import SITES, content, join, kill_at, make, write_config
from refusals import refuses

from quorate.client.node.enrolment import enrol, node_public_bytes, signing_request
from quorate.deploy.cli import run
from quorate.deploy.provision.authority import Authority
from quorate.deploy.provision.certificate_log import Index
from quorate.deploy.provision.issuing import renew_server, revoke_site, sign_site
from quorate.deploy.provision.node_keys import admit_key, admitted_key, restore_site, revocation
from quorate.deploy.provision.provisioning import provision
from quorate.server.federation.folder import FederationFolder
from quorate.shared.errors import ConfigError, OutputError
from quorate.shared.process.files import locked


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that was written; only a power cut does. Busy disks take seconds each time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def federation(tmp_path: Path) -> tuple[FederationFolder, Authority]:
    return make(tmp_path, mutual_tls=True)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def revoked_serials(authority: Authority) -> set[int]:
    crl = x509.load_pem_x509_crl(authority.crl_file.read_bytes())
    ca = authority.certificate
    assert crl.is_signature_valid(ca.public_key()) and crl.issuer == ca.subject  # type: ignore[arg-type]
    assert crl.next_update_utc == ca.not_valid_after_utc  # one that ends sooner would lock every site out
    return {each.serial_number for each in crl}


# At the site


def test_a_site_makes_its_keys_once(federation: tuple[FederationFolder, Authority], tmp_path: Path) -> None:
    site = join(federation[0], "north", tmp_path)
    before = content(site)
    again = enrol(site)
    assert not again.made and content(site) == before
    assert [path.name for path in again.send] == ["node.pub", "client.csr"]
    for name in ("node.key", "client.key"):
        assert stat.S_IMODE((site / name).stat().st_mode) == 0o600
    assert b"PRIVATE" not in b"".join(path.read_bytes() for path in again.send)
    key = pem.load_ssh_private_key((site / "node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    assert pem.load_ssh_public_key((site / "node.pub").read_bytes()) == key.public_key()
    request = x509.load_pem_x509_csr((site / "client.csr").read_bytes())
    assert request.is_signature_valid and request.subject.rfc4514_string() == "CN=north"
    (site / "node.pub").unlink()
    (site / "client.csr").write_text("damaged")
    assert enrol(site).made == ("node.pub", "client.csr")
    assert (site / "node.pub").read_bytes() == before["node.pub"]


def test_new_keys_leave_the_old_ones_beside_them(
    federation: tuple[FederationFolder, Authority], tmp_path: Path
) -> None:
    site = join(federation[0], "north", tmp_path)
    (site / "client.crt").write_text("of the old key")
    before = content(site)
    done = enrol(site, renew=True)
    after = content(site)
    for path in done.kept_aside:
        assert path.read_bytes() == before[path.name.split(".old-")[0]]
    assert len(done.kept_aside) == 5 and "client.crt" not in after
    assert after["node.key"] != before["node.key"] and after["client.key"] != before["client.key"]


def test_what_is_no_kit_and_no_key_is_refused(
    federation: tuple[FederationFolder, Authority], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["site", "enrol", str(tmp_path)]) == 2
    assert "holds no connection.yaml" in capsys.readouterr().err
    site = join(federation[0], "north", tmp_path)
    (site / "node.key").write_text("no key")
    before = content(site)
    assert run(["site", "enrol", str(site)]) == 2
    assert "is no private key that Quorate made" in capsys.readouterr().err
    assert content(site) == before


@pytest.mark.slow
def test_enrolment_killed_at_any_moment_is_completed(
    federation: tuple[FederationFolder, Authority], tmp_path: Path
) -> None:
    kit = federation[0].site("north") / "kit.tar"
    for nth in range(200):
        place = tmp_path / f"try-{nth}"
        place.mkdir()
        subprocess.run(["tar", "-xf", kit, "-C", place], check=True)
        killed = kill_at(lambda place=place: enrol(place / "north"), place, nth)
        there = {path: path.read_bytes() for path in place.rglob("*.key")}
        enrol(place / "north")
        assert all(path.read_bytes() == key for path, key in there.items())
        key = pem.load_ssh_private_key((place / "north" / "node.key").read_bytes(), None)
        assert pem.load_ssh_public_key((place / "north" / "node.pub").read_bytes()) == key.public_key()
        if not killed:
            assert nth > 8
            return
    pytest.fail("it never ended")


# Node keys at the coordinator


def test_a_key_is_admitted_for_one_site(
    federation: tuple[FederationFolder, Authority], tmp_path: Path
) -> None:
    folder, _ = federation
    north, south = join(folder, "north", tmp_path), join(folder, "south", tmp_path)
    path = admit_key(folder, "north", north / "node.pub")
    before = content(folder.path)
    assert admit_key(folder, "north", north / "node.pub") == path and content(folder.path) == before
    with refuses(ConfigError, "key-of-another", where=str(north / "node.pub")) as caught:
        admit_key(folder, "south", north / "node.pub")
    assert "north;" in str(caught.value)
    with refuses(ConfigError, "unknown-site") as caught:
        admit_key(folder, "west", south / "node.pub")
    assert "'west'" in str(caught.value)
    with refuses(ConfigError, "private-key", where=str(south / "node.key")):
        admit_key(folder, "south", south / "node.key")
    assert content(folder.path) == before
    admit_key(folder, "south", south / "node.pub")
    enrol(north, renew=True)
    with refuses(ConfigError, "another-key-already", where=str(north / "node.pub")):
        admit_key(folder, "north", north / "node.pub")
    admit_key(folder, "north", north / "node.pub", renew=True)
    key = pem.load_ssh_private_key((north / "node.key").read_bytes(), None)
    assert admitted_key(folder, "north") == key.public_key()
    (aside,) = folder.site("north").glob("node.pub.old-*")
    assert aside.read_bytes() == before["sites/north/node.pub"]


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (ed25519.Ed25519PrivateKey.generate().public_key(), "no-nist-curve"),
        (rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key(), "no-nist-curve"),
        (None, "no-public-key"),
    ],
    ids=["ed25519", "rsa", "no key"],
)
def test_a_key_that_flower_would_not_take_is_refused(
    federation: tuple[FederationFolder, Authority],
    tmp_path: Path,
    key: ed25519.Ed25519PublicKey | None,
    kind: str,
) -> None:
    line = key.public_bytes(pem.Encoding.OpenSSH, pem.PublicFormat.OpenSSH) if key else b"\x00 text"
    (tmp_path / "node.pub").write_bytes(line)
    with refuses(ConfigError, kind, where=str(tmp_path / "node.pub")):
        admit_key(federation[0], "north", tmp_path / "node.pub")
    assert not (federation[0].site("north") / "node.pub").exists()


def test_a_revoked_site_comes_back_with_a_new_key_alone(
    federation: tuple[FederationFolder, Authority], tmp_path: Path
) -> None:
    folder, authority = federation
    north = join(folder, "north", tmp_path)
    admit_key(folder, "north", north / "node.pub")
    old = shutil.copy(north / "node.pub", tmp_path / "old.pub")
    revoke_site(folder, authority, "north")
    assert admitted_key(folder, "north") is None and not (folder.site("north") / "node.pub").exists()
    assert (revoked := revocation(folder, "north")) and revoked.node_keys
    assert datetime.now(UTC) - revoked.time < timedelta(minutes=5)
    with refuses(ConfigError, "site-revoked") as caught:
        admit_key(folder, "north", Path(old))
    assert "quorate certificates restore north" in str(caught.value)
    before = content(folder.path)
    revoke_site(folder, authority, "north")
    assert content(folder.path) == before  # again is no harm, and keeps the time
    done = provision(write_config(tmp_path, mutual_tls=True), folder.path, with_keys=True)
    assert admitted_key(folder, "north") is None and "north: is revoked" in done.notes
    restore_site(folder, "north")
    for site in SITES:
        with refuses(ConfigError, "key-revoked") as caught:
            admit_key(folder, site, Path(old), renew=True)
        assert "north" in str(caught.value).removeprefix(str(old))
    enrol(north, renew=True)
    admit_key(folder, "north", north / "node.pub")
    with refuses(ConfigError, "not-revoked"):
        restore_site(folder, "north")


# Client certificates


def test_a_signed_certificate_is_the_site_s_and_nothing_else(
    federation: tuple[FederationFolder, Authority], tmp_path: Path
) -> None:
    folder, authority = federation
    site = join(folder, "north", tmp_path)
    signed = sign_site(folder, authority, "north", site / "client.csr", days=30)
    leaf = certificate(signed.path)
    store = x509.verification.Store([authority.certificate])
    policy = x509.verification.PolicyBuilder().store(store)
    assert policy.build_client_verifier().verify(leaf, []).chain == [leaf, authority.certificate]
    with pytest.raises(x509.verification.VerificationError):
        policy.build_server_verifier(x509.DNSName("north")).verify(leaf, [])
    assert leaf.subject.rfc4514_string() == "CN=north"
    key = pem.load_pem_private_key((site / "client.key").read_bytes(), None)
    assert leaf.public_key() == key.public_key()
    assert timedelta(29) < leaf.not_valid_after_utc - datetime.now(UTC) < timedelta(31)
    before = content(folder.path)
    assert not sign_site(folder, authority, "north", site / "client.csr").new
    assert content(folder.path) == before


def test_a_request_in_another_name_or_with_another_s_key_is_refused(
    federation: tuple[FederationFolder, Authority], tmp_path: Path
) -> None:
    folder, authority = federation
    north, south = join(folder, "north", tmp_path), join(folder, "south", tmp_path)
    sign_site(folder, authority, "north", north / "client.csr")
    before = content(folder.path)

    def refused(request: bytes, kind: str, named: str = "south") -> None:
        (tmp_path / "asked.csr").write_bytes(request)
        with refuses(ConfigError, kind, where=str(tmp_path / "asked.csr")) as caught:
            sign_site(folder, authority, "south", tmp_path / "asked.csr", renew=True)
        assert named in str(caught.value).removeprefix(caught.value.where)

    key = pem.load_pem_private_key((north / "client.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    refused((north / "client.csr").read_bytes(), "other-name")
    refused(signing_request(key, "south"), "request-key-of-another", "north")
    refused(signing_request(key, "South"), "other-name")
    more = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "south"),
            x509.NameAttribute(NameOID.COMMON_NAME, "north"),
        ]
    )
    two = x509.CertificateSigningRequestBuilder().subject_name(more).sign(key, hashes.SHA256())
    refused(two.public_bytes(pem.Encoding.PEM), "other-name")
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "south")])
    weak = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(other, hashes.SHA256())
    refused(weak.public_bytes(pem.Encoding.PEM), "no-nist-curve", "ECDSA")
    sound = x509.load_pem_x509_csr((south / "client.csr").read_bytes()).public_bytes(pem.Encoding.DER)
    bent = sound[:-3] + bytes([sound[-3] ^ 1]) + sound[-2:]
    loaded = x509.load_der_x509_csr(bent)
    refused(loaded.public_bytes(pem.Encoding.PEM), "wrong-signature", "client.csr")
    refused(b"text", "no-request", "client.csr")
    assert content(folder.path) == before


def test_a_second_certificate_needs_renew_and_a_revoked_one_never_comes_back(
    federation: tuple[FederationFolder, Authority], tmp_path: Path
) -> None:
    folder, authority = federation
    site = join(folder, "north", tmp_path)
    old = (site / "client.csr").read_bytes()
    first = sign_site(folder, authority, "north", site / "client.csr").issued
    enrol(site, renew=True)
    with refuses(ConfigError, "valid-certificate") as caught:
        sign_site(folder, authority, "north", site / "client.csr")
    assert first.serial in str(caught.value) and "--renew" in str(caught.value)
    second = sign_site(folder, authority, "north", site / "client.csr", renew=True)
    assert second.new and second.earlier == (first,)
    assert revoke_site(folder, authority, "north", first.serial[:12].upper()) == [first]
    assert revoked_serials(authority) == {int(first.serial, 16)}
    assert revocation(folder, "north") is None  # the certificate alone
    with refuses(ConfigError, "no-such-serial"):
        revoke_site(folder, authority, "north", "ffffffffffffffffffffffff")
    (tmp_path / "old.csr").write_bytes(old)
    with refuses(ConfigError, "request-key-revoked", where=str(tmp_path / "old.csr")):
        sign_site(folder, authority, "north", tmp_path / "old.csr", renew=True)
    revoke_site(folder, authority, "north")
    assert revoked_serials(authority) == {int(first.serial, 16), int(second.issued.serial, 16)}
    with refuses(ConfigError, "site-revoked"):
        sign_site(folder, authority, "north", site / "client.csr")
    events = Index.read(folder.ca / "index.json", "lungs").events
    assert [each.event for each in events] == ["issued"] * 4 + ["revoked"] * 2


def test_without_the_ca_s_key_the_node_key_is_put_out_all_the_same(
    federation: tuple[FederationFolder, Authority], tmp_path: Path
) -> None:
    folder, authority = federation
    site = join(folder, "north", tmp_path)
    admit_key(folder, "north", site / "node.pub")
    sign_site(folder, authority, "north", site / "client.csr")
    (folder.ca / "ca.key").rename(tmp_path / "ca.key")
    with refuses(ConfigError, "ca-key-missing", where=str(folder.ca / "ca.key")):
        revoke_site(folder, authority, "north")
    assert admitted_key(folder, "north") is None and not revoked_serials(authority)
    (tmp_path / "ca.key").rename(folder.ca / "ca.key")
    revoke_site(folder, authority, "north")
    assert len(revoked_serials(authority)) == 1


# The server's certificate


@pytest.mark.parametrize("new_key", [False, True])
def test_a_renewed_server_is_known_to_the_same_kits(
    federation: tuple[FederationFolder, Authority], tmp_path: Path, new_key: bool
) -> None:
    folder, authority = federation
    before = content(folder.path)
    provision(write_config(tmp_path, hostname="new.example", mutual_tls=True), folder.path)
    renew_server(folder, authority, new_key_too=new_key, days=100)
    leaf, after = certificate(folder.server / "server.crt"), content(folder.path)
    store = x509.verification.Store([x509.load_pem_x509_certificate(before["ca/ca.crt"])])
    policy = x509.verification.PolicyBuilder().store(store)
    policy.build_server_verifier(x509.DNSName("new.example")).verify(leaf, [])
    assert leaf.not_valid_after_utc - datetime.now(UTC) < timedelta(days=100)
    kept = {name.split(".old-")[0]: after[name] for name in after if ".old-" in name}
    names = ["server/server.crt", "server/server.key"] if new_key else ["server/server.crt"]
    assert kept == {name: before[name] for name in names}
    key = pem.load_pem_private_key(after["server/server.key"], None)
    assert key.public_key() == leaf.public_key()
    assert (after["server/server.key"] == before["server/server.key"]) is not new_key
    assert not provision(write_config(tmp_path, hostname="new.example", mutual_tls=True), folder.path).made


@pytest.mark.slow
def test_changes_killed_at_any_moment_are_completed(
    federation: tuple[FederationFolder, Authority], tmp_path: Path
) -> None:
    folder, authority = federation
    site = join(folder, "north", tmp_path)
    admit_key(folder, "north", site / "node.pub")

    def renewed() -> None:
        renew_server(folder, authority, new_key_too=False, days=90)

    def signed() -> None:
        sign_site(folder, authority, "north", site / "client.csr")

    def revoked() -> None:
        revoke_site(folder, authority, "north")

    for action, events in ((renewed, 1), (signed, 1), (revoked, 1)):
        origin = tmp_path / f"before-{action.__name__}"
        shutil.copytree(folder.path, origin)
        count = len(authority.index.events)
        for nth in range(200):
            shutil.rmtree(folder.path)
            shutil.copytree(origin, folder.path)
            killed = kill_at(action, folder.path, nth)
            if killed:
                action()
            # A renewal that was complete but for its exit is done once more; nothing else is ever doubled.
            more = len(authority.index.events) - count
            again = action is renewed and killed and more == 2
            assert more == events or again, (action.__name__, nth, more)
            assert revoked_serials(authority) == {int(each, 16) for each in authority.index.revoked()}
            if not killed:
                assert nth > 4
                break
        else:
            pytest.fail("it never ended")
    assert admitted_key(folder, "north") is None and len(revoked_serials(authority)) == 1


# The commands


def test_the_list_says_who_until_when_and_who_is_out(
    federation: tuple[FederationFolder, Authority], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = federation
    at = ["--federation", str(folder.path)]
    site = join(folder, "north", tmp_path)
    admit_key(folder, "north", site / "node.pub")
    assert run(["certificates", "sign", "north", str(site / "client.csr"), *at]) == 0
    assert run(["certificates", "revoke", "north", *at]) == 0
    capsys.readouterr()
    assert run(["certificates", "list", *at, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(each["role"], each["name"]) for each in listed["certificates"]] == [
        ("ca", "lungs"),
        ("server", "server.example"),
        ("client", "north"),
    ]
    assert [each["state"].split()[0] for each in listed["certificates"]] == ["valid", "valid", "revoked"]
    assert [each["state"].split()[0] for each in listed["sites"]] == ["revoked", "not"]
    assert run(["certificates", "list", *at]) == 0
    shown = capsys.readouterr().out
    assert all(each["serial"][:16] in shown for each in listed["certificates"])
    assert run(["certificates", "revoke", "west", *at]) == 2
    assert "there is no site 'west'" in capsys.readouterr().err


def test_two_commands_do_not_write_at_once(
    federation: tuple[FederationFolder, Authority], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = federation
    with locked(folder.path):
        with refuses(OutputError, "folder-busy", where=str(folder.path)):
            provision(write_config(tmp_path, mutual_tls=True), folder.path)
        assert run(["certificates", "revoke", "north", "--federation", str(folder.path)]) == 2
    assert revocation(folder, "north") is None
    assert "another command" in capsys.readouterr().err


def test_the_only_federation_needs_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUORATE_HOME", str(tmp_path / "home"))
    assert run(["certificates", "list"]) == 2
    provision(write_config(tmp_path))
    assert run(["certificates", "list"]) == 0
    provision(write_config(tmp_path, name="hearts"))
    capsys.readouterr()
    assert run(["certificates", "list"]) == 2
    assert "several federations (hearts, lungs)" in capsys.readouterr().err
    assert run(["certificates", "list", "--federation", "hearts"]) == 0


def test_a_node_key_is_what_flower_reads(
    federation: tuple[FederationFolder, Authority], tmp_path: Path
) -> None:
    # The two checks of flwr's `supernode register` and `flower-supernode`, on the same library's functions.
    site = join(federation[0], "north", tmp_path)
    private = pem.load_ssh_private_key((site / "node.key").read_bytes(), None)
    public = pem.load_ssh_public_key((site / "node.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(public, ec.EllipticCurvePublicKey)
    signature = private.sign(b"now", ec.ECDSA(hashes.SHA256()))
    public.verify(signature, b"now", ec.ECDSA(hashes.SHA256()))
    assert node_public_bytes(public, "north") == (site / "node.pub").read_bytes()
