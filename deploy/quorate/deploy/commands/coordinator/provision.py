"""`quorate provision`: from `federation.yaml` to a CA, the server's certificate and one kit per site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quorate.deploy.commands.both.options import JsonOption, output_option, print_json

DaysOption = Annotated[
    int, typer.Option("--days", min=1, max=3650, help="Validity in days of certificates that are made now.")
]


def provision(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="federation.yaml: the server's names, the sites' names.")
    ],
    output: Annotated[
        Path | None, output_option("The federation's folder; ~/.quorate/NAME when left out.")
    ] = None,
    with_keys: Annotated[
        bool,
        typer.Option(
            "--with-keys", help="For trials: make the sites' keys here, put them into the kits, admit them."
        ),
    ] = False,
    days: DaysOption = 365,
    as_json: JsonOption = False,
) -> None:
    """Make a federation's folder: CA, server certificate, secret, and one start-up kit per site.

    Given again it makes what is missing (a site that was added, a step that was interrupted) and touches
    nothing else: no key and no certificate is ever made twice.

    Example: quorate provision federation.yaml
    """
    from quorate.deploy.provision.authority import Authority
    from quorate.deploy.provision.kit import KIT, fingerprint
    from quorate.deploy.provision.provisioning import provision as make

    done = make(file, output, with_keys=with_keys, days=days)
    ca = fingerprint(Authority(done.folder, done.config.name).certificate)
    kits = {site: done.folder.site(site) / KIT for site in done.config.sites}
    if as_json:
        print_json(
            {
                "federation": done.config.name,
                "folder": str(done.folder.path),
                "ca_sha256": ca,
                "made": [str(path) for path in done.made],
                "kits": {site: str(path) for site, path in kits.items()},
                "notes": done.notes,
            }
        )
        return
    typer.echo(f"federation {done.config.name} in {done.folder.path}")
    for path in done.made:
        typer.echo(f"  made {path.relative_to(done.folder.path)}")
    if not done.made:
        typer.echo("  all was there; nothing was changed")
    typer.echo(f"SHA-256 of the CA certificate, to be read to the sites:\n  {ca}")
    for note in done.notes:
        typer.echo(f"note: {note}")
    if any(path in done.made for path in kits.values()):
        typer.echo("Give each site its kit; each README.md says what to do there.")
