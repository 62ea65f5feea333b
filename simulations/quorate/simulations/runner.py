"""Simulate a run: every site in this process, the ServerApp over the in-process grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from quorate.client.site import Site, SiteRows
from quorate.server.outputs import best_state, measure, write_outputs
from quorate.server.records import Sample, Summary
from quorate.server.rounds import Result, run_rounds
from quorate.server.run import Run
from quorate.server.trackers import Tracker
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.run import RunConfig
from quorate.shared.errors import ConfigError
from quorate.shared.progress import OnStep, ignore_step
from quorate.simulations.grid import RUN_ID, SERVER_NODE, InProcessGrid
from quorate.simulations.references import POOL, pool, run_references


def simulate(
    config: RunConfig,
    rows: Mapping[str, SiteRows],
    output_dir: Path,
    *,
    resume: bool = False,
    trackers: Sequence[Tracker] = (),
    on_step: OnStep = ignore_step,
) -> Summary:
    """Run `config` with these sites and write everything to `output_dir`.

    Args:
        config: the run.
        rows: site name -> split -> rows.
        output_dir: a new folder, or with `resume` one that holds this run.
        trackers: told of phases, rounds and the end.
        on_step: told of every optimiser step.
    Returns: the summary.
    Raises: BadInput: before anything is trained, where something cannot work. QuorumNotMet,
        KeyboardInterrupt: after writing what finished rounds gave.
    """
    if config.federation.quorum > len(rows):
        raise ConfigError(
            f"federation.quorum: {config.federation.quorum} is above the number of sites ({len(rows)}: "
            f"{', '.join(rows)}); lower it to at most {len(rows)}."
        )
    pooled = {POOL: pool(rows)} if "centralised" in config.evaluation.references else {}
    site = Site({**rows, **pooled}, on_step=on_step)
    config = site.prepare(config)
    run = Run.open(config, output_dir, resume=resume, trackers=trackers)
    grid = InProcessGrid(site, list(rows))
    result = _serve(grid, run)
    final, best, outcomes = measure(grid, run, result)
    references, gains = None, None
    if config.evaluation.references and result.stopped is None:
        references, gains = run_references(run, rows, site, result.members.initial, outcomes)
    summary = write_outputs(
        run, result, final, best, references=references, worth=gains, samples=_samples(site, run, result)
    )
    if result.stopped is not None:
        raise result.stopped
    return summary


def _samples(site: Site, run: Run, result: Result) -> list[Sample]:
    """Return answers to the run file's own prompts, by the base model and by the best round's."""
    if result.progress is None or result.stopped is not None:
        return []
    run.tell("phase", result.progress.round, "samples")
    before, after = site.samples(run.config, [GlobalState(result.members.initial), best_state(run, result)])
    return [
        Sample(prompt=prompt, base=base, adapted=adapted)
        for (prompt, base), (_, adapted) in zip(before, after, strict=True)
    ]


def _serve(grid: Grid, run: Run) -> Result:
    """Run the rounds inside a Flower ServerApp, as a SuperLink would."""
    app = ServerApp()
    results: list[Result] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(run_rounds(grid, run))

    app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), {}))
    return results[0]
