"""What a coordinator can ask of a site: names alone, which aggregation rules and messages share."""

from __future__ import annotations

from typing import Literal

Phase = Literal["join", "start", "fit", "evaluate", "alone", "finish"]
"""Describe yourself, send the start, train, evaluate, train an adapter of your own, keep the result."""
