"""Audit a simulated run from its own folder, with the rows of all its sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from quorate.client.audit.result_audit import Options, audit_result
from quorate.client.models.predictions import check_adapter_dir
from quorate.client.site.data_source import SiteRows
from quorate.client.site.engine import Engine
from quorate.client.site.request import Request
from quorate.client.site.site import Site
from quorate.server.report import write_report
from quorate.server.rounds.loop import Result
from quorate.server.rounds.run import RUN_FILE, Run
from quorate.shared.adapters.adapter import Adapter, num_values
from quorate.shared.adapters.peft_export import ADAPTER_DIR
from quorate.shared.adapters.selection import upload_schema
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.load import load_run
from quorate.shared.config.privacy_config import ClientPrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.privacy.audit.audit_record import AUDIT_FILE, AuditRecord, ClientAudit
from quorate.shared.privacy.audit.one_shot import canaries, cosines, estimate, lower_bound
from quorate.shared.process.files import BY_UMASK, write_atomically
from quorate.shared.progress import OnStep, ignore_step
from quorate.shared.protocol.messages import SiteDescription, Update
from quorate.shared.seeds import rng
from quorate.simulations.in_process_grid import InProcessGrid
from quorate.simulations.provenance import reopen
from quorate.simulations.runner import serve

_BEYOND = 1e6
"""A canary's norm over the first clipping norm: adaptive clipping does not grow to it."""


def audit(
    folder: Path, options: Options, *, site: str | None = None, on_step: OnStep = ignore_step
) -> AuditRecord:
    """Audit the run in `folder`; writes audit.json there, and its report again.

    Args:
        folder: the output folder of a simulated run that is done.
        site: attack this site's rows alone; site-level privacy is always audited with all of them.
    Raises: OutputError, DataError: as `reopen`. AdapterError: there is no adapter yet. ConfigError: no such
        site.
    """
    config, rows, _ = reopen(folder)
    check_adapter_dir(folder / ADAPTER_DIR)
    if site is not None and site not in rows:
        raise ConfigError(f"--site {site}: the run's sites are {', '.join(rows)}; name one of them.")
    chosen = {name: splits for name, splits in rows.items() if site in (None, name)}
    hashed = load_run(folder / RUN_FILE).content_hash
    client = None
    if isinstance(config.privacy, ClientPrivacy) and options.canaries:
        client = audit_clients(
            config, rows, count=options.canaries, confidence=options.confidence, on_step=on_step
        )
    record = audit_result(config, hashed, folder / ADAPTER_DIR, chosen, "simulation", options, on_step)
    record = record.model_copy(update={"client": client})
    write_atomically(folder / AUDIT_FILE, record.model_dump_json(indent=2) + "\n", BY_UMASK)
    write_report(folder)
    return record


class CanarySites:
    """An engine for the sites of a run, and for canaries beside them.

    A canary has no rows: whenever it is asked to train it answers with the same random direction, far beyond
    the clipping norm. Everything else is the run: its sites, its cohorts, the server's own rounds. What the
    run released in the end is what the auditor sees.

    Args:
        engine: answers for the run's own sites.
        canaries: their names.
        run: the run with them.
    """

    def __init__(self, engine: Engine, canaries: tuple[str, ...], run: RunConfig) -> None:
        self._engine = engine
        self._canaries = {name: index for index, name in enumerate(canaries)}
        self._run = run
        self._description: SiteDescription | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (*self._engine.names, *self._canaries)

    def prepare(self, run: RunConfig) -> RunConfig:
        return self._engine.prepare(run)

    def handle_many(self, requests: Sequence[Request]) -> list[Update]:
        own = iter(
            self._engine.handle_many([each for each in requests if each.header.site not in self._canaries])
        )
        return [self._answer(each) if each.header.site in self._canaries else next(own) for each in requests]

    def samples(self, run: RunConfig, states: Sequence[GlobalState]) -> list[list[tuple[str, str]]]:
        return self._engine.samples(run, states)

    def direction(self, name: str, size: int) -> NDArray[np.float64]:
        """Return the direction of a canary, [size], of length 1; the same each time."""
        (drawn,) = canaries(1, size, rng(self._run.seed, "audit-canary-site", self._canaries[name]))
        return np.asarray(drawn, dtype=np.float64)

    def _answer(self, request: Request) -> Update:
        if request.header.phase == "join":
            return self._joined(request)
        if request.header.phase == "start":
            return Update.reply(request, self._as_another(request).arrays)
        if request.header.phase == "fit":
            return Update.reply(request, self._sent(request), num_examples=1, num_steps=1)
        return Update.reply(request, outcomes=Outcomes())

    def _joined(self, request: Request) -> Update:
        """Join as a site of one row does, with the base model and the start that the others have."""
        if self._description is None:  # all canaries are alike
            self._description = self._as_another(request).header.description
        known = self._description
        if known is None:
            raise ConfigError(f"site {self._engine.names[0]} cannot join; see the log for why.")
        description = SiteDescription(
            rows={"train": 1, "validation": 0, "test": 0},
            label_counts=self._run.task.label_counts(()),
            model_files=known.model_files,
            model_sha256=known.model_sha256,
            start_hash=known.start_hash,
            versions=known.versions,
        )
        return Update.reply(request, description=description)

    def _as_another(self, request: Request) -> Update:
        header = request.header.model_copy(update={"site": self._engine.names[0]})
        (answer,) = self._engine.handle_many([Request(request.run, header, request.arrays)])
        return answer

    def _sent(self, request: Request) -> Adapter:
        start = request.state.adapter
        schema = upload_schema(self._run, start.schema, request.header.round)
        flat = self.direction(request.header.site, num_values(schema)) * _norm(self._run)
        sent, at = {}, 0
        for name in sorted(schema):
            size = prod(schema[name])
            sent[name] = (start[name] + flat[at : at + size].reshape(schema[name])).astype(np.float32)
            at += size
        return Adapter(sent)


def audit_clients(
    run: RunConfig,
    rows: Mapping[str, SiteRows],
    *,
    count: int,
    confidence: float,
    on_step: OnStep = ignore_step,
) -> ClientAudit:
    """Audit the site-level privacy of a run by running it again, with canary sites.

    Args:
        run: the run, with site-level privacy.
        rows: site -> split -> rows.
        count: canaries; sites are drawn as often as in the run, so cohorts grow.
    Raises: ConfigError: too few canaries, or more than delta allows sites. QuorumNotMet, BadInput: as a run.
    """
    privacy = run.privacy
    assert isinstance(privacy, ClientPrivacy)
    if count < 2:
        message = "--canaries: an audit of site-level privacy needs 2 or more."
        raise ConfigError(message, kind="too-few-canaries")
    if privacy.delta * (len(rows) + count) >= 1:
        raise ConfigError(
            f"--canaries: with {count} canary sites beside {len(rows)}, privacy.delta {privacy.delta:g} is "
            f"not below 1 / sites; ask for fewer than {round(1 / privacy.delta) - len(rows)}.",
            kind="too-many-canaries",
        )
    prefix = "canary"
    while any(name.startswith(prefix) for name in rows):
        prefix += "-"
    names = tuple(f"{prefix}-{index}" for index in range(count))
    site = Site(rows, on_step=on_step)
    config = site.prepare(_with_canaries(run, len(rows), count))
    engine = CanarySites(site, names, config)
    with TemporaryDirectory(prefix="quorate-audit-") as folder:
        result = serve(InProcessGrid(engine, engine.names), Run.open(config, Path(folder)))
    if result.stopped is not None:
        raise result.stopped
    return _judged(result, config, engine, names, confidence)


def _with_canaries(run: RunConfig, sites: int, count: int) -> RunConfig:
    """Return the run with so many sites more, of which each is drawn as often; nothing is measured."""
    federation = run.federation
    wanted = federation.sites_per_round
    if wanted is not None:
        wanted = round(min(1.0, wanted / sites) * (sites + count))
    return run.model_copy(
        update={
            "federation": federation.model_copy(update={"sites_per_round": wanted}),
            "evaluation": run.evaluation.model_copy(update={"every": federation.rounds}),
        }
    )


def _norm(run: RunConfig) -> float:
    """Return the length of what a canary sends: as far beyond the clipping norm as the run lets pass."""
    assert isinstance(run.privacy, ClientPrivacy)
    most = run.federation.max_update_norm
    far = _BEYOND * run.privacy.clipping_norm
    return (
        far if most is None else min(far, 0.99 * most)
    )  # what float32 rounds must not lift it over the bound


def _judged(
    result: Result, run: RunConfig, engine: CanarySites, names: tuple[str, ...], confidence: float
) -> ClientAudit:
    """Hold what the run moved the adapter by against each canary's direction."""
    claim, start = result.claim, result.members.initial
    assert claim is not None  # the run has site-level privacy
    moved = np.concatenate(
        [
            np.subtract(result.state.adapter[name], start[name], dtype=np.float64).ravel()
            for name in sorted(upload_schema(run, start.schema, 1))
        ]
    )
    found = np.array([cosines(engine.direction(name, len(moved))[None], moved)[0] for name in names])
    return ClientAudit(
        epsilon=claim.epsilon,
        delta=claim.delta,
        canaries=len(names),
        values=len(moved),
        cosine=float(np.median(found)),
        epsilon_estimated=estimate(found, len(moved), claim.delta),
        confidence=confidence,
        epsilon_at_least=lower_bound(found, len(moved), claim.delta, confidence),
    )
