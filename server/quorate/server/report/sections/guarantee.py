"""What differential privacy was added, and what may be claimed of it."""

from __future__ import annotations

from collections.abc import Mapping

from quorate.server.report.page import Cell, Section, Table
from quorate.server.report.run_files import RunFiles
from quorate.server.tracking.records import USELESS, ClientClaim, Summary
from quorate.shared.privacy.claim import PrivacyClaim
from quorate.shared.privacy.rounding import at_least, at_most, delta_shown


def privacy_section(files: RunFiles) -> Section:
    """State the claim, what it covers and what it does not."""
    section = Section("privacy", "Privacy")
    summary = files.summary
    if summary is None:
        return section
    claims = site_claims(summary)
    if summary.client_privacy is not None:
        _client(section, summary.client_privacy)
    if claims:
        _sites(section, claims)
        _beside_the_claim(section, files, summary)
    if claims or summary.client_privacy is not None:
        _references(section, summary)
        _audited(section, files)
    return section


def site_claims(summary: Summary) -> dict[str, PrivacyClaim]:
    """Return site -> what it claims for its records or groups; empty in a run without such privacy."""
    return {site: said.privacy for site, said in sorted(summary.sites.items()) if said.privacy}


def claim_in_words(summary: Summary) -> str:
    """Return what is claimed in one paragraph, for whoever has the adapter alone; nothing without a claim."""
    if summary.client_privacy is not None:
        return _client_in_words(summary.client_privacy)
    claims = site_claims(summary)
    return _sites_in_words(claims) if claims else ""


def _sites_in_words(claims: Mapping[str, PrivacyClaim]) -> str:
    """Return the weakest of the sites' claims: it holds for all."""
    weakest = max(claims.values(), key=lambda claim: claim.epsilon)
    unit = "training row" if weakest.unit == "record" else "group of training rows, such as a patient"
    delta = max(claim.delta for claim in claims.values())
    return (
        f"Differential privacy at the sites: for replacing one {unit} of a site by an empty one, the "
        f"updates of all rounds, and so this adapter, are ({at_most(weakest.epsilon)}, "
        f"{delta_shown(delta)})-differentially private, if each site added the noise it says it did. How "
        "many there are is public, and noise, sampling and steps follow from it. That does not cover the "
        "numbers of rows, any figures on validation and test rows, which hold no noise, nor earlier runs "
        "and choices of settings on the same data; and it holds for each site by itself, so whoever has "
        "rows at two sites is covered by the sum."
    )


def _sites(section: Section, claims: Mapping[str, PrivacyClaim]) -> None:
    """What sites claim for their records or groups."""
    first = next(iter(claims.values()))
    unit = "training row" if first.unit == "record" else "group (all training rows that share a value)"
    section.say(_sites_in_words(claims))
    section.say(
        "In plain words: whoever sees all that training sent from a site can hardly tell whether any one "
        f"{unit} was there. The smaller epsilon, the harder; 1 is strong, 8 is common in practice, and from "
        "about 10 on little is promised. Delta is the chance that the promise fails outright."
    )
    rows = [
        [
            site,
            f"{claim.units:,}",
            at_most(claim.epsilon),
            delta_shown(claim.delta),
            f"{claim.noise_multiplier:.4g}",
            f"{claim.sampling_probability:.4g}",
            f"{claim.steps:,}",
            f"{claim.clipping_norm:g}",
        ]
        for site, claim in claims.items()
    ]
    columns = ["Site", f"{first.unit.capitalize()}s", "Epsilon", "Delta", "Noise multiplier"]
    columns += ["Chance to be in a step", "Steps", "Clipping norm"]
    hint = (
        "Before round 1 each site says what all rounds will cost: Poisson-subsampled Gaussian mechanisms, by "
        f"{first.accountant}. Neighbours differ in one {first.unit}, an empty one in its place (add or "
        "remove, at a public number of units). Any accountant can check the figures."
    )
    section.blocks.append(Table("What each site claims", columns, rows, hint=hint))
    section.say(
        "Under this privacy a site sends no label counts, no notes on its rows, no training loss and no "
        "gradient norms. It still sends how many rows it has and, unless evaluation.share_outcomes is false, "
        "figures on validation and test rows. What a data set has spent over several runs stands in the "
        "site's ledger (`quorate site ledger show`).",
        "muted",
    )


def _beside_the_claim(section: Section, files: RunFiles, summary: Summary) -> None:
    """What the claim leaves out."""
    largest = max(site_claims(summary).values(), key=lambda claim: claim.epsilon)
    shared = files.config.evaluation.share_outcomes
    measured = (
        "exact figures on validation and test rows, which the sites send"
        if shared
        else "(nothing on validation and test rows: the sites sent no figures on them)"
    )
    section.say(
        f"The largest epsilon of a site is {at_most(largest.epsilon)}. Covered: every update a site sent, "
        "and so the adapter of every round and whatever is made from it. Not covered: how many rows a site "
        f"has, the names of the labels, {measured}, and choosing settings by runs on the same data, each of "
        "which costs privacy of its own. A person with several records has less protection by the record "
        "than stands here; a group (privacy.unit: group) protects all of a person's records at one site."
    )


def _references(section: Section, summary: Summary) -> None:
    """That reference runs are without privacy, where there are any."""
    if summary.references is not None:
        section.say(
            "The reference runs (local only, centralised) of this simulation are not covered: they used the "
            "same rows without any noise, and figures of theirs stand on this page.",
            "note",
        )


def _audited(section: Section, files: RunFiles) -> None:
    """What an audit shows of the claim, in a sentence."""
    audit = files.audit
    if audit is None:
        section.say("Nobody has audited this run (`quorate audit OUTPUT_FOLDER`).", "muted")
    elif audit.mechanism:
        found = max(audit.mechanism, key=lambda each: each.epsilon_at_least)
        section.say(
            f"An audit found epsilon of at least {at_least(found.epsilon_at_least)} at {found.site}, where "
            f"{at_most(found.claim.epsilon)} is claimed (see What attacks on it found)."
        )
    elif audit.client is not None:
        section.say(
            "An audit with canary sites found epsilon of at least "
            f"{at_least(audit.client.epsilon_at_least)}, where {at_most(audit.client.epsilon)} is claimed "
            "(see What attacks on it found)."
        )


def _client_in_words(claim: ClientClaim) -> str:
    return (
        f"Site-level differential privacy: this adapter is ({at_most(claim.epsilon)}, "
        f"{delta_shown(claim.delta)})-differentially private for replacing one site by one that sends "
        "nothing, if the coordinator added the noise it says it did. How many sites there are is public. "
        "That does not cover the figures on this page, which hold no noise, nor the choice of settings in "
        "earlier runs on the same data."
    )


def _client(section: Section, claim: ClientClaim) -> None:
    section.say(_client_in_words(claim))
    if claim.noise_on_mean > USELESS:
        section.say(
            f"The noise on the mean update was {claim.noise_on_mean:.3g} times the clipping norm: it moved "
            "the adapter further than all sites together could. More sites in a round, fewer trained values "
            "or another unit (privacy.unit: record) would mend that.",
            "note",
        )
    facts = [
        ("Unit", "a site, with all its data"),
        ("Epsilon, spent", at_most(claim.epsilon, 4)),
        ("Epsilon, if all rounds are run", at_most(claim.planned_epsilon, 4)),
        ("Delta", delta_shown(claim.delta)),
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
            "Poisson-subsampled Gaussian mechanisms, add or remove one site at a public number of sites; any "
            "accountant can check them."
        )
        section.blocks.append(Table("What epsilon was computed from", columns, events, hint=hint))
    if claim.participation_hidden:
        section.say(
            "Sampling counts as amplification because nobody but the coordinator knows who took part. This "
            "page leaves it out; record.jsonl, metrics.jsonl and the checkpoints say it, and are the "
            "coordinator's alone (mode 600).",
            "note",
        )
