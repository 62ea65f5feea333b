"""Everything that leaves a site in its answers, and what becomes of it under record- or group-level privacy.

The table is held against the messages' own schema: a field without an entry fails a test, and so does one
that is said to be withheld and is not. docs/what-leaves.md is rendered from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from quorate.shared.config.config_model import ConfigModel

Treatment = Literal["public", "noised", "withheld under privacy", "not covered"]
"""Under record- or group-level privacy:

public: follows from the run, the release and numbers of rows, which are taken as public.
noised: made by the mechanism that the claim is of.
withheld under privacy: empty then.
not covered: may follow from rows, without noise, and the claim does not cover it.
"""


@dataclass(frozen=True)
class Item:
    """One thing that leaves a site.

    Args:
        treatment: under record- or group-level privacy.
        what: in words.
    """

    treatment: Treatment
    what: str


def schema_paths(model: type[ConfigModel], before: str = "") -> Iterator[str]:
    """Yield the fields of a message's header, those of a section within it as `section.field`."""
    for name, field in model.model_fields.items():
        parts = (field.annotation, *get_args(field.annotation))
        sections = [part for part in parts if isinstance(part, type) and issubclass(part, ConfigModel)]
        for section in sections:
            yield from schema_paths(section, f"{before}{name}.")
        if not sections:
            yield f"{before}{name}"


_ROWS = "figures on validation and test rows; none with `evaluation.share_outcomes: false`"
_OF_CLAIM = "of the mechanism, which follows from the run and the number of units"

FIELDS: dict[str, Item] = {
    "protocol": Item("public", "version of the message format"),
    "run_id": Item("public", "of the request"),
    "round": Item("public", "of the request"),
    "phase": Item("public", "of the request"),
    "site": Item("public", "the site's name"),
    "config_hash": Item("public", "hash of the configuration that the site worked under"),
    "input_hash": Item("public", "hash of the adapter that it started from"),
    "error": Item("not covered", "a code of at most 40 letters; that a row cannot be used shows in it"),
    "num_examples": Item("public", "number of training rows, or of rows measured"),
    "num_tokens": Item("withheld under privacy", "number of tokens that are learnt"),
    "num_steps": Item("public", "optimiser steps"),
    "metrics": Item("public", "figures of the training, see below"),
    "seconds": Item("withheld under privacy", "how long the site worked"),
    "outcomes.values": Item("not covered", f"which outcomes there were; {_ROWS}"),
    "outcomes.counts": Item("not covered", f"how often each was; {_ROWS}"),
    "outcomes.loss_sum": Item("not covered", f"sum of losses; {_ROWS}"),
    "outcomes.num_rows": Item("public", "number of rows measured"),
    "outcomes.sums": Item(
        "not covered", f"further sums, of entities those of products of a sentence's counts; {_ROWS}"
    ),
    "description.rows": Item("public", "number of rows of each split"),
    "description.label_counts": Item("withheld under privacy", "training rows of each label"),
    "description.model_files": Item("public", "SHA-256 of each file of the base model"),
    "description.model_sha256": Item("public", "SHA-256 of the base model's weights"),
    "description.start_hash": Item("public", "hash of the adapter's start, drawn from the run's seed"),
    "description.versions": Item("public", "releases of quorate, torch, transformers and peft"),
    "description.notes": Item("withheld under privacy", "sentences of ours with counts of rows in them"),
    "description.privacy.unit": Item("public", "of the run"),
    "description.privacy.units": Item("public", "number of records or groups"),
    "description.privacy.epsilon": Item("public", f"the claim; {_OF_CLAIM}"),
    "description.privacy.delta": Item("public", f"the claim; {_OF_CLAIM}"),
    "description.privacy.accountant": Item("public", "how epsilon was computed"),
    "description.privacy.noise_multiplier": Item("public", _OF_CLAIM),
    "description.privacy.sampling_probability": Item("public", _OF_CLAIM),
    "description.privacy.steps": Item("public", _OF_CLAIM),
    "description.privacy.clipping_norm": Item("public", "of the run"),
}
"""Field of an answer's header -> what it is."""

METRICS: dict[str, Item] = {
    "train_loss": Item("withheld under privacy", "mean loss of the training rows"),
    "grad_norm": Item("withheld under privacy", "mean norm of the gradients"),
    "learning_rate": Item("public", "of the last step, by the run's schedule"),
    "noise_multiplier": Item("public", _OF_CLAIM),
    "clipping_norm": Item("public", "of the run"),
    "sampling_probability": Item("public", _OF_CLAIM),
    "best_round": Item(
        "withheld under privacy", "round that an adapter trained alone is of; never asked then"
    ),
}
"""Name in `metrics` of an answer -> what it is."""

BESIDE: dict[str, Item] = {
    "arrays of a start": Item("public", "the adapter's start, drawn from the run's seed; asked of one site"),
    "arrays of statistics": Item(
        "withheld under privacy",
        "exact sums over rows of products of features, and of features and targets; never asked then",
    ),
    "arrays of a round": Item("noised", "the trained adapter"),
    "size of an answer": Item("public", "follows from the run, and the lengths of numbers in the header"),
    "time of an answer": Item(
        "not covered", "depends on the rows that were drawn; `policy.answer_grid_seconds` makes it coarse"
    ),
    "address, and when the machine is up": Item("public", "seen by the server and by the network"),
}
"""What leaves beside the header's fields -> what it is."""


def rendered() -> str:
    """Return the tables as Markdown, for docs/what-leaves.md."""
    parts = []
    for title, items in (("Field", FIELDS), ("In `metrics`", METRICS), ("Besides", BESIDE)):
        quote = "" if items is BESIDE else "`"
        lines = [f"| {title} | under record- or group-level privacy | |", "|---|---|---|"]
        lines += [
            f"| {quote}{name}{quote} | {item.treatment} | {item.what} |" for name, item in items.items()
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
