"""What must be right before a site starts, and what to do where it is not: `quorate site check`."""

from __future__ import annotations

import datetime
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

import quorate.client
from quorate.client.node.access import Access
from quorate.client.node.folder import SITE_YAML, SiteFolder, local_data
from quorate.client.node.owners import Account, accounts
from quorate.client.node.server_check import check_server
from quorate.client.node.site_file import check_process
from quorate.shared.config.base import ConfigModel
from quorate.shared.errors import ConfigError, DataError, ModelError, QuorateError

if TYPE_CHECKING:
    from quorate.client.ledger_rows import Reservation

_SOON_DAYS = 30


class Line(ConfigModel):
    """One thing that was looked at."""

    what: str
    """Its name."""
    ok: bool
    """Whether it is right."""
    found: str
    """What was found; where it is not right, what to do as well."""


def check(folder: Path, run_path: Path | None = None) -> list[Line]:
    """Look at everything a site needs. Reads data and models, trains nothing, changes nothing.

    Args:
        folder: the unpacked start-up kit.
        run_path: a run file that the site is to take part in; its labels, policy and model are checked too.
    Raises: ConfigError: the folder is no kit.
    """
    site = SiteFolder.find(folder)
    lines = [
        _line("connection.yaml", lambda: _connection(site)),
        _line("site.yaml", lambda: _site_file(site)),
    ]
    if all(line.ok for line in lines):
        if site.users is not None:
            lines.append(_line("users", lambda: _users(site)))
        for index in range(len(site.config.models)):
            lines.append(_line(f"models[{index}]", lambda index=index: _model(site, index)))  # type: ignore[misc]
        for alias in site.config.data:
            lines.append(_line(f"data.{alias}", lambda alias=alias: _data(site, alias)))  # type: ignore[misc]
        lines.append(_line("ledger", lambda: _ledger(site)[0]))
        lines.append(_line("site process", lambda: check_process(site)))
        if run_path is not None:
            lines.append(_line(f"run {run_path.name}", lambda: _run(site, run_path)))
    lines.append(_line("node.key", lambda: _node_key(site)))
    lines.append(_line("ca.crt", lambda: _certificate(site.ca, "ask the coordinator for a new start-up kit")))
    if lines[0].ok and site.connection.mutual_tls:
        lines.append(_line("client.crt", lambda: _client_certificate(site)))
    if all(line.ok for line in lines if line.what in ("connection.yaml", "ca.crt", "client.crt")):
        lines.append(_line("server", lambda: check_server(site)))
    lines.append(_line("versions", _versions))
    return lines


def _line(what: str, look: Callable[[], str]) -> Line:
    try:
        return Line(what=what, ok=True, found=look())
    except QuorateError as error:
        return Line(what=what, ok=False, found=str(error))
    except OSError as error:
        return Line(
            what=what,
            ok=False,
            found=f"{error.filename}: {error.strerror}; give the command as the folder's owner, or as root.",
        )


def _connection(site: SiteFolder) -> str:
    about = site.connection
    return f"site {about.site} of federation {about.federation}, server {about.server}"


def _site_file(site: SiteFolder) -> str:
    config = site.config
    return f"{len(config.data)} data aliases, {len(config.models)} models, device {config.device}"


def _users(site: SiteFolder) -> str:
    both = accounts(site.users)
    assert both is not None  # asked for where there are some
    own, supernode = both
    python = Path(sys.executable).resolve()
    for user in both:
        for path in (python, Path(quorate.client.__file__)):
            if not Access(user).reads([path])[0]:
                raise ConfigError(
                    f"user {user.name} cannot read {path}; install Python and quorate where every user may "
                    "read them, such as /opt/quorate."
                )
    for alias, path in local_data(site).items():
        if path.resolve().is_relative_to(site.path):
            continue  # `site start` gives it to the site's user alone
        if not all(Access(own).reads_tree(path)):
            raise DataError(
                f"data.{alias}: user {own.name} cannot read {path}; allow it with "
                f"`chown -R {own.name} {path}`."
            )
        if any(Access(supernode).reads_tree(path)):
            raise ConfigError(
                f"data.{alias}: user {supernode.name}, which talks to the coordinator, can read {path}; "
                f"forbid it with `chmod -R go-rwx {path}`."
            )
    _models_are_readable(site, own)
    return f"{own.name} for the data, {supernode.name} for Flower"


def _models_are_readable(site: SiteFolder, own: Account) -> None:
    from quorate.client.base_models import find

    for model in site.config.models:
        folder = find(model.path, site.path)
        if not all(Access(own).reads_tree(folder)):
            raise ModelError(
                f"models: user {own.name} cannot read {folder}; allow it with `chmod -R a+rX {folder}`, and "
                "the folders above it with `chmod a+x`."
            )


def _model(site: SiteFolder, index: int) -> str:
    from quorate.client.base_models import find
    from quorate.shared.base_model import hash_files
    from quorate.shared.weights import check_files, weights_sha256

    model = site.config.models[index]
    folder = find(model.path, site.path)
    files = hash_files(folder)
    found = weights_sha256(files, folder)
    check_files(folder, files)
    if found != model.sha256:
        raise ModelError(
            f"{folder}: its weights have sha256 {found}, {SITE_YAML} says {model.sha256}; get the right "
            "model, or correct the hash if this one is meant."
        )
    return f"{folder}, sha256 {found[:12]}... as it should be"


def _data(site: SiteFolder, alias: str) -> str:
    from quorate.client.readers import read_source

    source = site.config.data[alias]
    try:
        splits = read_source(source, site.path)
    except DataError as error:
        # Which column holds images, the run file says; a folder of images is none of rows without it.
        try:
            splits = read_source(source, site.path, ["image"])
        except DataError:
            raise error from None
    return ", ".join(f"{split} {len(rows)} rows" for split, rows in splits.items())


def _ledger(site: SiteFolder) -> tuple[str, list[Reservation]]:
    """Check the privacy ledger; return what was found, and what was spent."""
    from quorate.client import ledger

    ledger.check_anchor(site)
    verdict = ledger.verify_of(site)
    ledger.check(verdict.findings)
    budgets = len(site.config.policy.privacy_budgets)
    found = f"{budgets} privacy budgets; {len(verdict.rows)} rows in the ledger, head {verdict.head}"
    return found, ledger.reservations(verdict.rows)


def _run(site: SiteFolder, run_path: Path) -> str:
    """Hold a run file against policy, data, models and privacy budgets as the site process will."""
    from quorate.client.budgets import Budgets
    from quorate.client.policy import admit
    from quorate.client.serve import AtSite
    from quorate.shared.config.load import load_run
    from quorate.shared.config.privacy import SitePrivacy
    from quorate.shared.messages import RequestHeader, RoundRequest
    from quorate.shared.privacy.accounting import epsilon

    run = load_run(run_path)
    header = RequestHeader(
        run_id="check",
        round=0,
        phase="join",
        site=site.connection.site,
        run_config=run.canonical_json(),
        config_hash=run.content_hash,
    )
    policy = site.config.policy.model_copy(update={"approve_each_run": False})  # nobody asks for it yet
    config = site.config.model_copy(update={"policy": policy})
    admit(run, RoundRequest(header), config, site.state)
    at_site = AtSite(site)
    at_site.at_hand(run)
    rows = at_site.rows(run, site.connection.site)
    budgets = Budgets(site.config, site.path, epsilon)
    budgets.admit(run)
    if isinstance(run.privacy, SitePrivacy):
        spending, (_, entries) = at_site.spending(run), _ledger(site)
        budgets.check(spending, entries, spending.over(spending.rounds))
    counts = ", ".join(f"{split} {len(each)}" for split, each in rows.items())
    later = "; a person must approve it when it begins" if site.config.policy.approve_each_run else ""
    return f"{run.name}: allowed, its labels and columns are there ({counts} rows){later}"


def _node_key(site: SiteFolder) -> str:
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    again = f"`quorate site enrol {site.path}`"
    if not site.node_key.is_file():
        raise ConfigError(f"{site.node_key} is missing; make it with {again}.")
    mode = stat.S_IMODE(site.node_key.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{site.node_key}: others may read it (mode {mode:03o}); give `chmod 600 {site.node_key}`, and "
            f"make a new one with {again} --renew if anybody did."
        )
    try:
        load_ssh_private_key(site.node_key.read_bytes(), None)
    except ValueError as error:
        raise ConfigError(f"{site.node_key}: is no private key; make one with {again}.") from error
    return "private to its owner"


def _certificate(path: Path, remedy: str) -> str:
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {remedy}.")
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: is no certificate; {remedy}.") from error
    now = datetime.datetime.now(datetime.UTC)
    until = certificate.not_valid_after_utc
    if until < now or certificate.not_valid_before_utc > now:
        raise ConfigError(
            f"{path}: is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to {until:%Y-%m-%d} alone; "
            f"{remedy}, or set this machine's clock right."
        )
    soon = ", soon: ask the coordinator to renew it" if (until - now).days < _SOON_DAYS else ""
    return f"valid until {until:%Y-%m-%d}{soon}"


def _client_certificate(site: SiteFolder) -> str:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from quorate.client.node.forward import NEEDED
    from quorate.shared.loopback import find_nginx

    found = _certificate(site.client_crt, "send client.csr to the coordinator, who sends it back signed")
    certificate = x509.load_pem_x509_certificate(site.client_crt.read_bytes())
    key = load_pem_private_key(site.client_key.read_bytes(), None)
    if certificate.public_key() != key.public_key():
        raise ConfigError(
            f"{site.client_crt}: belongs to another key than {site.client_key}; send client.csr to the "
            "coordinator again."
        )
    # The server answers a certificate that comes with another site's node key with 403, for ever.
    about, names = site.connection, _names(certificate)
    if f"quorate:{about.federation}/{about.site}" not in names:
        raise ConfigError(
            f"{site.client_crt}: is that of {' '.join(names) or 'nobody'}, and the server takes the node key "
            f"of {about.site} with this site's own certificate alone; put the client.crt and client.key of "
            "this site here, or send client.csr to the coordinator again."
        )
    find_nginx(NEEDED)
    return found


def _names(certificate: x509.Certificate) -> list[str]:
    """Return what the federation's authority calls the holder: quorate:FEDERATION/SITE."""
    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return alternative.value.get_values_for_type(x509.UniformResourceIdentifier)


def _versions() -> str:
    from importlib.metadata import version

    from quorate.shared.versions import versions

    return ", ".join(f"{name} {each}" for name, each in {**versions(), "flwr": version("flwr")}.items())
