"""Messages: what goes in comes out, and bytes that are not a message say so without quoting themselves."""

from __future__ import annotations

import json
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from refusals import refuses
from safetensors.numpy import save

from quorate.shared.adapters.adapter import Adapter, DType
from quorate.shared.errors import AdapterError, ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.protocol.messages import RequestHeader, RoundRequest, SiteDescription, Update

SECRET = "patient-4711"
ARRAYS = Adapter(
    {"b.lora_B.weight": np.eye(3, dtype=np.float32), "a.lora_A.weight": np.ones((1, 2), np.float32)}
)


def a_request(arrays: Adapter | None = ARRAYS, **fields: Any) -> RoundRequest:
    header: dict[str, Any] = {
        "run_id": "r1",
        "round": 3,
        "phase": "fit",
        "site": "north",
        "run_config": "{}",
        "config_hash": "0" * 64,
        **fields,
    }
    return RoundRequest(RequestHeader.model_validate(header), arrays)


def an_update(**fields: Any) -> Update:
    return Update.reply(a_request(), ARRAYS, num_examples=7, metrics={"train_loss": 0.1 + 0.2}, **fields)


def packed(header: dict[str, Any], arrays: Any = None) -> bytes:
    """A message as a stranger could write it."""
    return save(arrays or {}, metadata={"quorate": json.dumps(header)})


def header_of(message: Update) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(message.header.model_dump_json())
    return fields


def test_a_request_comes_back_as_it_went() -> None:
    sent = a_request(split="test", phase="evaluate")
    got = RoundRequest.decode(sent.encoded)
    assert got.header == sent.header
    assert got.arrays.content_hash == ARRAYS.content_hash
    # Equal but for the order of the safetensors metadata, which is random.
    assert sorted(got.encoded) == sorted(sent.encoded)


def test_an_update_comes_back_as_it_went() -> None:
    sent = an_update(
        outcomes=Outcomes.of_rows(np.array([[0, 1], [0, 1], [2, 2]]), 1.25),
        description=SiteDescription(
            rows={"train": 1, "validation": 0, "test": 2},
            label_counts={"krank, ja": 1},
            model_files={"model.safetensors": "ab"},
            model_sha256="ab",
            start_hash="ab" * 32,
            versions={"torch": "2"},
        ),
    )
    got = Update.decode(sent.encoded)
    assert got.header == sent.header and got.arrays.content_hash == ARRAYS.content_hash
    assert got.header.metrics["train_loss"] == 0.1 + 0.2, "floats keep their last bit"
    assert got.header.input_hash == ARRAYS.content_hash


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=8), st.lists(st.floats(width=32), max_size=4)))
def test_arrays_travel_bit_for_bit(values: dict[str, list[float]]) -> None:
    arrays = Adapter({name: np.array(value, dtype=np.float32) for name, value in values.items()})
    got = RoundRequest.decode(a_request(arrays).encoded).arrays
    assert got.schema == arrays.schema
    assert all(got[name].tobytes() == arrays[name].tobytes() for name in arrays)


def test_a_request_is_for_one_site() -> None:
    assert a_request().addressed_to("north").header.site == "north"
    assert a_request(site="").addressed_to("south").header.site == "south"
    with refuses(ProtocolError, "another-site") as caught:
        a_request().addressed_to("south")
    assert "south" in str(caught.value)


def test_every_truncation_is_refused() -> None:
    data = an_update().encoded
    for length in [*range(0, len(data), 7), len(data) - 1]:
        with pytest.raises(ProtocolError):
            Update.decode(data[:length])
    with pytest.raises(ProtocolError):
        Update.decode(data + b"more")


@given(st.data())
def test_an_edited_byte_is_refused_or_gives_another_whole_message(data: Any) -> None:
    """No edit raises anything but ProtocolError; values may change, which the server's checks look at."""
    message = bytearray(an_update().encoded)
    place = data.draw(st.integers(0, len(message) - 1))
    message[place] ^= data.draw(st.integers(1, 255))
    try:
        got = Update.decode(bytes(message))
    except ProtocolError:
        return
    again = Update.decode(got.encoded)
    assert again.header == got.header and again.arrays.content_hash == got.arrays.content_hash


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        RoundRequest.decode(data)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"protocol": 2}, "protocol"),
        ({"round": SECRET}, "round"),
        ({"num_examples": -1}, "num_examples"),
        ({"num_examples": 10**400}, "num_examples"),
        ({"phase": SECRET}, "phase"),
        ({"metrics": {"train_loss": None}}, "metrics.train_loss"),
        ({"error": f"ValueError: {SECRET} is not a number"}, "error"),
        ({"outcomes": {"values": [[1, 2]], "counts": []}}, "outcomes"),
        ({"note": SECRET}, "note"),
    ],
)
def test_a_wrong_header_is_named_by_its_field_alone(change: dict[str, Any], field: str) -> None:
    with refuses(ProtocolError, "wrong-header") as raised:
        Update.decode(packed({**header_of(an_update()), **change}))
    assert f" {field}" in str(raised.value).removeprefix(raised.value.where)
    assert SECRET not in str(raised.value)


def test_a_missing_field_is_named() -> None:
    header = header_of(an_update())
    del header["config_hash"]
    with refuses(ProtocolError, "wrong-header") as caught:
        Update.decode(packed(header))
    assert "protocol 1" in caught.value.where and " config_hash." in str(caught.value)


def test_a_request_is_no_update_and_the_other_way_round() -> None:
    with refuses(ProtocolError, "wrong-header") as caught:
        Update.decode(a_request().encoded)
    assert " Update " in caught.value.where
    with refuses(ProtocolError, "wrong-header") as caught:
        RoundRequest.decode(an_update().encoded)
    assert " RoundRequest " in caught.value.where


@pytest.mark.parametrize("dtype", ["float16", "int8", "uint16", "bool"])
def test_arrays_that_no_exchange_has_are_refused(dtype: str) -> None:
    with refuses(ProtocolError, "wrong-arrays") as caught:
        Update.decode(packed(header_of(an_update()), {"a": np.zeros(2, dtype)}))
    assert dtype in str(caught.value)


@pytest.mark.parametrize("dtype", get_args(DType))
def test_arrays_keep_their_dtype_which_is_part_of_what_they_are(dtype: DType) -> None:
    sent = Update.decode(packed(header_of(an_update()), {"a": np.arange(2, dtype=dtype)})).arrays
    assert sent["a"].dtype == dtype
    sent.check_schema({"a": (2,)}, dtype)
    if dtype != "float32":
        with refuses(AdapterError, "wrong-dtype"):
            sent.check_schema({"a": (2,)})
        assert sent.fingerprint != Adapter({"a": np.arange(2, dtype=np.float32)}).fingerprint


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_dtypes_that_numpy_lacks_are_refused(dtype: str) -> None:
    meta = {"quorate": json.dumps(header_of(an_update()))}
    size = 2 if dtype == "BF16" else 1
    header = {"__metadata__": meta, "a": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with refuses(ProtocolError, "wrong-arrays") as caught:
        Update.decode(len(text).to_bytes(8, "little") + text + b"\0" * size)
    assert dtype in str(caught.value)


def by_hand(header: dict[str, Any], body: bytes = b"") -> bytes:
    """A safetensors file that its library would not write."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "data",
    [
        by_hand({"__metadata__": None}),
        by_hand({"a": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}, bytes(4)),
        by_hand({"a": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}}),
    ],
    ids=["no metadata", "65 dimensions", "a dimension of 2**62"],
)
def test_what_safetensors_takes_and_nobody_writes_is_refused(data: bytes) -> None:
    # Another error than ours would end a coordinator's run: any site could do that.
    with pytest.raises(ProtocolError):
        Update.decode(data)


@pytest.mark.parametrize("round", [10**9 + 1, 2**63, 2**70])
def test_a_round_is_a_number_that_can_be_kept(round: int) -> None:
    with pytest.raises(ValidationError) as caught:
        RequestHeader.model_validate({**a_request().header.model_dump(), "round": round})
    assert [error["loc"] for error in caught.value.errors()] == [("round",)]
