"""What must not stand beside `privacy:` in a run file, because the claim would not hold.

DP-SGD bounds what one unit does to a step by clipping its gradient. All of that is in vain where a unit also
changes other units' losses, which of them are used, or what the site sends besides its arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quorate.shared.config.privacy_config import ClientPrivacy

if TYPE_CHECKING:
    from quorate.shared.config.run_config import RunConfig


def check_privacy_rules(run: RunConfig) -> None:
    """Raise ValueError, with reason and remedy, for a setting under which the privacy would not hold."""
    privacy = run.privacy
    if privacy is None:
        return
    if isinstance(privacy, ClientPrivacy):
        privacy.check_fits(run.aggregation, run.evaluation)
        return
    if privacy.unit == "record" and privacy.max_records_per_group != 1:
        raise ValueError(
            "privacy.max_records_per_group belongs to privacy.unit group; leave it out, or set unit: group"
        )
    if why := _unsound(run):
        raise ValueError(f"privacy.unit {privacy.unit}: {why}")


def _unsound(run: RunConfig) -> str | None:
    training = run.training
    if training.sampling == "balanced":
        return (
            "training.sampling balanced draws a row more often the rarer its label is at the site, and the "
            "claim needs every unit drawn by a coin of its own; use shuffle"
        )
    if training.examples_per_class is not None:
        return "training.examples_per_class lets a row decide which other rows are used; leave it out"
    if training.base_dropout:
        return (
            "training.base_dropout puts the whole base in training mode, where it cannot be shown that rows "
            "do not mix; use adapter.lora_dropout"
        )
    if run.model.load_in_8bit:
        return (
            "model.load_in_8bit computes in full precision whatever columns stand out in any row of a batch "
            "(LLM.int8()), so a row changes the others; use load_in_4bit, or neither"
        )
    if run.aggregation.weighting == "tokens":
        return (
            "aggregation.weighting tokens has sites send how many tokens their rows have, to which no noise "
            "is added; use examples or uniform"
        )
    return run.task.mixes_rows
