"""Read tensors from a safetensors file. Its header is checked before any tensor is read; a SHA-256 covers everything.

    length u64 | header, JSON: name -> {dtype, shape, data_offsets}, "__metadata__" -> {name: text} | data

The header is parsed here and not by the safetensors library, for three reasons. A model file is untrusted input, so
every limit must be checked before memory is allocated. The same parser must check and read, so that exactly what was
checked is read. And listing models must import neither torch nor NumPy.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hpcmref.errors import CheckpointError

if TYPE_CHECKING:
    import hashlib

    from numpy.typing import NDArray

MAX_HEADER = 2**22
"""Bytes of the header. One tensor takes about 120, and the largest preset has about 600 tensors."""

MAX_FILE = 2**30
"""Bytes of the whole file. The largest preset in float32 has 0.4 * 2^30."""

MAX_LEVELS = 16
"""The deepest nesting of arrays and objects in the JSON."""

DTYPES = {"I8": "<i1", "I16": "<i2", "I32": "<i4", "F16": "<f2", "F32": "<f4"}
"""Names of element types in the header -> NumPy's names. Model files hold no other types."""

_LENGTH = 8
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """One tensor of the header. start: offset of its first byte from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class TensorFile:
    """An open model file whose header has been read and is consistent with the size of the file."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]
    size: int
    _stream: BinaryIO
    _data: int

    def read(self) -> dict[str, NDArray[Any]]:
        """Read all tensors by name, in their shapes and in the byte order of this machine.

        Raises CheckpointError if the file got shorter.
        """
        import numpy as np

        data = bytearray(self.size - self._data)
        self._stream.seek(self._data)
        if self._stream.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise CheckpointError(f"{self.path} became shorter while it was read.")
        arrays = {}
        for name, entry in self.entries.items():
            dtype = np.dtype(DTYPES[entry.dtype])
            array = np.frombuffer(data, dtype, math.prod(entry.shape), entry.start).reshape(entry.shape)
            arrays[name] = array.astype(dtype.newbyteorder("="), copy=False)
        return arrays

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file, in hexadecimal."""
        import hashlib

        digest = hashlib.sha256()
        self._stream.seek(0)
        while block := self._stream.read(2**20):
            digest.update(block)
        return digest.hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a model file and check its header against the size of the file; no tensor is read.

    Raises CheckpointError if the path is not a regular file, cannot be read or is larger than MAX_FILE. Raises it also
    if the header is longer than MAX_HEADER, is not valid JSON, or describes tensors of other types, or tensors that
    overlap, leave gaps or do not end where the file ends.
    """
    try:
        stream = path.open("rb", buffering=0) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if stream is None:
        raise CheckpointError(f"{path} cannot be read: it is not a file.")
    with stream:
        try:
            yield _described(path, stream)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _described(path: Path, stream: Any) -> TensorFile:
    """Read the header of an open file. Raises CheckpointError, OSError."""
    status = os.fstat(stream.fileno())
    start = stream.read(_LENGTH)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
        raise CheckpointError(f"{path} is no model file: it has more than {MAX_FILE} bytes.")
    if len(start) < _LENGTH:
        found = f"has only {len(start)} byte{'s' * (len(start) != 1)}" if start else "is empty"
        raise CheckpointError(f"{path} is damaged or no safetensors file: it {found}.")
    length = int.from_bytes(start, "little")
    data = _LENGTH + length
    if length > MAX_HEADER or data > status.st_size:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file: its header says that it has {length} bytes; it may have "
            f"{min(MAX_HEADER, status.st_size - _LENGTH)}."
        )
    try:
        metadata, entries = _parsed(strict_json(stream.read(length)), status.st_size - data)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}.") from error
    return TensorFile(path, metadata, entries, status.st_size, stream, data)


def strict_json(text: bytes | str) -> Any:
    """Parse JSON (UTF-8). Raises ValueError also for repeated names, NaN, infinity and more than MAX_LEVELS levels."""
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_not_a_number, parse_float=_finite)
    except RecursionError:
        value = None
    level = [value]
    for _ in range(MAX_LEVELS):
        level = [inner for outer in level for inner in _inside(outer)]
    if level or value is None:
        raise ValueError("its JSON has too many levels, or is null")
    return value


def _inside(value: Any) -> Iterable[Any]:
    """The elements of an array, or the values of an object."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _not_a_number(number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("its JSON has a name twice")
    return values


def _not_a_number(name: str) -> Any:
    raise ValueError(f"its JSON holds {name:.40}")


def _parsed(header: Any, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and tensors of a header; size: bytes of the data. Raises ValueError."""
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    entries = {name: _entry(name, description) for name, description in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, _bytes_of(item[1]))):
        if entry.start != end:
            raise ValueError(f"the tensor {name!r:.100} overlaps another one, or there is a gap before it")
        end += _bytes_of(entry)
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, and the file has {size} for them")
    return metadata, entries


def _entry(name: str, description: Any) -> Entry:
    """One tensor of the header. Raises ValueError."""
    wrong = ValueError(f"the tensor {name!r:.100} is not described as safetensors prescribes")
    if not isinstance(description, dict) or set(description) != {"dtype", "shape", "data_offsets"}:
        raise wrong
    dtype, shape, offsets = (description[key] for key in ("dtype", "shape", "data_offsets"))
    for numbers, most in ((shape, 8), (offsets, 2)):
        whole = isinstance(numbers, list) and len(numbers) <= most
        if not whole or not all(type(number) is int and 0 <= number <= MAX_FILE for number in numbers):
            raise wrong
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"the tensor {name!r:.100} has the type {dtype!r:.100}; model files have {', '.join(DTYPES)}")
    entry = Entry(dtype, tuple(shape), offsets[0] if offsets else 0)
    if offsets != [entry.start, entry.start + _bytes_of(entry)]:
        raise ValueError(f"the tensor {name!r:.100} has not as many bytes as its shape says")
    return entry


def _bytes_of(entry: Entry) -> int:
    return math.prod(entry.shape) * int(DTYPES[entry.dtype][-1])


def digest(text: str, arrays: Mapping[str, NDArray[Any]]) -> hashlib._Hash:
    """Return the SHA-256 of a text and of tensors.

    For each tensor, in the order of their names, it covers the name, type, shape and little-endian bytes. It does not
    depend on where a tensor lies in the file.
    """
    import hashlib

    import numpy as np

    result = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        result.update(f"{name} {array.dtype.name} {array.shape}".encode())
        result.update(np.asarray(array, array.dtype.newbyteorder("<"), order="C").data)
    return result
