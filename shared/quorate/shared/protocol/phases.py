"""What a coordinator can ask of a site: names alone, which aggregation rules and messages share."""

from __future__ import annotations

from typing import Literal

Phase = Literal["join", "start", "statistics", "fit", "evaluate", "alone", "finish"]
"""Describe yourself, send the start, send sums to solve the head from, train, evaluate, train an adapter of
your own, keep the result."""
