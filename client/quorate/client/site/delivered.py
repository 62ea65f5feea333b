"""The end of a run at a site: the final adapter, and a report of what it is worth here."""

from __future__ import annotations

import re
from pathlib import Path

from quorate.shared.adapters.peft_export import ADAPTER_DIR, adapter_files
from quorate.shared.aggregation import GlobalState
from quorate.shared.config.privacy_config import ClientPrivacy
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ProtocolError, RequestRefused
from quorate.shared.privacy.claim import PrivacyClaim
from quorate.shared.privacy.rounding import at_most, delta_shown
from quorate.shared.process.files import BY_UMASK, write_atomically, write_folder, writing
from quorate.shared.protocol.messages import Delivery, RequestHeader

RECEIVED = "received"
"""In STATE: the results of runs that are done."""
REPORT_FILE = "report.md"
_RUN_ID = r"[0-9a-f]{16}"
_ACCOUNTANT = "Epsilon is by privacy loss distributions (arXiv:1906.00868)."


def keep_result(
    received: Path | None,
    run: RunConfig,
    header: RequestHeader,
    state: GlobalState,
    claim: PrivacyClaim | None = None,
) -> Path:
    """Write `received/RUN_ID/`: `adapter/`, which PEFT loads, and report.md.

    Args:
        received: the site's folder for results; made where it is missing, for its owner alone.
        header: names the run, and brings the figures.
        state: the final model.
        claim: what the site claims for its own rows, under record- or group-level privacy.
    Returns: the folder.
    Raises: RequestRefused: this process keeps no results. ProtocolError: no run id, or no figures.
        OutputError: the folder cannot be written.
    """
    if received is None:
        raise RequestRefused("this process has no folder for results.")
    if not re.fullmatch(_RUN_ID, header.run_id):  # it names a folder, and came from elsewhere
        raise ProtocolError("a result for something that is no run id.")
    if header.delivery is None:
        raise ProtocolError("a result without figures.")
    state.adapter.check_finite()
    state.residual.check_finite()
    folder = received / header.run_id
    with writing(folder):
        for each in (received, folder):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_folder(folder / ADAPTER_DIR, adapter_files(run, state))
    write_atomically(
        folder / REPORT_FILE, report(run, header.run_id, header.site, header.delivery, claim), BY_UMASK
    )
    return folder


def report(
    run: RunConfig, run_id: str, site: str, result: Delivery, claim: PrivacyClaim | None = None
) -> str:
    """Return the site's report as Markdown."""
    picked = f"picked by `{result.metric}` on validation rows where there are any"
    if run.private_clients:
        picked = "the last: no noise hides which one validation rows would choose"
    elif not run.evaluation.share_outcomes:
        picked = "the last, as sites sent nothing of what it gets right and wrong on their rows"
    lines = [
        f"# {run.name} at {site}",
        "",
        f"Run {run_id}: {result.rounds} rounds. `adapter/` holds the model after round {result.best_round}, "
        f"{picked}.",
        "",
        f"Base model: `{run.model.model_name_or_path}`, sha256 {run.model.sha256 or 'not pinned'}. "
        f"Labels and settings: `adapter/run.yaml`.",
        "",
    ]
    if result.split is None:
        lines += ["The model was not measured.", ""]
    else:
        lines += _table(result, run.private_clients)
    if result.local_only is not None:
        lines += [f"An adapter trained on the rows of {site} alone: {result.metric} {result.local_only:.4f}."]
        if result.gain is not None:
            gain, low, high = result.gain
            lines += [f"The federation brought {gain:+.4f} (95 % interval {low:+.4f} to {high:+.4f})."]
        elif result.metric in result.own:
            lines += [
                f"The federation's: {result.own[result.metric]:.4f}. These are too few rows, or too few of a "
                "class, to say how sure the difference is."
            ]
        lines += [""]
    lines += _privacy(run, result, claim)
    lines += ["Try it: `quorate predict adapter TEXT`", ""]
    return "\n".join(lines)


def _privacy(run: RunConfig, result: Delivery, claim: PrivacyClaim | None) -> list[str]:
    """Return what is claimed for the data, by whom, and what it leaves out."""
    if run.privacy is None:
        said = [
            "None is claimed: no noise was added, so treat the adapter as derived from the data of all sites."
        ]
    elif isinstance(run.privacy, ClientPrivacy):
        claimed = "is not known here" if result.epsilon is None else f"epsilon {at_most(result.epsilon)}"
        said = [
            f"For each whole site, as the coordinator claims: {claimed}, delta "
            f"{delta_shown(run.privacy.delta)}, by noise that it added to the sum of clipped updates. It "
            "covers the adapters of all rounds of this run. It does not cover the coordinator, which saw "
            "every update without noise, figures on validation and test rows, and other runs on the same "
            f"sites. This site cannot check the claim. {_ACCOUNTANT}"
        ]
    elif claim is None:
        said = [
            f"For each {run.privacy.unit} of this site's training rows, by noise added here; how much could "
            "not be worked out again now, see this site's log and `quorate site ledger show`."
        ]
    else:
        said = [
            f"This site's own claim, by noise added here: {claim.sentence}. It covers what training sent in "
            "all rounds of this run. It does not cover numbers of rows, figures on validation and test rows, "
            "and other runs on the same rows, which `quorate site ledger show` counts together. "
            f"{_ACCOUNTANT}"
        ]
    return ["## Privacy", "", *said, ""]


def _table(result: Delivery, private_clients: bool) -> list[str]:
    """Return the figures, this site's beside those of all sites together."""
    lines = [f"| {result.split} rows | this site ({result.own_rows}) |", "| --- | ---: |"]
    if result.pooled:
        lines[0] += f" {result.sites} sites together ({result.pooled_rows}) |"
        lines[1] += " ---: |"
    for name in result.own | result.pooled:
        row = [f"| {name} | {_figure(result.own, name)} |"]
        row += [f" {_figure(result.pooled, name)} |"] if result.pooled else []
        lines.append("".join(row))
    if not result.pooled and private_clients:
        lines += ["", "Figures of all sites together hold no noise, so a run that hides sites tells none."]
    elif not result.pooled:
        lines += ["", "Figures of all sites together are told from three measured sites on: from those of "]
        lines[-1] += "two, each could work out the other's."
    return [*lines, ""]


def _figure(figures: dict[str, float], name: str) -> str:
    return f"{figures[name]:.4f}" if name in figures else "-"
