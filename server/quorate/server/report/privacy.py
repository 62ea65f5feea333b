"""What differential privacy was added, and what may be claimed of it."""

from __future__ import annotations

from quorate.server.records import ClientClaim
from quorate.server.report.files import RunFiles
from quorate.server.report.page import Cell, Section, Table

USELESS = 1.0
"""From this noise on the mean over the clipping norm, noise moves the adapter further than all sites can."""


def privacy_section(files: RunFiles) -> Section:
    """State the claim, what it covers and what it does not."""
    section = Section("privacy", "Privacy")
    claim = files.summary.client_privacy if files.summary else None
    if claim is not None:
        _client(section, claim)
    return section


def claim_in_words(claim: ClientClaim) -> str:
    """Return the claim in one paragraph, for whoever has the adapter alone."""
    return (
        f"Site-level differential privacy: this adapter is ({claim.epsilon:.3g}, {claim.delta:g})-"
        "differentially private for adding or removing all data of one site, if the coordinator added the "
        "noise it says it did. That does not cover the figures on this page, which hold no noise, nor the "
        "choice of settings in earlier runs on the same data."
    )


def _client(section: Section, claim: ClientClaim) -> None:
    section.say(claim_in_words(claim))
    if claim.noise_on_mean > USELESS:
        section.say(
            f"The noise on the mean update was {claim.noise_on_mean:.3g} times the clipping norm: it moved "
            "the adapter further than all sites together could. More sites in a round, fewer trained values "
            "or another unit (privacy.unit: record) would mend that.",
            "note",
        )
    facts = [
        ("Unit", "a site, with all its data"),
        ("Epsilon, spent", f"{claim.epsilon:.4g}"),
        ("Epsilon, if all rounds are run", f"{claim.planned_epsilon:.4g}"),
        ("Delta", f"{claim.delta:g}"),
        ("Noise multiplier of a round", f"{claim.noise_multiplier:.4g}"),
        ("Noise multiplier of the sum of updates", f"{claim.sum_multiplier:.4g}"),
        ("Clipping norm of the last round", f"{claim.clipping_norm:.4g}" if claim.clipping_norm else "none"),
        ("Noise on the mean update, in clipping norms", f"{claim.noise_on_mean:.3g}"),
        ("Values that move", f"{claim.values:,}"),
        ("Sites", f"{claim.sites:,}"),
        ("Sites expected in a round", f"{claim.expected_cohort:.4g}"),
        ("Who took part is hidden, and counted as such", "yes" if claim.participation_hidden else "no"),
    ]
    rows = [[Cell(what), Cell(value)] for what, value in facts]
    section.blocks.append(Table("The mechanism", ["What", "Value"], rows, words=(1,)))
    events = [
        [f"{event.steps:,}", f"{event.sampling_probability:.4g}", f"{event.noise_multiplier:.4g}"]
        for event in claim.events
    ]
    if events:
        columns = ["Releases", "Chance to be in one", "Noise multiplier"]
        hint = (
            "Poisson-subsampled Gaussian mechanisms, add or remove one site; any accountant can check them."
        )
        section.blocks.append(Table("What epsilon was computed from", columns, events, hint=hint))
    if claim.participation_hidden:
        section.say(
            "Sampling counts as amplification because nobody but the coordinator knows who took part. This "
            "page names them: it is not for those from whom participation is hidden.",
            "note",
        )
