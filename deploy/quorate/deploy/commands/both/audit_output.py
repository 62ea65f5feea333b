"""What both commands that audit have in common: their options, and printing what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quorate.deploy.commands.both.options import print_json
from quorate.deploy.terminal import print_table
from quorate.shared.privacy.rounding import at_least, at_most

if TYPE_CHECKING:
    from quorate.shared.privacy.audit.audit_record import AuditRecord


def _number(flag: str, what: str) -> Any:
    return typer.Option(flag, metavar="N", min=0, help=what)


CanariesOption = Annotated[
    int,
    _number("--canaries", "Canaries at each site, or canary sites; 0 leaves what the noise claims alone."),
]
ReferencesOption = Annotated[
    int, _number("--reference-pairs", "Pairs of adapters that the membership attack trains; 0 leaves it out.")
]
TokensOption = Annotated[
    int,
    _number("--tokens", "Most tokens of each kind that the token-leak check tells apart; 0 leaves it out."),
]
ConfidenceOption = Annotated[
    float, typer.Option("--confidence", metavar="P", min=0.5, max=0.9999999, help="Of the bound on epsilon.")
]


def print_audit(record: AuditRecord, *, as_json: bool) -> None:
    """Print an audit, as tables or as one JSON object. Exits with code 1 where it refutes a claim."""
    if as_json:
        print_json({**record.model_dump(mode="json"), "refuted": list(record.refuted)})
    else:
        _print_tables(record)
    for what in record.refuted:
        typer.echo(f"REFUTED: {what}", err=as_json)
    if record.refuted:
        raise typer.Exit(1)


def _print_tables(record: AuditRecord) -> None:
    if record.mechanism:
        rows = [
            (
                each.site,
                at_most(each.claim.epsilon),
                at_least(each.epsilon_at_least),
                f"{each.confidence:.1%}",
                f"{each.guesses.right} of {each.guesses.made}",
            )
            for each in record.mechanism
        ]
        print_table(("site", "claimed epsilon", "at least", "confidence", "guesses right"), rows)
    if (client := record.client) is not None:
        typer.echo(
            f"site-level privacy: epsilon {at_most(client.epsilon)} claimed; by {client.canaries} canary "
            f"sites {at_most(client.epsilon_estimated)} estimated, and {at_least(client.epsilon_at_least)} "
            f"at least with {client.confidence:.1%} confidence"
        )
    if record.membership is not None:
        attack, allowed = record.membership.attack, record.membership.allowed_tpr
        low, high = attack.auc_interval
        typer.echo(f"membership attack: AUC {attack.auc:.3f} ({low:.3f} to {high:.3f}); 0.5 is guessing")
        low, high = attack.tpr_interval
        claimed = "" if allowed is None else f"; the claim allows {allowed:.1%}"
        typer.echo(
            f"training rows found at 1 % false positives: {attack.tpr_at_low_fpr:.1%} ({low:.1%} to "
            f"{high:.1%}){claimed}"
        )
    for leak in record.token_leaks:
        low, high = leak.attack.auc_interval
        typer.echo(
            f"{leak.site}: words of its rows in its update of round {leak.round}: AUC {leak.attack.auc:.3f} "
            f"({low:.3f} to {high:.3f}); {leak.auc_before:.3f} before training"
        )
    for why in record.left_out:
        typer.echo(f"not tried: {why}")
    if not record.refuted:
        claims = record.mechanism or record.client
        typer.echo("nothing refutes the claim" if claims else "no claim of privacy was tried")
