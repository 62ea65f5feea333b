"""What the coordinator asks a site, and what the site answers; one safetensors blob each.

The header is JSON in the safetensors metadata, the arrays are the tensors. Whoever carries a message
(Flower's ClientApp, a Unix socket) carries bytes and needs none of torch, transformers or peft.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Generic, Literal, Self, TypeVar

from pydantic import Field, StringConstraints, ValidationError

from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.config_model import ConfigModel
from quorate.shared.errors import AdapterError, ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.privacy.claim import PrivacyClaim
from quorate.shared.protocol.phases import Phase

PROTOCOL: Literal[1] = 1
Split = Literal["train", "validation", "test"]
RECORD, ARRAY = "quorate", "message"
"""Where a Flower RecordDict carries a message: the name of its array record, and of the array in it."""
BEST_ROUND = "best_round"
"""Figure in the answer to `alone`: the round that the measured adapter is of."""
ERROR_CODE = r"^[a-z][a-z-]{0,39}$"
"""What may leave a site of an error: too short to hold its text."""
ErrorCode = Annotated[str, StringConstraints(pattern=ERROR_CODE)]
Count = Annotated[int, Field(ge=0, le=2**53)]
"""A number of rows or steps; up to 2**53 a float64 weight holds it exactly."""
Short = Annotated[str, StringConstraints(max_length=100)]
"""Text that a reason may quote."""
Release = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z.+!_-]{0,64}$")]
"""A version; it is shown on terminals and in logs, and holds nothing that could steer them."""
MetricName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_./-]{1,64}$")]
"""Names of figures stand in the record, and trackers make tags of them."""
_HEADER = "quorate"
H = TypeVar("H", bound=ConfigModel)


class Delivery(ConfigModel):
    """What a site is told of a finished run: its own figures and pooled ones, nothing of another site."""

    rounds: int = Field(ge=0)
    """Rounds of the run."""
    best_round: int = Field(ge=0)
    """The round that the model is of."""
    metric: MetricName
    """The metric that picked it."""
    split: Split | None = None
    """The rows that the figures are on; None where nothing was measured."""
    sites: Count = 0
    """Sites that were measured."""
    own: dict[MetricName, float] = {}
    """The model's figures on this site's rows."""
    own_rows: Count = 0
    """This site's rows."""
    pooled: dict[MetricName, float] = {}
    """The model's figures on all sites' rows; empty where fewer than three sites were measured, as each of
    two could subtract its own."""
    pooled_rows: Count = 0
    """All sites' rows; 0 where `pooled` is empty."""
    local_only: float | None = None
    """`metric` of an adapter trained on this site's rows alone, where that was measured."""
    gain: tuple[float, float, float] | None = None
    """What the federation brought: gain over `local_only`, and its 95 % interval."""
    epsilon: float | None = Field(None, ge=0)
    """What the coordinator claims of site-level privacy, at the run's delta; None without it."""


class RequestHeader(ConfigModel):
    """Everything of a request but its arrays."""

    protocol: Literal[1] = PROTOCOL
    """Version of this message format."""
    run_id: str
    """Which run this is; outlives restarts of the coordinator."""
    round: int = Field(ge=0, le=10**9)
    """Round, from 1; 0 while sites join."""
    phase: Phase
    """What is asked."""
    site: str
    """The site that is asked; empty while joining, when the coordinator knows nodes but not yet names."""
    split: Split | None = None
    """Rows to evaluate on."""
    versions: dict[str, Release] = {}
    """Releases that the coordinator runs, said in `join`."""
    run_config: str
    """The run configuration as canonical JSON."""
    config_hash: str
    """SHA-256 of `run_config`."""
    delivery: Delivery | None = None
    """What goes with the result of the run (finish)."""


class SiteDescription(ConfigModel):
    """What a site says of itself when it joins a run: counts and versions, never rows."""

    rows: dict[Split, Count]
    """Usable rows per split."""
    label_counts: dict[str, Count]
    """Training rows per label name, zeros included; empty under record- or group-level privacy."""
    model_files: dict[str, str]
    """SHA-256 of each file of the base model that the site uses."""
    model_sha256: str
    """SHA-256 of the base model's weights, as in the run file."""
    start_hash: str = ""
    """Content hash of the adapter's seeded start; the arrays themselves are asked of one site (start). Empty
    in records of releases before it alone."""
    versions: dict[str, Release]
    """Versions of quorate, torch, transformers, peft."""
    notes: tuple[str, ...] = ()
    """What a reader of the report should know: classes the site lacks, texts cut off; none under privacy."""
    privacy: PrivacyClaim | None = None
    """What the site will do under record- or group-level privacy, and what it claims for that."""


class UpdateHeader(ConfigModel):
    """Everything of an answer but its arrays."""

    protocol: Literal[1] = PROTOCOL
    """Version of this message format."""
    run_id: Short
    """The request's run."""
    round: int
    """The request's round."""
    phase: Phase
    """The request's phase."""
    site: Short
    """Who answers."""
    config_hash: Short
    """Hash of the run configuration the site worked under."""
    input_hash: Short
    """Content hash of the arrays the site started from."""
    error: ErrorCode | None = None
    """Error code when the site could not do what was asked; all other fields are then empty."""
    num_examples: Count = 0
    """Training rows of the site (fit) or rows evaluated (evaluate, alone); public, under privacy too."""
    num_tokens: Count = 0
    """Tokens whose loss is trained in the site's training rows (fit), for tasks that count them."""
    num_steps: Count = 0
    """Optimiser steps taken."""
    metrics: dict[MetricName, float] = {}
    """Figures of the training, such as `train_loss` and `grad_norm`; under privacy none that rows decide."""
    seconds: float = Field(0.0, ge=0)
    """Time the site worked on the request; a stacked pass is shared out equally. None under record- or
    group-level privacy."""
    outcomes: Outcomes | None = None
    """Result of an evaluation."""
    description: SiteDescription | None = None
    """Answer to `join`."""


class Message(Generic[H]):
    """A header with arrays."""

    header_type: type[H]

    def __init__(self, header: H, arrays: Adapter | None = None) -> None:
        self.header = header
        self.arrays = Adapter({}) if arrays is None else arrays

    @cached_property
    def encoded(self) -> bytes:
        """The message as it travels."""
        return self.arrays.to_bytes({_HEADER: self.header.model_dump_json()})

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse a message.

        Raises: ProtocolError: the bytes are not such a message; the text quotes no values.
        """
        try:
            arrays = Adapter.from_bytes(data)  # also proves that the JSON header in front is well formed
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}  # may be null
            header = cls.header_type.model_validate_json(metadata.get(_HEADER, ""))
        except ValidationError as error:
            fields = ", ".join(".".join(map(str, e["loc"])) or e["type"] for e in error.errors())
            message = f"not a {cls.__name__} of protocol {PROTOCOL}: check {fields}."
            raise ProtocolError(message, kind="wrong-header") from None
        except AdapterError as error:
            raise ProtocolError(f"not a {cls.__name__}: {error}", kind="wrong-arrays") from error
        return cls(header, arrays)


class RoundRequest(Message[RequestHeader]):
    """A question to one site, with the arrays it starts from."""

    header_type = RequestHeader

    def addressed_to(self, site: str) -> RoundRequest:
        """Return this request as `site` must see it.

        Raises: ProtocolError: it names another site.
        """
        if self.header.site == site:
            return self
        if self.header.site:
            raise ProtocolError(f"a request for another site reached {site}.", kind="another-site")
        return RoundRequest(self.header.model_copy(update={"site": site}), self.arrays)


class Update(Message[UpdateHeader]):
    """A site's answer, with the arrays it trained."""

    header_type = UpdateHeader

    @classmethod
    def reply(cls, request: RoundRequest, arrays: Adapter | None = None, **fields: object) -> Update:
        """Answer `request`; `fields` are those of UpdateHeader that are not the request's own."""
        asked = request.header
        header = UpdateHeader.model_validate(
            {
                "run_id": asked.run_id,
                "round": asked.round,
                "phase": asked.phase,
                "site": asked.site,
                "config_hash": asked.config_hash,
                "input_hash": request.arrays.content_hash,
                **fields,
            }
        )
        return cls(header, arrays)
