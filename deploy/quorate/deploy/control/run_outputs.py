"""A federated run before it is submitted and after its end: model hash, folders, results."""

from __future__ import annotations

import logging
import shutil
import stat
import uuid
from datetime import UTC, datetime
from pathlib import Path

from quorate.deploy.control.run_list import RunFolder, Submission, find_run_folder, list_runs
from quorate.server.federation.folder import FederationFolder
from quorate.server.report import REPORT_FILE
from quorate.server.rounds.run import (
    ADAPTER_DIR,
    METRICS_FILE,
    RECORD_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    Run,
    check_free,
    run_in_folder,
)
from quorate.server.tracking.events import EVENTS_FILE
from quorate.server.tracking.trackers import TENSORBOARD_DIR
from quorate.shared.config.load import load_run
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import CheckpointError, ConfigError, ModelError, NotReady, OutputError
from quorate.shared.process.files import make_folder, write_atomically, writing
from quorate.shared.process.looks import check_room

log = logging.getLogger(__name__)

_FILES = (RUN_FILE, RECORD_FILE, METRICS_FILE, EVENTS_FILE, SUMMARY_FILE, REPORT_FILE)
_FOLDERS = (ADAPTER_DIR, TENSORBOARD_DIR)


def pinned(config: RunConfig) -> RunConfig:
    """Return the run with its base model's hash: sites take no model by its path.

    Raises: ModelError: the run file names no hash, and there is no copy of the model here to hash.
    """
    if config.model.sha256 is not None:
        return config
    from quorate.shared.model.base_model import whole_files
    from quorate.shared.model.sources import resolve_model

    name = config.model.model_name_or_path
    try:
        folder = resolve_model(name, config.model.revision)
        _, sha256 = whole_files(folder)
    except ModelError as error:
        raise ModelError(
            f"{error} A federated run must name its base model's hash: write model.sha256 into the run file "
            "(the sites list it in site.yaml), or put a copy of the model here to be hashed.",
            kind="no-hash",
        ) from error
    log.warning("model.sha256 is not in the run file; that of %s is %s", name, sha256)
    return config.model_copy(update={"model": config.model.model_copy(update={"sha256": sha256})})


def check_room_for(folder: FederationFolder, output_dir: Path) -> None:
    """Warn where a disk that the run will write to is nearly full."""
    try:
        check_room({"runs": folder.runs, "output": output_dir})
    except NotReady as error:
        log.warning("%s", error)


def check_output(output_dir: Path, config: RunConfig, *, resume: bool) -> None:
    """Raise OutputError where results must not go, before anything is submitted."""
    if (output_dir / RUN_FILE).exists():
        if not resume:
            raise run_in_folder(output_dir)
        if load_run(output_dir / RUN_FILE) != config:
            raise OutputError(f"{output_dir} holds another run; choose another folder (-o).")
        return
    check_free(output_dir, (*_FILES, *_FOLDERS))


def new_run(folder: FederationFolder, config: RunConfig, output_dir: Path) -> RunFolder:
    """Make the folder of a new run at the coordinator. Raises: OutputError."""
    run_id = uuid.uuid4().hex[:16]
    for each in (folder.runs, folder.runs / run_id):
        make_folder(each)
    Run.open(config, folder.runs / run_id, run_id=run_id)
    run = RunFolder(folder.runs / run_id)
    Submission(started=datetime.now(UTC), output_dir=str(output_dir.absolute())).write(run.path)
    return run


def old_run(folder: FederationFolder, config: RunConfig, output_dir: Path, run_id: str | None) -> RunFolder:
    """Return the run to go on with: the one named, else the newest with this configuration.

    Raises: ConfigError: there is none. CheckpointError: it has other settings.
    """
    if run_id is not None:
        run = find_run_folder(folder, run_id)
        before = run.config
        if before != config:
            old, new = before.model_dump(), config.model_dump()
            changed = ", ".join(key for key in new if new[key] != old.get(key))
            raise CheckpointError(
                f"run {run.run_id} has other settings ({changed}); resume it with the same run file and "
                "overrides, or start a new one without --resume.",
                kind="run-has-other-settings",
            )
    else:
        same = [run for run in list_runs(folder) if run.config == config]
        if not same:
            raise ConfigError(
                f"federation {folder.config.name} has no run {config.name} with these settings; leave "
                "--resume out to start one, or name a run (--run-id; `quorate runs list` shows them).",
                kind="none-to-resume",
            )
        run = same[0]
    submission = Submission.read(run.path) or Submission(started=run.started, output_dir="")
    submission.model_copy(update={"output_dir": str(output_dir.absolute())}).write(run.path)
    return run


def forget(run: RunFolder) -> None:
    """Take away a run that could not be submitted even once."""
    submission = Submission.read(run.path)
    if submission is not None and not submission.flower_runs and not run.rounds_done:
        shutil.rmtree(run.path, ignore_errors=True)


def fetch_results(run: RunFolder, output_dir: Path) -> None:
    """Copy a run's results to `output_dir`; checkpoints stay with the federation.

    Raises: OutputError: they cannot be written.
    """
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (run.path / name).is_file():
                mode = stat.S_IMODE((run.path / name).stat().st_mode)
                write_atomically(output_dir / name, (run.path / name).read_bytes(), mode)
        for name in _FOLDERS:
            if (run.path / name).is_dir():
                shutil.rmtree(output_dir / name, ignore_errors=True)
                shutil.copytree(run.path / name, output_dir / name)
            elif name == ADAPTER_DIR and (run.path / SUMMARY_FILE).is_file():
                # A run that ended without one took it away: what was fetched before is not its result.
                shutil.rmtree(output_dir / name, ignore_errors=True)
