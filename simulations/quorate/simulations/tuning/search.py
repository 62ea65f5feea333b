"""Search settings of a run with Optuna: each trial is a federation, judged on validation rows alone.

The search lies in one SQLite file, so it can be killed at any time and gone on with. A trial that a kill cut
off is marked failed and run again with the same parameters. Trial k draws from a seed of its own, not from a
generator that the process carries along: an interrupted search tries what an uninterrupted one tries.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quorate.client.site.data_source import SiteRows
from quorate.client.site.site import Site
from quorate.server.rounds.run import RUN_FILE
from quorate.shared.config.load import load_run
from quorate.shared.config.read import dump_yaml, load_file
from quorate.shared.errors import CheckpointError, ConfigError, DataError, OutputError
from quorate.shared.process.files import BY_UMASK, write_atomically
from quorate.shared.seeds import derive_seed
from quorate.simulations.tuning.privacy_cost import privacy_cost
from quorate.simulations.tuning.space import SpaceConfig
from quorate.simulations.tuning.trial import DIVERGED, RETRY_OF, Diverged, Search, objective, trial_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

STORAGE_FILE, SPACE_FILE, BASE_FILE = "tune.db", "space.yaml", "base.yaml"
_STUDY = "tune"


def tune(search: Search, *, resume: bool = False) -> Study:
    """Run trials until there are as many as the space asks for.

    Returns: Optuna's study.
    Raises: BadInput: before the first trial, where something cannot work, or from a trial whose settings the
        model or the data do not allow. KeyboardInterrupt: every finished trial is kept.
    """
    _check(search)
    optuna = _optuna()
    with _folder(search, resume=resume):
        study: Study = optuna.create_study(
            storage=_storage(search.output_dir),
            study_name=_STUDY,
            direction=search.direction,
            load_if_exists=True,
        )
        requeue(study, search)
        # No site is given test rows: what is not there cannot have shaped the choice.
        rows: dict[str, SiteRows] = {
            name: {split: found for split, found in splits.items() if split != "test"}
            for name, splits in search.rows.items()
        }
        engine = Site(rows, on_step=search.on_step)
        grid = search.space.grid() if search.space.sampler == "grid" else []
        wanted = min(search.space.trials, len(grid)) if grid else search.space.trials
        if (together := privacy_cost(search.rows, [search.base] * wanted)) is not None:
            search.say(f"With the run file's own settings: {together.sentence}")
        while (done := len(settled(study))) < wanted:
            waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
            if grid and not waiting:
                study.enqueue_trial(grid[done])
            study.sampler = make_sampler(search.space, done)
            study.pruner = make_pruner(search.space, search.base.federation.rounds)
            study.optimize(
                lambda trial: objective(trial, search, engine),
                n_trials=1,
                catch=(Diverged,),
                callbacks=[lambda study, trial: _tell(study, trial, search, wanted)],
            )
    return study


def settled(study: Study) -> list[FrozenTrial]:
    """Return the trials that count: finished, pruned or diverged, but not those that were cut off."""
    return [
        each
        for each in study.get_trials(deepcopy=False)
        if each.state.is_finished() and (each.state.name != "FAIL" or DIVERGED in each.user_attrs)
    ]


def requeue(study: Study, search: Search) -> None:
    """Mark trials that a kill left running as failed, and put each that was cut off in line again."""
    from optuna.trial import TrialState

    for each in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(each.number, state=TrialState.FAIL)
    trials = study.get_trials(deepcopy=False)
    again = {each.user_attrs.get(RETRY_OF) for each in trials}
    for each in trials:
        cut_off = each.state == TrialState.FAIL and DIVERGED not in each.user_attrs
        if not cut_off or each.number in again:
            continue
        shutil.rmtree(trial_dir(search.output_dir, each.number), ignore_errors=True)
        # Cut off before it had all its parameters, it had done nothing: the next trial draws them again.
        if set(each.params) == set(search.space.space):
            search.say(f"trial {each.number} was cut off; it is run again")
            study.enqueue_trial(each.params, user_attrs={RETRY_OF: each.number})


def make_sampler(space: SpaceConfig, index: int) -> BaseSampler:
    """Return the sampler of the trial that `index` settled trials came before."""
    from optuna.samplers import RandomSampler, TPESampler

    seed = derive_seed(space.seed, "trial", index) % 2**32
    if space.sampler == "tpe":
        return TPESampler(n_startup_trials=space.startup_trials, seed=seed)
    return RandomSampler(seed=seed)  # a grid's points are in line already


def make_pruner(space: SpaceConfig, rounds: int) -> BasePruner:
    """Return what stops trials early."""
    from optuna import pruners

    if space.pruner == "median":
        return pruners.MedianPruner(n_startup_trials=space.startup_trials, n_warmup_steps=space.warmup_rounds)
    if space.pruner == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, max_resource=rounds)
    return pruners.NopPruner()


def _check(search: Search) -> None:
    if not any(splits.get("validation") for splits in search.rows.values()):
        raise DataError(
            "no site has validation rows, and trials are judged on them alone; give the data a validation "
            "split (`split: {validation: 0.15}` in the sites file)."
        )
    quorum = search.base.federation.quorum
    if quorum > len(search.rows):
        raise ConfigError(
            f"federation.quorum: {quorum} is above the number of sites ({len(search.rows)}: "
            f"{', '.join(search.rows)}); lower it to at most {len(search.rows)}."
        )


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        message = "tune needs a package that is not installed; run `pip install 'quorate[tune]'`."
        raise ConfigError(message) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # `say` tells what there is to tell
    return optuna


def _storage(output_dir: Path) -> str:
    from sqlalchemy import URL

    path = (output_dir / STORAGE_FILE).resolve()
    return URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


@contextmanager
def _folder(search: Search, *, resume: bool) -> Iterator[None]:
    """Make or reopen the output folder, and keep other processes out of it."""
    from filelock import FileLock, Timeout

    folder = search.output_dir
    if (folder / RUN_FILE).exists():
        raise OutputError(f"{folder} holds a run; choose another folder for the search (-o).")
    if (folder / STORAGE_FILE).exists() and not resume:
        raise OutputError(
            f"{folder} already holds a search; continue it with --resume, or choose another folder (-o)."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another with -o.") from error
    try:
        with FileLock(folder / ".lock", timeout=0):  # the system lets go of it when the process is killed
            _check_same(search)
            yield
    except Timeout as error:
        raise OutputError(f"{folder}: another process is searching there; wait for its end.") from error


def _check_same(search: Search) -> None:
    """Write what is searched; where that is there already, check that it is the same."""
    folder = search.output_dir
    if (folder / SPACE_FILE).exists():
        before = load_file(SpaceConfig, folder / SPACE_FILE)
        same_space = before.model_copy(update={"trials": search.space.trials}) == search.space
        if not same_space or load_run(folder / BASE_FILE) != search.base:
            raise CheckpointError(
                f"{folder} holds a search of another {'run' if same_space else 'space'}; resume it with the "
                "same files (the number of trials may change), or start the new one in another folder (-o)."
            )
    write_atomically(folder / BASE_FILE, dump_yaml(search.base), BY_UMASK)
    write_atomically(folder / SPACE_FILE, dump_yaml(search.space), BY_UMASK)
    if search.origin is not None:
        search.origin.keep(folder)


def _tell(study: Study, last: FrozenTrial, search: Search, wanted: int) -> None:
    values = ", ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in last.params.items())
    best = study.best_trial if any(each.state.name == "COMPLETE" for each in settled(study)) else None
    how = {"PRUNED": "stopped early", "FAIL": "diverged"}.get(last.state.name, "")
    value = "" if last.value is None else f"{search.metric} {last.value:.4f} "
    so_far = "" if best is None else f" · best {best.value:.4f} of trial {best.number}"
    search.say(
        f"trial {last.number} ({len(settled(study))}/{wanted}) · {value}{how or 'done'} · {values}{so_far}"
    )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
