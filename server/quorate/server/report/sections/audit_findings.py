"""What attacks on the result found, beside what was claimed: audit.json, where `quorate audit` wrote one."""

from __future__ import annotations

from quorate.server.report.page import Cell, Section, Table
from quorate.server.report.run_files import RunFiles
from quorate.shared.privacy.audit.audit_record import AuditRecord, ClientAudit, MembershipAudit, TokenLeak
from quorate.shared.privacy.audit.membership_inference import LOW_FPR, Attack
from quorate.shared.privacy.rounding import at_least, at_most, delta_shown


def audit_section(files: RunFiles) -> Section:
    """Show the audit; a section without blocks where there is none."""
    section = Section("audit", "What attacks on it found")
    record = files.audit
    if record is None:
        return section
    who = "all sites' rows, as a simulation does" if record.held_by == "simulation" else "one site's rows"
    section.say(
        f"Somebody who holds {who}, attacked the result. What an attack achieves says how much is given away "
        "at least. It proves no claim: an attack that fails may have been a weak one."
    )
    if record.config_hash != files.config.content_hash:
        section.say("This audit is of another configuration than the run's; audit the run again.", "note")
    for what in record.refuted:
        section.say(f"A claim is refuted. {what}.", "note")
    if record.mechanism:
        section.blocks.append(_mechanism(record))
    if record.client is not None:
        section.blocks.append(_client(record.client))
    if record.membership is not None:
        section.blocks.append(_membership(record.membership))
    if record.token_leaks:
        section.blocks.append(_token_leaks(record.token_leaks))
    for why in record.left_out:
        section.say(f"Not tried. {why[:1].upper()}{why[1:]}.")
    return section


def _mechanism(record: AuditRecord) -> Table:
    rows = [
        [
            Cell(each.site),
            Cell(at_most(each.claim.epsilon)),
            Cell(at_least(each.epsilon_at_least), "bad" if each.refuted else ""),
            Cell(f"{each.confidence:.1%}"),
            Cell(f"{each.guesses.right} of {each.guesses.made}"),
            Cell(f"{each.guesses.canaries}"),
        ]
        for each in record.mechanism
    ]
    return Table(
        "Does private training do what it claims?",
        ["Site", "Epsilon claimed", "Epsilon at least", "Confidence", "Guesses right", "Canaries"],
        rows,
        hint="Made-up units were put in by coin flips, and guessed from every noisy sum of gradients.",
    )


def _client(found: ClientAudit) -> Table:
    rows = [
        [
            Cell(at_most(found.epsilon), small=f"delta {delta_shown(found.delta)}"),
            Cell(at_least(found.epsilon_at_least), "bad" if found.refuted else ""),
            Cell(f"{found.confidence:.1%}"),
            Cell(at_most(found.epsilon_estimated)),
            Cell(f"{found.cosine * found.values**0.5:.2f}"),
            Cell(f"{found.canaries}"),
        ]
    ]
    head = ["Epsilon claimed", "Epsilon at least", "Confidence", "Epsilon estimated", "Shift", "Canary sites"]
    return Table(
        "Does the noise of the server hide a site?",
        head,
        rows,
        hint="The run once more, with made-up sites that always send the same direction. The shift is how "
        "far their median is from directions that nobody sent, in standard deviations of those.",
    )


def _token_leaks(found: tuple[TokenLeak, ...]) -> Table:
    rows = []
    for each in found:
        attack = each.attack
        rows.append(
            [
                Cell(each.site),
                _area(attack),
                Cell(f"{each.auc_before:.3f}"),
                Cell(f"{attack.tpr_at_low_fpr:.1%}"),
                Cell(f"{attack.members} of {attack.members + attack.others}"),
            ]
        )
    return Table(
        "Does an update show which words it was trained on?",
        ["Site", "Area under the ROC curve", "Before training", "Found at 1% false positives", "Tokens"],
        rows,
        hint=f"Tokens of the training rows against others, by their distance to what A moved by in round "
        f"{found[0].round}. An area well above that before training is a leak.",
    )


def _area(attack: Attack) -> Cell:
    low, high = attack.auc_interval
    return Cell(f"{attack.auc:.3f}", small=f"{low:.3f} to {high:.3f}")


def _membership(found: MembershipAudit) -> Table:
    attack = found.attack
    allowed = found.allowed_tpr
    rows = [
        [
            Cell("Area under the ROC curve"),
            _area(attack),
            Cell("0.500"),
            Cell(""),
        ],
        [
            Cell(f"Training rows found at {LOW_FPR:.0%} false positives"),
            Cell(
                f"{attack.tpr_at_low_fpr:.1%}",
                "bad" if found.refuted else "",
                small=f"{attack.tpr_interval[0]:.1%} to {attack.tpr_interval[1]:.1%}",
            ),
            Cell(f"{LOW_FPR:.1%}"),
            Cell("" if allowed is None else f"{allowed:.1%}"),
        ],
    ]
    return Table(
        "Can training rows be told from others?",
        ["", "Found", "By guessing", "The claim allows"],
        rows,
        hint=f"{attack.members:,} training rows and {attack.others:,} others, by the released adapter and "
        f"{found.references} that the attacker trained.",
    )
