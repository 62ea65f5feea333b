"""`quorate tune`: search settings of a run, each trial a federation of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quorate.deploy.commands.both.options import (
    JsonOption,
    LogLevel,
    LogLevelOption,
    OverridesArgument,
    RunArgument,
    SitesOption,
    output_option,
    print_json,
)
from quorate.deploy.commands.simulation.inputs import find_run, find_sites

if TYPE_CHECKING:
    from quorate.simulations.tuning.tuning_report import Tuned


def tune(
    run: RunArgument,
    overrides: OverridesArgument = None,
    space: Annotated[
        Path | None,
        typer.Option(
            "--space",
            metavar="SPACE",
            help="The space file: which fields of the run file are searched, and how. NAME.space.yaml beside "
            "NAME.yaml when left out.",
        ),
    ] = None,
    sites: SitesOption = None,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials", metavar="N", min=1, help="Number of trials; the space file's when left out."
        ),
    ] = None,
    output: Annotated[
        Path | None, output_option("Where to write everything; runs/NAME-tune when left out.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the search in the output folder.")
    ] = False,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Search settings of a run: many trials, each a federation, judged on validation rows alone.

    Example: quorate tune demo --space space.yaml --trials 20 training.max_steps=4 -o runs/demo-tune
    """
    run_path = find_run(run)
    sites_path = find_sites(sites, run_path)
    from quorate.deploy.terminal import stderr_console
    from quorate.shared.config.load import load_run, load_sites_file
    from quorate.simulations.tuning.space import load_space

    config = load_run(run_path, overrides or [])
    space_path = space or run_path.with_name(f"{run_path.stem}.space{run_path.suffix}")
    searched = load_space(space_path, run_path, overrides or [])
    if trials is not None:
        searched = searched.model_copy(update={"trials": trials})
    sites_config = load_sites_file(sites_path)
    from quorate.simulations.provenance import Origin
    from quorate.simulations.simulated_sites import load_sites
    from quorate.simulations.tuning.search import tune as run_search
    from quorate.simulations.tuning.trial import Search
    from quorate.simulations.tuning.tuning_report import write_tuned

    rows = load_sites(sites_config, sites_path.parent, config)

    def say(text: str) -> None:
        if not log_level.quiet:
            stderr_console().print(text, markup=False, soft_wrap=True)

    search = Search(
        run_path=run_path,
        overrides=overrides or [],
        space=searched,
        rows=rows,
        output_dir=output or Path("runs") / f"{config.name}-tune",
        origin=Origin.of(config, sites_config, sites_path.parent, rows),
        say=say,
    )
    study = run_search(search, resume=resume)
    result = write_tuned(search, study)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        _print(result, search.output_dir)


def _print(result: Tuned, folder: Path) -> None:
    if result.best is not None:
        typer.echo(
            f"best {result.metric} on validation rows: {result.best.value:.4f}, trial {result.best.number}"
        )
        for key, value in result.best.values.items():
            share = f"  importance {result.importances[key]:.2f}" if key in result.importances else ""
            typer.echo(f"  {key}={value}{share}")
    else:
        typer.echo("no trial came to its end")
    if result.spent is not None:
        typer.echo(result.spent.sentence)
    for what, name in (("best run", "best.yaml"), ("trials", "trials.csv"), ("page", "tune.html")):
        if (folder / name).exists():
            typer.echo(f"{what:8} {folder / name}")
