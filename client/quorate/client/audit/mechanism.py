"""Does the sites' private training keep its claim? The one-run audit with canaries, on the sites' own rows.

A site trains as in the run, alone, for all rounds, with canaries beside its rows; a coin decides for each
whether it is in. The auditor sees every noisy sum, which is more than the coordinator does; the claim covers
that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quorate.client.audit.shadow_models import Shadow
from quorate.client.privacy.units import plan_of
from quorate.client.trainer.dp.canaries import Canaries
from quorate.shared.adapters.selection import moving
from quorate.shared.errors import ConfigError
from quorate.shared.privacy.audit.audit_record import MechanismAudit
from quorate.shared.privacy.audit.one_run import guess, lower_bound
from quorate.shared.progress import OnStep, ignore_step
from quorate.shared.seeds import rng
from quorate.shared.tasks.task import Row

GUESSED = 0.4
"""Share of the canaries that are guessed: the clearest, half of each kind; settled before any is seen."""


def audit_mechanism(
    shadow: Shadow,
    rows: Mapping[str, Sequence[Row]],
    *,
    canaries: int,
    confidence: float,
    on_step: OnStep = ignore_step,
) -> tuple[MechanismAudit, ...]:
    """Audit the private training of sites, in shared passes.

    Args:
        rows: site -> its training rows.
        canaries: how many at each site; more make the bound sharper.
        confidence: of each bound.
    Raises: ConfigError: the run has no record- or group-level privacy, or too few numbers are trained.
    """
    run = shadow.run
    moved = moving(run, shadow.model.initial, 1)
    shapes = {name: shape for name, shape in shadow.model.initial.schema.items() if name in moved}
    claims, planted = {}, {}
    for site, each in rows.items():
        plan = plan_of(run, site, each)
        if plan is None:
            message = "privacy: the run claims no record- or group-level privacy to be audited."
            raise ConfigError(message, kind="no-claim")
        claims[site] = plan.claim()
        try:
            planted[site] = Canaries.draw(shapes, canaries, rng(run.seed, "audit-canaries", site))
        except ValueError as error:
            raise ConfigError(f"canaries: {error} that the run trains; ask for fewer.") from error
    shadow.train(rows, on_step, planted)
    guesses = {
        site: guess(each.scores, each.included, round(GUESSED * canaries)) for site, each in planted.items()
    }
    return tuple(
        MechanismAudit(
            site=site,
            claim=claim,
            guesses=guesses[site],
            confidence=confidence,
            epsilon_at_least=lower_bound(guesses[site], claim.delta, confidence),
        )
        for site, claim in claims.items()
    )
