"""What a site says of itself when it joins a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quorate.shared.config.run_config import RunConfig
from quorate.shared.model.lora_model import LoadedModel
from quorate.shared.privacy.claim import PrivacyClaim
from quorate.shared.protocol.messages import SiteDescription, Split
from quorate.shared.protocol.versions import versions
from quorate.shared.tasks.task import Example, Row


def describe(
    run: RunConfig,
    model: LoadedModel,
    examples: Mapping[Split, Sequence[Example]],
    used: Sequence[Row],
    there: int,
    claim: PrivacyClaim | None,
) -> SiteDescription:
    """Describe a site in counts and versions.

    Args:
        examples: split -> examples.
        used: the training rows that the run uses.
        there: how many training rows it has.
        claim: what it does for privacy, if anything; then only numbers of rows are told, as exact counts of
            labels, words or tokens would tell what the noise is there to hide.
    """
    return SiteDescription(
        rows={split: run.task.num_rows(each) for split, each in examples.items()},
        label_counts=run.task.label_counts(examples["train"]) if claim is None else {},
        model_files=model.files,
        model_sha256=model.sha256,
        start_hash=model.initial.content_hash,
        versions=versions(),
        notes=_notes(run, examples["train"], used, there) if claim is None else (),
        privacy=claim,
    )


def _notes(run: RunConfig, examples: Sequence[Example], used: Sequence[Row], there: int) -> tuple[str, ...]:
    counts = run.task.label_counts(examples)
    lacking = [label for label, count in counts.items() if count == 0]
    notes = run.task.notes(used, examples)
    if run.training.examples_per_class is not None:
        per = f"examples_per_class {run.training.examples_per_class}"
        notes = (f"trains on {len(used)} of its {there} training rows ({per})", *notes)
    if lacking:
        notes = (f"has no training row of: {', '.join(lacking)}", *notes)
    return notes
