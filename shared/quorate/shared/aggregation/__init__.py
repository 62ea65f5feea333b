"""Aggregation rules, each in one file; `AggregationRule` is their union as a run file sees it."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from quorate.shared.aggregation.fedavg import FedAvg
from quorate.shared.aggregation.fedex import FedEx
from quorate.shared.aggregation.ffa import FFA
from quorate.shared.aggregation.reptile import Reptile
from quorate.shared.aggregation.rule import Aggregator, GlobalState

AggregationRule = Annotated[FedAvg | FFA | FedEx | Reptile, Field(discriminator="name")]
RULES: tuple[type[Aggregator], ...] = get_args(get_args(AggregationRule)[0])
"""The members of the union."""

__all__ = ["FFA", "RULES", "AggregationRule", "Aggregator", "FedAvg", "FedEx", "GlobalState", "Reptile"]
