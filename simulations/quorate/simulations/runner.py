"""Simulate a run: every site in this process, the ServerApp over the in-process grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from quorate.client.site.data_source import SiteRows
from quorate.client.site.engine import Engine
from quorate.client.site.site import Site
from quorate.server.results.complete import all_the_same
from quorate.server.results.local_reference import Compared
from quorate.server.results.outputs import best_state, measure, write_outputs
from quorate.server.rounds.loop import Result, run_rounds
from quorate.server.rounds.run import Run, locked_output
from quorate.server.tracking.events import PhaseBegan, Tracker, telling_warnings
from quorate.server.tracking.records import Answer, Summary
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError
from quorate.shared.progress import OnStep, ignore_step
from quorate.simulations.baselines import POOL, pool, run_references
from quorate.simulations.detection_samples import check_samples, write_samples
from quorate.simulations.in_process_grid import RUN_ID, SERVER_NODE, InProcessGrid
from quorate.simulations.provenance import Origin


@dataclass(frozen=True)
class SimulationOptions:
    """What a simulation can be asked for besides.

    Args:
        resume: go on with the run in the output folder.
        samples: test images that the report shows, where the task has pictures.
        origin: where the rows came from; kept with it, so that `quorate rerun` can make it again.
    """

    resume: bool = False
    samples: int = 0
    origin: Origin | None = None


def simulate(
    config: RunConfig,
    rows: Mapping[str, SiteRows],
    output_dir: Path,
    *,
    trackers: Sequence[Tracker] = (),
    on_step: OnStep = ignore_step,
    options: SimulationOptions | None = None,
) -> Summary:
    """Run `config` with these sites and write everything to `output_dir`.

    Example, a function as a tracker (docs/events.md says what there is to be told)::

        def show(event: Event) -> None:
            if isinstance(event, RoundDone) and event.metrics.validation:
                print(event.record.round, event.metrics.validation.pooled)

        summary = simulate(config, rows, Path("runs/demo"), trackers=[show])

    Args:
        rows: site name -> split -> rows.
        output_dir: a new folder, or with `resume` one that holds this run.
        trackers: callables that are told what happens, event by event; `output_dir` has it all in a file too.
    Returns: the summary.
    Raises: BadInput: before anything is trained, where something cannot work. QuorumNotMet,
        ModelDiverged, KeyboardInterrupt: after writing what finished rounds gave.
    """
    if config.federation.quorum > len(rows):
        raise ConfigError(
            f"federation.quorum: {config.federation.quorum} is above the number of sites ({len(rows)}: "
            f"{', '.join(rows)}); lower it to at most {len(rows)}."
        )
    options = options or SimulationOptions()
    check_samples(config, options.samples)
    pooled = {POOL: pool(rows, config)} if "centralised" in config.evaluation.references else {}
    engine = Site({**rows, **pooled}, on_step=on_step, as_given=pooled)
    config = engine.prepare(config)
    with locked_output(output_dir), telling_warnings(output_dir, trackers):
        run = Run.open(config, output_dir, resume=options.resume, trackers=trackers)
        if options.origin is not None:
            options.origin.keep(output_dir)
        return _carry_out(run, rows, engine, options.samples)


def _carry_out(run: Run, rows: Mapping[str, SiteRows], engine: Engine, samples: int) -> Summary:
    grid = InProcessGrid(engine, list(rows))
    result = serve(grid, run)

    def compare() -> Compared:
        if not run.config.evaluation.references or result.stopped is not None:
            return Compared()
        return run_references(run, rows, engine, result.members.initial, outcomes)

    final, best, outcomes = all_the_same(result, lambda: measure(grid, run, result))
    compared = all_the_same(result, compare)
    prompted = all_the_same(result, lambda: _prompted(engine, run, result))
    summary = all_the_same(result, lambda: write_outputs(run, result, final, best, compared, prompted))
    if samples and result.progress is not None and result.stopped is None:
        write_samples(run.config, rows, run.output_dir, samples)
    if result.stopped is not None:
        raise result.stopped
    return summary


def serve(grid: Grid, run: Run) -> Result:
    """Run the rounds inside a Flower ServerApp, as a SuperLink would."""
    app = ServerApp()
    results: list[Result] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(run_rounds(grid, run))

    app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), {}))
    return results[0]


def _prompted(engine: Engine, run: Run, result: Result) -> list[Answer]:
    """Return answers to the run file's own prompts, by the base model and by the best round's."""
    if not run.config.task.prompts or result.progress is None or result.stopped is not None:
        return []
    run.tell(PhaseBegan(round=result.progress.round, name="samples"))
    before, after = engine.samples(run.config, [GlobalState(result.members.initial), best_state(run, result)])
    return [
        Answer(prompt=prompt, base=base, adapted=adapted)
        for (prompt, base), (_, adapted) in zip(before, after, strict=True)
    ]
