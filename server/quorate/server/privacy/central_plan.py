"""What client-level privacy will do in a run, settled before round 1: how much noise, and who is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from quorate.server.privacy.released import ClientPlan, ReleaseLedger
from quorate.server.rounds.cohort import poisson_cohort
from quorate.server.tracking.records import USELESS
from quorate.shared.adapters.adapter import num_values
from quorate.shared.adapters.selection import upload_schema
from quorate.shared.config.privacy_config import ClientPrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError
from quorate.shared.privacy.calibration import calibrate
from quorate.shared.privacy.client_level import count_noise, sum_multiplier


def client_plan(run: RunConfig, names: Collection[str], schema: Mapping[str, tuple[int, ...]]) -> ClientPlan:
    """Settle the noise before anything is trained.

    Args:
        run: with client-level privacy.
        names: the sites that joined.
        schema: name -> shape of the adapter's arrays.
    Raises: ConfigError: delta is too large for so many sites, or the noise asked for cannot be had.
    """
    privacy, sites = run.privacy, len(names)
    assert isinstance(privacy, ClientPrivacy), "only called where it is"
    if privacy.delta * sites >= 1:
        raise ConfigError(
            f"privacy.delta: {privacy.delta:g} is not below 1 / sites ({sites} sites): a mechanism that "
            f"publishes one site whole would pass for private; set at most {0.1 / sites:.1g}.",
            kind="delta-too-large-for-sites",
        )
    wanted = run.federation.sites_per_round
    plan = ClientPlan(
        sites=sites,
        sampling_probability=min(1.0, wanted / sites) if wanted else 1.0,
        noise_multiplier=1.0,
        sum_multiplier=1.0,
        count_deviation=None,
        participation_hidden=privacy.participation_hidden,
        values=num_values(upload_schema(run, schema, 1)),
    )
    z = privacy.noise_multiplier
    if z is None:
        assert privacy.target_epsilon is not None  # ClientPrivacy
        (event,) = plan.events(most_releases(run, ReleaseLedger(plan=plan), names, 1))
        z = calibrate(privacy.target_epsilon, privacy.delta, event.sampling_probability, event.steps)
    if privacy.adaptive_quantile is None:
        return plan.model_copy(update={"noise_multiplier": z, "sum_multiplier": z})
    deviation = count_noise(plan.expected_cohort)
    return plan.model_copy(
        update={
            "noise_multiplier": z,
            "sum_multiplier": sum_multiplier(z, deviation),
            "count_deviation": deviation,
        }
    )


def most_releases(run: RunConfig, ledger: ReleaseLedger, names: Collection[str], first: int) -> int:
    """Return the releases that the site with most of them is part of, by the last round.

    Args:
        run: with client-level privacy.
        ledger: what has been released before.
        first: the next round to be drawn.
    """
    plan, rounds = ledger.plan, range(first, run.federation.rounds + 1)
    if plan.amplified:
        return ledger.releases + len(rounds)
    times = Counter({site: ledger.asked.get(site, 0) for site in {*names, *ledger.asked}})
    for round in rounds:
        times.update(private_cohort(run, plan, names, round))
    # At least one: a run in which nobody is drawn must still have some noise.
    return max(*times.values(), 1)


def private_cohort(run: RunConfig, plan: ClientPlan, names: Collection[str], round: int) -> tuple[str, ...]:
    """Return the sites asked in `round`: each by its own coin, secret where that is to count."""
    seed = None if plan.participation_hidden else run.seed
    return poisson_cohort(names, plan.sampling_probability, round, seed)


def useless(plan: ClientPlan) -> str | None:
    """Return the warning for a cohort that is too small for its noise; None where it is not."""
    if plan.noise_on_mean <= USELESS:
        return None
    return (
        f"privacy: the noise on the mean update is {plan.noise_on_mean:.3g} times the clipping norm (noise "
        f"multiplier {plan.sum_multiplier:.3g}, {plan.values:,} values, {plan.expected_cohort:g} of "
        f"{plan.sites} sites expected in a round), so noise will move the adapter further than all sites "
        "together can. Ask more sites, train fewer values (a lower adapter.r, aggregation ffa, "
        "training.freeze), spend a larger epsilon over fewer rounds, or protect records instead of whole "
        "sites (privacy.unit: record)."
    )
