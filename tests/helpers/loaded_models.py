"""Models for tests that load the same one many times: a copy takes a quarter of the time of loading."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache

from quorate.shared.config.run_config import RunConfig
from quorate.shared.model import lora_model
from quorate.shared.model.lora_model import LoadedModel


def load_model(run: RunConfig) -> LoadedModel:
    """As `lora_model.load_model`: the model is the caller's own, and as freshly loaded."""
    return deepcopy(_loaded(run.model_dump_json()))


@lru_cache(maxsize=4)
def _loaded(run: str) -> LoadedModel:
    return lora_model.load_model(RunConfig.model_validate_json(run))
