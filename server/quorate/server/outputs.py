"""What a run leaves behind: the adapter for PEFT, the summary, the report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from flwr.serverapp import Grid

from quorate.server.card import model_card
from quorate.server.checkpoint import load_checkpoint
from quorate.server.evaluation import summarise
from quorate.server.records import (
    Answer,
    Evaluation,
    Exclusion,
    Measured,
    References,
    RoundRecord,
    Summary,
    Worth,
)
from quorate.server.report import write_report
from quorate.server.rounds import Result, evaluate_at_sites
from quorate.server.run import ADAPTER_DIR, RECORD_FILE, SUMMARY_FILE, Run, read_jsonl
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.run import RunConfig
from quorate.shared.errors import QuorumNotMet
from quorate.shared.export import adapter_files
from quorate.shared.files import write_file, write_folder
from quorate.shared.outcomes import Outcomes

_LIBRARIES = ("quorate", "flwr", "torch", "transformers", "peft", "numpy")


def measure(
    grid: Grid, run: Run, result: Result
) -> tuple[Measured | None, Measured | None, dict[str, Outcomes]]:
    """Measure the last and the best round's model on test rows.

    Returns: final, best, and the best model's outcomes per site. A run that was stopped is not measured
        again: what its rounds found on validation rows stands. Nor is one whose sites share no outcomes.
    """
    if result.progress is None:
        return None, None, {}
    last, best_round = result.progress.round, result.progress.best_round or result.progress.round
    if result.stopped is not None or not run.config.evaluation.share_outcomes:
        return (
            Measured(round=last, validation=result.progress.metrics.validation),
            Measured(round=best_round),
            {},
        )
    run.tell("phase", last, "test")
    final, outcomes = _measured(grid, run, result, result.state, last, result.progress.metrics.validation)
    if best_round == last:
        return final, final, outcomes
    state, progress = load_checkpoint(run.output_dir, best_round)
    best, outcomes = _measured(grid, run, result, state, best_round, progress.metrics.validation)
    return final, best, outcomes


def _measured(
    grid: Grid, run: Run, result: Result, state: GlobalState, round: int, validation: Evaluation | None
) -> tuple[Measured, dict[str, Outcomes]]:
    outcomes = evaluate_at_sites(grid, run, result.members, state, "test", round)
    config = run.config
    intervals = config.evaluation.bootstrap_samples > 0
    test = summarise(config.task, "test", outcomes, intervals=intervals)
    return Measured(round=round, validation=validation, test=test), outcomes


def best_state(run: Run, result: Result) -> GlobalState:
    """Return the state of the best round (the last, where nothing was validated)."""
    if result.progress and result.progress.best_round not in (None, result.progress.round):
        return load_checkpoint(run.output_dir, result.progress.best_round)[0]
    return result.state


def write_outputs(
    run: Run,
    result: Result,
    final: Measured | None,
    best: Measured | None,
    *,
    references: References | None = None,
    worth: Mapping[str, Worth] | None = None,
    samples: Sequence[Answer] = (),
) -> Summary:
    """Write adapter/, summary.json and report.html, in this order, and tell the trackers."""
    run.tell("phase", result.progress.round if result.progress else 0, "outputs")
    summary = _summary(run, result, final, best, references, worth or {}, samples)
    if result.progress is not None:
        export_adapter(run.config, best_state(run, result), run.output_dir / ADAPTER_DIR, summary)
    write_file(run.output_dir / SUMMARY_FILE, summary.model_dump_json(indent=2) + "\n")
    write_report(run.output_dir)
    run.tell("finish", summary)
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
    references: References | None,
    worth: Mapping[str, Worth],
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
    return Summary(
        name=run.config.name,
        run_id=run.run_id,
        status=result.status,
        rounds=result.progress.round if result.progress else 0,
        stopped=str(result.stopped) if isinstance(result.stopped, QuorumNotMet) else result.early,
        metric=run.metric,
        seed=run.config.seed,
        config_hash=run.config.content_hash,
        final=final,
        best=best,
        references=references,
        worth=dict(worth),
        sites=result.members.sites,
        samples=tuple(samples),
        excluded=excluded,
        bytes={"down": down, "up": up, "total": down + up},
        seconds={**seconds, "total": round(sum(seconds.values()), 3)},
        versions={name: version(name) for name in _LIBRARIES},
        client_privacy=result.claim,
    )


def read_summary(output_dir: Path) -> Summary:
    """Read summary.json."""
    return Summary.model_validate(json.loads((output_dir / SUMMARY_FILE).read_text(encoding="utf-8")))
