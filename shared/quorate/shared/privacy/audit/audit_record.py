"""What an audit of a run found, as it is kept beside the run (`audit.json`)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from quorate.shared.config.config_model import ConfigModel, Sha256
from quorate.shared.privacy.audit.membership_inference import LOW_FPR, Attack
from quorate.shared.privacy.audit.one_run import Guesses
from quorate.shared.privacy.claim import PrivacyClaim
from quorate.shared.privacy.rounding import at_least, at_most

AUDIT_FILE = "audit.json"


class MechanismAudit(ConfigModel):
    """The one-run audit of a site's private training, by canaries whose noisy sums the auditor sees."""

    site: str
    claim: PrivacyClaim
    guesses: Guesses
    confidence: float = Field(gt=0, lt=1)
    """Of the bound."""
    epsilon_at_least: float = Field(ge=0)
    """Smaller epsilons are refuted with that confidence."""

    @property
    def refuted(self) -> bool:
        """Whether the claim is."""
        return self.epsilon_at_least > self.claim.epsilon


class MembershipAudit(ConfigModel):
    """The attack on the released adapter."""

    references: int = Field(ge=1)
    """Adapters that the attacker trained."""
    attack: Attack
    """What it achieved."""
    epsilon: float | None = None
    """The largest claim among the sites whose rows were attacked; None where one claims nothing."""
    delta: float = 0.0
    """The largest delta of those claims."""

    @property
    def allowed_tpr(self) -> float | None:
        """The largest true-positive rate at LOW_FPR that the claim allows; None without a claim."""
        if self.epsilon is None:
            return None
        return min(1.0, math.exp(min(self.epsilon, 50.0)) * LOW_FPR + self.delta)

    @property
    def refuted(self) -> bool:
        """Whether the attack finds more rows than the claim allows, beyond its interval."""
        return self.allowed_tpr is not None and self.attack.tpr_interval[0] > self.allowed_tpr


class ClientAudit(ConfigModel):
    """The one-shot audit of site-level privacy: the run once more, with canary sites beside its own."""

    epsilon: float = Field(ge=0)
    """Claimed of the run with the canaries in it."""
    delta: float = Field(gt=0, lt=1)
    canaries: int = Field(ge=2)
    """Sites that sent a random direction in every round they were drawn for."""
    values: int = Field(ge=2)
    """Numbers that a direction has."""
    cosine: float
    """Median cosine of the directions with what the run moved the adapter by; 0 is expected of a direction
    that was not sent."""
    epsilon_estimated: float = Field(ge=0)
    """What the cosines look like; an estimate without a confidence."""
    confidence: float = Field(gt=0, lt=1)
    """Of the bound."""
    epsilon_at_least: float = Field(ge=0)
    """Smaller epsilons are refuted with that confidence."""

    @property
    def refuted(self) -> bool:
        """Whether the claim is."""
        return self.epsilon_at_least > self.epsilon


class TokenLeak(ConfigModel):
    """Whether a site's update shows which words it was trained on: the rows of dA and the inputs' vectors."""

    site: str
    """Whose update."""
    round: int = Field(ge=1)
    """Of a training alone, as the coordinator would see it."""
    attack: Attack
    """Telling tokens of the training rows from others of the vocabulary, by their distance to the rows of
    what the first layer's A moved by."""
    auc_before: float = Field(ge=0, le=1)
    """The same by the rows of A before training, which has seen nothing: what common words give by
    themselves."""


class AuditRecord(ConfigModel):
    """An audit of one run."""

    config_hash: Sha256
    """Of the run's configuration."""
    adapter_sha256: Sha256
    """Of the weights that were released."""
    held_by: Literal["simulation", "site"]
    """Who held the rows: all sites' at once, or one site its own."""
    mechanism: tuple[MechanismAudit, ...] = ()
    """One a site, where the run has record- or group-level privacy."""
    client: ClientAudit | None = None
    """Of a simulated run with site-level privacy."""
    membership: MembershipAudit | None = None
    """None where it was left out."""
    token_leaks: tuple[TokenLeak, ...] = ()
    """One a site, where it can be told; `left_out` says why not."""
    left_out: tuple[str, ...] = ()
    """Attacks that do not apply to this run, and why."""

    @property
    def attacks(self) -> int:
        """How many attacks were tried."""
        return (
            len(self.mechanism)
            + len(self.token_leaks)
            + (self.client is not None)
            + (self.membership is not None)
        )

    @property
    def refuted(self) -> tuple[str, ...]:
        """What refutes a claim, in words; empty when nothing does."""
        found = [
            f"{each.site}: epsilon is {at_least(each.epsilon_at_least)} or more with {each.confidence:.1%} "
            f"confidence, and {at_most(each.claim.epsilon)} is claimed"
            for each in self.mechanism
            if each.refuted
        ]
        if self.client is not None and self.client.refuted:
            found.append(
                f"sites: epsilon is {at_least(self.client.epsilon_at_least)} or more with "
                f"{self.client.confidence:.1%} confidence, and {at_most(self.client.epsilon)} is claimed"
            )
        if self.membership is not None and self.membership.refuted:
            found.append(
                f"membership: {self.membership.attack.tpr_at_low_fpr:.1%} of the training rows are found at "
                f"{LOW_FPR:.0%} false positives, and the claim allows {self.membership.allowed_tpr:.1%}"
            )
        return tuple(found)
