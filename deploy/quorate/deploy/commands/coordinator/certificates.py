"""`quorate certificates`: what the federation's CA issued, and renewing, signing and revoking."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quorate.deploy.commands.both.options import JsonOption, group, print_json
from quorate.deploy.commands.coordinator.federation_choice import FederationOption, find_federation
from quorate.deploy.commands.coordinator.provision import DaysOption
from quorate.deploy.terminal import print_table

if TYPE_CHECKING:
    from quorate.deploy.provision.authority import Authority
    from quorate.deploy.provision.certificate_log import Issued
    from quorate.server.federation.folder import FederationFolder

certificates = group(
    "certificates",
    "Certificates and admission of a federation's sites, at the coordinator.",
    "quorate certificates list",
)
SHOWN = 16
"""Digits of serial numbers and hashes in tables; --json has them all."""
SiteArgument = Annotated[str, typer.Argument(metavar="SITE", help="Name of the site.")]


@certificates.command("list")
def list_(federation: FederationOption = None, as_json: JsonOption = False) -> None:
    """List every certificate, and the node key of every site.

    Example: quorate certificates list --federation demo
    """
    folder, authority = _open(federation)
    revoked = authority.index.revoked()
    every = [
        _entry(each, revoked) for role in ("ca", "server", "client") for each in authority.index.issued(role)
    ]
    sites = [_site(folder, site) for site in _sites(folder)]
    if as_json:
        print_json({"certificates": every, "sites": sites})
        return
    rows = (
        (each["name"], each["role"], each["serial"][:SHOWN], each["until"], str(each["days"]), each["state"])
        for each in every
    )
    print_table(("who", "for", "serial", "until", "days left", "state"), rows)
    keys = ((each["site"], each["state"], (each["node_key"] or "")[:SHOWN]) for each in sites)
    print_table(("site", "node key", "SHA-256 of the key"), keys)


@certificates.command("renew")
def renew(
    federation: FederationOption = None,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make a new private key too, as after it may have been seen.")
    ] = False,
    days: DaysOption = 365,
) -> None:
    """Issue the server a new certificate by the same CA, for the names now in federation.yaml.

    The old files stay beside the new ones. Sites need nothing, and a running server takes it over by itself.

    Example: quorate certificates renew --days 365
    """
    from quorate.deploy.provision.issuing import renew_server
    from quorate.shared.process.files import locked
    from quorate.shared.process.supervised import read_status

    folder, authority = _open(federation)
    with locked(folder.path):
        issued = renew_server(folder, authority, new_key_too=new_key, days=days)
    typer.echo(f"{folder.server / 'server.crt'}: serial {issued.serial}, until {issued.not_after:%Y-%m-%d}")
    if read_status(folder.state) is not None:
        typer.echo("The running server takes it over within seconds, and drops no connection.")


@certificates.command("sign")
def sign(
    site: SiteArgument,
    request: Annotated[
        Path, typer.Argument(metavar="CLIENT.CSR", help="The file client.csr that the site sent.")
    ],
    federation: FederationOption = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Sign although the site has a valid certificate already.")
    ] = False,
    days: DaysOption = 365,
) -> None:
    """Sign a site's client certificate (mutual TLS). Be sure that the request comes from the site.

    Example: quorate certificates sign north client.csr
    """
    from quorate.deploy.provision.issuing import sign_site
    from quorate.shared.process.files import locked

    folder, authority = _open(federation)
    with locked(folder.path):
        signed = sign_site(folder, authority, site, request, renew=renew, days=days)
    said = "signed" if signed.new else "was signed before"
    typer.echo(f"{site}: {said}: serial {signed.issued.serial}, until {signed.issued.not_after:%Y-%m-%d}")
    for each in signed.earlier:
        typer.echo(
            f"serial {each.serial} stays valid until {each.not_after:%Y-%m-%d}; once the site uses the new "
            f"one: quorate certificates revoke {site} --serial {each.serial}"
        )
    typer.echo(f"Send the site {signed.path}")


@certificates.command("revoke")
def revoke(
    site: SiteArgument,
    federation: FederationOption = None,
    serial: Annotated[
        str | None,
        typer.Option(
            "--serial",
            metavar="SERIAL",
            help="Revoke this certificate alone (its first digits do); the site stays in.",
        ),
    ] = None,
) -> None:
    """Put a site out: its node key and its client certificates end now and never come back.

    A running server takes notice by itself. The site can be taken back, with new keys: see restore.

    Example: quorate certificates revoke north
    """
    from quorate.deploy.provision.issuing import revoke_site
    from quorate.shared.process.files import locked

    folder, authority = _open(federation)
    with locked(folder.path):
        revoked = revoke_site(folder, authority, site, serial)
    if serial is None:
        typer.echo(f"{site}: revoked; its node key is admitted no more")
    for each in revoked:
        typer.echo(f"{site}: certificate {each.serial} is in {authority.crl_file}")


@certificates.command("restore")
def restore(site: SiteArgument, federation: FederationOption = None) -> None:
    """Let a revoked site have a new node key admitted. Its old keys and certificates stay refused.

    Example: quorate certificates restore north
    """
    from quorate.deploy.provision.node_keys import restore_site
    from quorate.shared.process.files import locked

    folder, _ = _open(federation)
    with locked(folder.path):
        restore_site(folder, site)
    typer.echo(f"{site}: may enrol again: quorate site enrol --renew there, then admit its new node.pub")


def _open(federation: str | None) -> tuple[FederationFolder, Authority]:
    from quorate.deploy.provision.authority import Authority

    folder = find_federation(federation)
    return folder, Authority(folder, folder.config.name)


def _entry(issued: Issued, revoked: dict[str, datetime]) -> dict[str, Any]:
    from quorate.deploy.provision.issuing import days_left

    days = days_left(issued)
    when = revoked.get(issued.serial)
    state = f"revoked {when:%Y-%m-%d}" if when else "valid" if days >= 0 else "ended"
    return {
        "name": issued.name,
        "role": issued.role,
        "serial": issued.serial,
        "until": f"{issued.not_after:%Y-%m-%d}",
        "days": days,
        "state": state,
    }


def _site(folder: FederationFolder, site: str) -> dict[str, Any]:
    from quorate.deploy.provision.node_keys import admitted_key, fingerprint_of, revocation

    key, out = admitted_key(folder, site), revocation(folder, site)
    state = f"revoked {out.time:%Y-%m-%d}" if out else "admitted" if key else "not yet admitted"
    return {"site": site, "state": state, "node_key": fingerprint_of(key) if key else None}


def _sites(folder: FederationFolder) -> list[str]:
    """Return the sites of federation.yaml in its order, then those that are no longer in it."""
    from quorate.deploy.provision.node_keys import known_sites

    sites = folder.config.sites
    return [*sites, *(site for site in known_sites(folder) if site not in sites)]
