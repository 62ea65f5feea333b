"""The adapter value: named arrays, what sites train and the server aggregates.

Names are PEFT's own as `save_pretrained` writes them (`base_model.model.….lora_A.weight`), so an adapter
saved to disk is one that `PeftModel.from_pretrained` reads. A value is never changed in place.

What is trained is float32, and `check_schema` says so of what comes from elsewhere. An exchange of other
things names its own dtype: exact sums travel in float64, masked ones in integers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from math import prod
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from quorate.shared.errors import AdapterError, NonFiniteUpdate

Array = npt.NDArray[np.float32]
DType = Literal["float32", "float64", "int32", "int64", "uint32", "uint64"]
"""What the arrays of a message may hold."""
_DTYPES = frozenset(map(np.dtype, get_args(DType)))

LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"
LORA_MAGNITUDE = ".lora_magnitude_vector"


class Adapter(Mapping[str, Array]):
    """An immutable mapping from array name to array, in sorted order of names.

    Shapes: LoRA A is [r, d_in], B is [d_out, r]; head arrays have their layer's own shape.
    Raises: AdapterError: for an array of another dtype than those of `DType`.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        for name, array in arrays.items():
            if array.dtype not in _DTYPES:
                raise AdapterError(f"adapter array {_shown(name)} has dtype {array.dtype}; expected float32.")
        self._arrays = {name: arrays[name] for name in sorted(arrays)}

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Adapter({len(self)} arrays, {self.num_bytes} bytes, {self.content_hash[:12]})"

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays, without names or headers."""
        return sum(array.nbytes for array in self._arrays.values())

    @property
    def schema(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every array."""
        return {name: array.shape for name, array in self._arrays.items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and dtypes: equal for adapters that can be aggregated together."""
        described: dict[str, object] = dict(self.schema)
        if other := {n: array.dtype.name for n, array in self.items() if array.dtype != np.float32}:
            described = {"shapes": described, "dtypes": other}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over names, shapes and values: equal for adapters that are equal bit for bit."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for array in self._arrays.values():
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @cached_property
    def l2_norm(self) -> float:
        """Global L2 norm over all arrays concatenated [parameter units], summed in float64."""
        return float(np.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in self.values())))

    def map(self, function: Callable[[str, Array], Array]) -> Adapter:
        """Return the adapter of `function(name, array)` for every array."""
        return Adapter({name: function(name, array) for name, array in self.items()})

    def subset(self, names: Iterable[str]) -> Adapter:
        """Return the adapter of those arrays alone.

        Raises: AdapterError: naming the arrays that are not there.
        """
        wanted = list(names)
        if missing := [name for name in wanted if name not in self._arrays]:
            raise AdapterError(f"adapter has no array {', '.join(missing[:3])}; it has {len(self)} arrays.")
        return Adapter({name: self._arrays[name] for name in wanted})

    def updated(self, other: Mapping[str, Array]) -> Adapter:
        """Return this adapter with the arrays of `other` put over it."""
        return Adapter({**self._arrays, **other})

    def cropped(self, schema: Mapping[str, tuple[int, ...]]) -> Adapter:
        """Return the arrays of `schema` alone, each with the first entries along every axis.

        Raises: AdapterError: an array is not there, or smaller than that.
        """
        if self.schema == schema:
            return self  # with the hash that is known of it
        cut = {}
        for name, array in self.subset(schema).items():
            cut[name] = array[tuple(slice(size) for size in schema[name])]
        small = Adapter(cut)
        small.check_schema(schema, None)
        return small

    def padded(self, schema: Mapping[str, tuple[int, ...]]) -> Adapter:
        """Return the arrays with zeros after their last entries, up to the shapes of `schema`.

        Raises: AdapterError: other arrays than those, or a larger one.
        """
        if self.schema == schema:
            return self

        def pad(name: str, array: Array) -> Array:
            wanted = schema.get(name, ())
            if len(wanted) != array.ndim or any(map(int.__gt__, array.shape, wanted)):
                return array  # the check below names it
            return np.pad(array, [(0, size - own) for size, own in zip(wanted, array.shape, strict=True)])

        whole = self.map(pad)
        whole.check_schema(schema, None)
        return whole

    def minus(self, other: Adapter) -> Adapter:
        """Return the difference to `other` over this adapter's arrays."""
        return self.map(lambda name, array: np.asarray(array - other[name], dtype=np.float32))

    def check_finite(self) -> None:
        """Raise NonFiniteUpdate, naming the first bad array, if a value is NaN or infinite."""
        for name, array in self.items():
            if not np.isfinite(array).all():
                raise NonFiniteUpdate(f"array {_shown(name)} holds NaN or infinity.")

    def check_schema(self, expected: Mapping[str, tuple[int, ...]], dtype: DType | None = "float32") -> None:
        """Raise AdapterError, naming the first array that is missing, unexpected, of another shape or dtype.

        With `dtype` None it may be any.
        """
        for name in sorted(expected.keys() | self._arrays.keys()):
            if name not in self._arrays:
                raise AdapterError(f"array {name} is missing.")
            if name not in expected:
                raise AdapterError(f"array {_shown(name)} is not part of this run's adapter.")
            array, wanted = self._arrays[name], list(expected[name])
            if list(array.shape) != wanted:
                raise AdapterError(f"array {name} has shape {list(array.shape)}; expected {wanted}.")
            if dtype is not None and array.dtype != dtype:
                message = f"array {name} has dtype {array.dtype}; expected {dtype}."
                raise AdapterError(message, kind="wrong-dtype")

    def to_bytes(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """Serialise as safetensors."""
        arrays = {name: np.ascontiguousarray(array) for name, array in self._arrays.items()}
        return save(arrays, metadata={"format": "pt", **(metadata or {})})

    @classmethod
    def from_bytes(cls, data: bytes) -> Adapter:
        """Parse safetensors bytes.

        Raises: AdapterError: the bytes are not safetensors, or of a dtype that no message has.
        """
        try:
            return cls(load(data))
        except SafetensorError as error:
            raise AdapterError(f"these bytes are not a safetensors file: {error}") from error
        except KeyError as error:  # safetensors looks the dtype up in a table without bfloat16 and float8
            raise AdapterError(f"an array has dtype {error}; expected float32.") from error
        except ValueError as error:  # well formed, but of a shape that numpy does not have
            raise AdapterError("an array has too many or too large dimensions.") from error


def _shown(name: str) -> str:
    """Return a name for a message: what a site sent may be long, or hold a terminal's control characters."""
    return name if len(name) <= 200 and name.isprintable() else f"{name[:100]!r}..."


def num_values(schema: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many numbers arrays of these shapes hold together."""
    return sum(prod(shape) for shape in schema.values())


def is_lora_a(name: str) -> bool:
    """Whether `name` is the A factor ([r, d_in]) of a LoRA pair."""
    return name.endswith(LORA_A)


def is_lora_b(name: str) -> bool:
    """Whether `name` is the B factor ([d_out, r]) of a LoRA pair."""
    return name.endswith(LORA_B)


def lora_layers(names: Iterable[str]) -> list[str]:
    """Return the sorted names of adapted layers, without the `.lora_A.weight` ending.

    Raises: AdapterError: naming a layer whose A or B factor is missing.
    """
    present = set(names)
    layers = sorted({re.sub(r"\.lora_[AB]\.weight$", "", n) for n in present if is_lora_a(n) or is_lora_b(n)})
    for layer in layers:
        for ending in (LORA_A, LORA_B):
            if layer + ending not in present:
                raise AdapterError(f"layer {layer} has no {ending[1:]} array: both LoRA factors are needed.")
    return layers


def saved_modules(names: Iterable[str]) -> list[str]:
    """Return the sorted names, inside the base model, of modules that are trained whole."""
    whole = (n for n in names if not (is_lora_a(n) or is_lora_b(n) or n.endswith(LORA_MAGNITUDE)))
    return sorted({name.removeprefix("base_model.model.").rpartition(".")[0] for name in whole})
