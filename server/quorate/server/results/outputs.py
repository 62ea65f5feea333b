"""What a run leaves behind: the adapter for PEFT, the summary, the report."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from flwr.serverapp import Grid

from quorate.server.report import write_report
from quorate.server.results.local_reference import Compared
from quorate.server.results.model_card import model_card
from quorate.server.rounds.checkpoint import Progress, list_checkpoints, load_checkpoint
from quorate.server.rounds.loop import Result
from quorate.server.rounds.measuring import measure as measure_at_sites
from quorate.server.rounds.round import Round
from quorate.server.rounds.run import ADAPTER_DIR, RECORD_FILE, SUMMARY_FILE, Run, read_jsonl
from quorate.server.tracking.events import Finished, PhaseBegan
from quorate.server.tracking.records import Answer, Exclusion, Measured, RoundRecord, Summary
from quorate.shared.adapters.peft_export import adapter_files
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ModelDiverged, OutputError, QuorumNotMet
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.process.files import BY_UMASK, write_atomically, write_folder

log = logging.getLogger(__name__)


_LIBRARIES = ("quorate", "flwr", "torch", "transformers", "peft", "numpy")


def measure(
    grid: Grid, run: Run, result: Result
) -> tuple[Measured | None, Measured | None, dict[str, Outcomes]]:
    """Measure the last and the best round's model on test rows; one that no site can measure ends the run.

    Returns: final, best, and the best model's outcomes per site. A run that was stopped is not measured
        again: what its rounds found on validation rows stands. Nor is one whose sites share no outcomes.
    """
    if result.progress is None:
        return None, None, {}
    if result.stopped is None and run.config.evaluation.share_outcomes:
        run.tell(PhaseBegan(round=result.progress.round, name="test"))
        try:
            return _tested(grid, run, result, result.progress)
        except ModelDiverged as error:
            result.stop(error)
    last = Measured(round=result.progress.round, validation=result.progress.metrics.validation)
    good = good_round(run, result)
    if good is None:
        return last, None, {}
    validation = load_checkpoint(run.output_dir, good)[1].metrics.validation if good != last.round else None
    return last, last if good == last.round else Measured(round=good, validation=validation), {}


def _tested(
    grid: Grid, run: Run, result: Result, progress: Progress
) -> tuple[Measured, Measured, dict[str, Outcomes]]:
    final, outcomes = _measured(grid, run, result, result.state, progress)
    if progress.best_round in (None, progress.round):
        return final, final, outcomes
    best, outcomes = _measured(grid, run, result, *load_checkpoint(run.output_dir, progress.best_round))
    return final, best, outcomes


def _measured(
    grid: Grid, run: Run, result: Result, state: GlobalState, progress: Progress
) -> tuple[Measured, dict[str, Outcomes]]:
    intervals = run.config.evaluation.bootstrap_samples > 0
    round = Round(grid, run, result.members, progress.round)
    measured = measure_at_sites(round, state, "test", intervals=intervals)
    model = Measured(round=progress.round, validation=progress.metrics.validation, test=measured.evaluation)
    return model, measured.outcomes


def good_round(run: Run, result: Result) -> int | None:
    """Return the round whose model is the result: the best, or the last where nothing was validated.

    Of a run whose model diverged, the last round that sites have measured and that is kept; None where there
    is none.
    """
    progress = result.progress
    if progress is None:
        return None
    if progress.best_round is None and result.status == "diverged":
        for kept in sorted(list_checkpoints(run.output_dir), reverse=True):
            validation = load_checkpoint(run.output_dir, kept)[1].metrics.validation
            if validation and validation.sites:
                return kept
        return None
    return progress.best_round or progress.round


def best_state(run: Run, result: Result) -> GlobalState:
    """Return the state of the best round (the last, where nothing was validated)."""
    good = good_round(run, result)
    if result.progress and good not in (None, result.progress.round):
        return load_checkpoint(run.output_dir, good)[0]
    return result.state


def write_outputs(
    run: Run,
    result: Result,
    final: Measured | None,
    best: Measured | None,
    compared: Compared | None = None,
    samples: Sequence[Answer] = (),
) -> Summary:
    """Write adapter/, summary.json and report.html, in this order, and tell the trackers."""
    run.tell(PhaseBegan(round=result.progress.round if result.progress else 0, name="outputs"))
    summary = _summary(run, result, final, best, compared or Compared(), samples)
    if good_round(run, result) is None:  # what an earlier end of the run left is no better known to be good
        shutil.rmtree(run.output_dir / ADAPTER_DIR, ignore_errors=True)
    else:
        export_adapter(run.config, best_state(run, result), run.output_dir / ADAPTER_DIR, summary)
    write_atomically(run.output_dir / SUMMARY_FILE, summary.model_dump_json(indent=2) + "\n", BY_UMASK)
    write_report(run.output_dir)
    try:
        run.tell(Finished(summary=summary))
    except OutputError as error:  # all that matters is written
        log.error("%s", error)
    return summary


def export_adapter(config: RunConfig, state: GlobalState, folder: Path, summary: Summary) -> None:
    """Write the state as one LoRA adapter that PEFT loads (see `adapter_files`), with its model card."""
    card = {"README.md": model_card(config, summary).encode()}
    write_folder(folder, {**adapter_files(config, state), **card})


def _summary(
    run: Run,
    result: Result,
    final: Measured | None,
    best: Measured | None,
    compared: Compared,
    samples: Sequence[Answer],
) -> Summary:
    records = [
        each
        for each in read_jsonl(run.output_dir / RECORD_FILE, RoundRecord)
        if isinstance(each, RoundRecord)
    ]
    excluded: dict[str, dict[int, Exclusion]] = {
        site: {0: why} for site, why in result.members.refused.items()
    }
    seconds: Counter[str] = Counter()
    for record in records:
        seconds.update(record.seconds)
        for site, why in record.excluded.items():
            excluded.setdefault(site, {})[record.round] = why
    down = sum(sum(record.bytes_down.values()) for record in records)
    up = sum(sum(record.bytes_up.values()) for record in records)
    stopped = result.early
    if isinstance(result.stopped, (QuorumNotMet, ModelDiverged)):
        stopped = str(result.stopped)
    hidden = run.config.hides_participation
    if hidden:  # the summary is shown to those who must not know who was drawn
        excluded = {site: {0: rounds[0]} for site, rounds in excluded.items() if 0 in rounds}
        if isinstance(result.stopped, (QuorumNotMet, ModelDiverged)):
            stopped = f"{type(result.stopped).__name__}: the sites concerned are named in {RECORD_FILE} alone"
    return Summary(
        name=run.config.name,
        run_id=run.run_id,
        status=result.status,
        rounds=result.progress.round if result.progress else 0,
        stopped=stopped,
        metric=run.metric,
        seed=run.config.seed,
        config_hash=run.config.content_hash,
        final=final,
        best=best,
        references=compared.references,
        worth=compared.worth,
        sites=result.members.sites,
        samples=tuple(samples),
        head=next((record.head for record in records if record.head), None),
        excluded=excluded,
        bytes={} if hidden else {"down": down, "up": up, "total": down + up},
        seconds={} if hidden else {**seconds, "total": round(sum(seconds.values()), 3)},
        versions={name: version(name) for name in _LIBRARIES},
        client_privacy=result.claim,
    )


def read_summary(output_dir: Path) -> Summary:
    """Read summary.json."""
    return Summary.model_validate(json.loads((output_dir / SUMMARY_FILE).read_text(encoding="utf-8")))
