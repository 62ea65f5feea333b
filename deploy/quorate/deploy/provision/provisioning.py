"""`quorate provision`: makes a federation's folder, or completes one.

Everything is made at most once. A step that finds its result there goes on to the next, so that a second call
changes nothing, a call after a kill completes what is missing, and a site that is added later gets its kit
while the others' files stay as they are.
"""

from __future__ import annotations

import secrets
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from quorate.client.node.enrolment import CLIENT_CRT, CLIENT_CSR, CONNECTION, NODE_KEY, NODE_PUB, enrol
from quorate.deploy.provision.authority import DAYS, Authority
from quorate.deploy.provision.issuing import ensure_server, server_hosts, sign_site
from quorate.deploy.provision.kit import KIT, connection_of, kit_files, pack, unpack
from quorate.deploy.provision.node_keys import admit, admitted_key, known_sites, revocation
from quorate.server.federation.folder import FederationConfig, FederationFolder, home
from quorate.shared.config.read import dump_yaml, load_file
from quorate.shared.errors import ConfigError
from quorate.shared.process.files import (
    PRIVATE,
    PRIVATE_FOLDER,
    PUBLIC,
    locked,
    make_folder,
    sync,
    write_atomically,
    writing,
)

CONFIG = "federation.yaml"
SECRET = "superexec.secret"
WARN = timedelta(days=30)
"""A certificate that ends sooner is spoken of."""
_TRIAL_KEYS = "trial-keys"


@dataclass
class Provisioned:
    """What a call did.

    Args:
        folder: the federation.
        config: its configuration.
        made: files that were written.
        notes: what a person should know, a line each.
    """

    folder: FederationFolder
    config: FederationConfig
    made: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def provision(
    file: Path, output: Path | None = None, *, with_keys: bool = False, days: int = DAYS
) -> Provisioned:
    """Make the folder of the federation that `file` describes, or complete it.

    Args:
        output: the folder; when left out QUORATE_HOME/NAME, or `file`'s own if that is a federation's.
        with_keys: for trials: make the sites' keys here, put them into the kits, and admit them.
        days: validity of certificates that are made by this call.
    Raises: ConfigError: the file is wrong, the folder is another federation's, or a part of it is missing
        that cannot be made again. OutputError: the folder cannot be written.
    """
    config = load_file(FederationConfig, file)
    text = file.read_bytes()
    folder = FederationFolder(_choose(file, config, output))
    _check(folder, config)
    fresh = not (folder.path / CONFIG).exists()
    make_folder(folder.path)
    done = Provisioned(folder, config)
    with locked(folder.path):
        if fresh:
            with writing(folder.path):
                folder.path.chmod(PRIVATE_FOLDER)
        if fresh or (folder.path / CONFIG).read_bytes() != text:
            write_atomically(folder.path / CONFIG, text, PUBLIC)
            done.made.append(folder.path / CONFIG)
        authority = Authority(folder, config.name)
        done.made += authority.ensure()
        done.made += ensure_server(folder, authority, days)
        _secret(done)
        make_folder(folder.state)
        make_folder(folder.path / "sites")
        for site in config.sites:
            _site(done, authority, site, with_keys=with_keys, days=days)
        _look_around(done, authority)
    return done


def _choose(file: Path, config: FederationConfig, output: Path | None) -> Path:
    if output is not None:
        return output.absolute()
    beside = file.absolute().parent
    # Someone edits the copy in the folder: a second CA under QUORATE_HOME is not what is meant.
    return beside if file.name == CONFIG and (beside / "ca").is_dir() else home().absolute() / config.name


def _check(folder: FederationFolder, config: FederationConfig) -> None:
    """Raise ConfigError if the folder cannot be this federation's; nothing has been written yet."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is no folder; choose another with -o.")
    if (path / CONFIG).exists():
        theirs = folder.config.name
        if theirs != config.name:
            raise ConfigError(
                f"{path}: holds the federation {theirs!r}, not {config.name!r}; choose another folder (-o)."
            )
    elif path.is_dir() and any(each.name != f".{CONFIG}.tmp" for each in path.iterdir()):
        raise ConfigError(f"{path}: is not empty and holds no federation; choose another folder (-o).")
    for there in known_sites(folder):
        for site in config.sites:
            if site != there and site.casefold() == there.casefold():
                raise ConfigError(
                    f"{path / CONFIG}: the site {site!r} differs from {there!r}, which has a folder here, in "
                    "its case alone; choose another name."
                )


def _secret(done: Provisioned) -> None:
    """Make the secret that SuperLink and superexec share; both read the file's bytes as they are."""
    path = done.folder.server / SECRET
    if not path.exists():
        write_atomically(path, secrets.token_hex(32).encode(), PRIVATE)
        done.made.append(path)


def _site(done: Provisioned, authority: Authority, site: str, *, with_keys: bool, days: int) -> None:
    place = done.folder.site(site)
    make_folder(place)
    path, trial = place / KIT, place / _TRIAL_KEYS
    if not path.exists() and not revocation(done.folder, site):
        keys: dict[str, bytes] = {}
        if with_keys and (trial.is_dir() or admitted_key(done.folder, site) is None):
            keys = _trial_keys(done, authority, site, days)
        elif with_keys:
            done.notes.append(f"{site}: its key was admitted before, so its kit was made without keys")
        ca = authority.certificate
        files = kit_files(done.config, site, ca, keys)
        content = pack(site, files, int(ca.not_valid_before_utc.timestamp()))
        write_atomically(path, content, PRIVATE)
        done.made.append(path)
    elif with_keys and path.exists() and NODE_KEY not in unpack(path, site):
        done.notes.append(f"{site}: its kit was made before, without keys, and stays so")
    _drop(trial)


def _trial_keys(done: Provisioned, authority: Authority, site: str, days: int) -> dict[str, bytes]:
    """Enrol a site here, and admit it; the files lie in a folder of their own until the kit holds them."""
    place = done.folder.site(site) / _TRIAL_KEYS
    make_folder(place)
    write_atomically(place / CONNECTION, dump_yaml(connection_of(done.config, site)).encode())
    enrolment = enrol(place)
    admit(done.folder, site, (place / NODE_PUB).read_bytes(), str(place / NODE_PUB))
    names = [NODE_KEY, NODE_PUB]
    done.made.append(done.folder.site(site) / NODE_PUB)
    keys = {}
    if enrolment.connection.mutual_tls:
        sign_site(done.folder, authority, site, place / CLIENT_CSR, days=days)
        done.made.append(done.folder.site(site) / CLIENT_CRT)
        keys[CLIENT_CRT] = (done.folder.site(site) / CLIENT_CRT).read_bytes()
        names += ["client.key", CLIENT_CSR]
    return {**keys, **{name: (place / name).read_bytes() for name in names}}


def _drop(trial: Path) -> None:
    """Delete the coordinator's loose copy of a site's keys: the kit holds them."""
    if trial.is_dir():
        with writing(trial):
            for each in trial.iterdir():
                each.unlink()
            trial.rmdir()
            sync(trial.parent)


def _look_around(done: Provisioned, authority: Authority) -> None:
    """Note what is not as federation.yaml says, and what a person has to do about it."""
    folder, config = done.folder, done.config
    if (mode := stat.S_IMODE(folder.path.stat().st_mode)) & 0o077:
        done.notes.append(f"{folder.path}: others may look into it (mode {mode:04o}); chmod 700 it")
    certificate = x509.load_pem_x509_certificate((folder.server / "server.crt").read_bytes())
    if missing := server_hosts(config) - _hosts_in(certificate):
        done.notes.append(
            f"the server's certificate lacks {', '.join(sorted(missing))}: quorate certificates renew"
        )
    if (left := certificate.not_valid_after_utc - datetime.now(UTC)) < WARN:
        done.notes.append(
            f"the server's certificate ends in {max(left.days, 0)} days: quorate certificates renew"
        )
    for site in known_sites(folder):
        if site not in config.sites:
            out = (
                "revoked" if revocation(folder, site) else f"not revoked: quorate certificates revoke {site}"
            )
            done.notes.append(f"{site}: is no longer in {CONFIG}; its files are kept, and it is {out}")
            continue
        kit = folder.site(site) / KIT
        if revocation(folder, site):
            done.notes.append(f"{site}: is revoked")
        elif unpack(kit, site).get(CONNECTION) != dump_yaml(connection_of(config, site)).encode():
            done.notes.append(
                f"{site}: its kit has an older {CONNECTION}; delete {kit}, run `quorate provision` again and "
                f"send the site the new {CONNECTION}"
            )


def _hosts_in(certificate: x509.Certificate) -> set[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}
