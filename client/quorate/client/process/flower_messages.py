"""The client's side of Flower: a RecordDict holds one message of ours, as bytes. No torch here."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, RecordDict

from quorate.shared.errors import ProtocolError
from quorate.shared.protocol.messages import ARRAY, RECORD


def unwrap(content: RecordDict) -> bytes:
    """Return the bytes of the message in `content`.

    Raises: ProtocolError: there is none.
    """
    record = content.array_records.get(RECORD)
    if record is None or ARRAY not in record:
        raise ProtocolError("a Flower message without a Quorate message in it.")
    return bytes(record[ARRAY].data)


def wrap(message: bytes) -> RecordDict:
    """Return a RecordDict that carries `message` as an array, which Flower sends in chunks."""
    array = Array(dtype="uint8", shape=(len(message),), stype="safetensors", data=message)
    return RecordDict({RECORD: ArrayRecord({ARRAY: array})})
