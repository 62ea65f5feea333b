"""A request as handlers and engines see it: decoded once, its configuration read and held to its hash.

Bytes are decoded at the edge alone (the socket, the in-process grid). No torch is imported before a
configuration is read.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, Self, final

from pydantic import ValidationError

from quorate.shared.adapters.adapter import Adapter
from quorate.shared.aggregation import GlobalState
from quorate.shared.errors import ProtocolError, QuorateError
from quorate.shared.protocol.messages import RequestHeader, RoundRequest, Update, UpdateHeader

if TYPE_CHECKING:
    from quorate.shared.config.run_config import RunConfig

log = logging.getLogger(__name__)

_LONGEST_CONFIG = 2**20
"""Characters of a run's configuration: it is kept, for a person to read."""


@final
class Request(RoundRequest):
    """A question to one site, with the run that it belongs to.

    Args:
        run: the configuration that the header carries.
        header: everything else but the arrays.
        arrays: what the site starts from.
    """

    def __init__(self, run: RunConfig, header: RequestHeader, arrays: Adapter | None = None) -> None:
        super().__init__(header, arrays)
        self.run = run

    @classmethod
    def read(cls, message: RoundRequest) -> Self:
        """Read the configuration of a message.

        Raises: ProtocolError: it is not valid, or not what its hash says; no value is quoted.
        """
        from quorate.shared.config.run_config import RunConfig

        header = message.header
        if len(header.run_config) > _LONGEST_CONFIG:
            raise ProtocolError(
                f"a run configuration of more than {_LONGEST_CONFIG} characters.", kind="config-too-long"
            )
        try:
            run = RunConfig.model_validate_json(header.run_config)
        except ValidationError as error:
            fields = sorted({".".join(map(str, each["loc"][:3])) or each["type"] for each in error.errors()})
            raise ProtocolError(
                f"the run configuration does not validate here: {', '.join(fields[:5])}; is this site's "
                "release of quorate the coordinator's?"
            ) from None
        if run.content_hash != header.config_hash or run.canonical_json() != header.run_config:
            raise ProtocolError("the configuration does not have the hash that the request names.")
        return cls(run, header, message.arrays)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse a message and read its configuration.

        Raises: ProtocolError: as `RoundRequest.decode` and `read`.
        """
        return cls.read(RoundRequest.decode(data))

    @cached_property
    def state(self) -> GlobalState:
        """The arrays as adapter and residual; what is missing, a site has from its seeded start."""
        return GlobalState.from_sent(self.arrays)


class Handler(Protocol):
    """A link of the chain before the engine, or its end."""

    def handle(self, request: Request) -> Update:
        """Answer one request; one that is refused, or fails, by its code."""
        ...


class Failed(Update):
    """An answer that is a code alone.

    Args:
        why: the same in words, which stay here.
    """

    def __init__(self, header: UpdateHeader, why: str) -> None:
        super().__init__(header)
        self.why = why


def failed(request: RoundRequest, error: Exception) -> Failed:
    """Return the answer of a site that could not do what was asked: a code. The text goes to the log here."""
    code = error.code if isinstance(error, QuorateError) else "internal"
    log.error(
        "site %s, run %.66r, round %d, %s: %s",
        request.header.site,
        request.header.run_id,
        request.header.round,
        request.header.phase,
        error,
        exc_info=code == "internal",
    )
    return Failed(Update.reply(request, error=code).header, str(error))
