"""The range coder of this package: `librans/rans.c`, loaded with ctypes, or the same in Python, which is slow.

It writes and reads the same bytes as CompressAI's coder (rANS, as in FORMAT.md). C and Python check the length of their
buffer before every access. When a payload ends too early, they continue with words of 0.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import sysconfig
import warnings
from bisect import bisect_right
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpcmref.errors import HpcmrefError

if TYPE_CHECKING:
    from hpcmref.format.rangecoder import Tables

_LOWEST = 1 << 31  # of a state between two symbols
_SUFFIXES = {"linux": ".so", "darwin": ".dylib", "windows": ".dll"}
_MACHINES = {("linux", "amd64"): "x86_64", ("linux", "arm64"): "aarch64", ("darwin", "aarch64"): "arm64"}


class _CTables(ctypes.Structure):
    """`Tables` of rans.c. Its offsets are 0, so that its symbols are entries of tables."""

    _fields_ = (
        ("cdfs", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


def encode(parts: Iterable[tuple[NDArray[Any], NDArray[Any]]], tables: Tables) -> bytes:
    """Return the payload of all symbols of `parts`, in their order.

    Each part is a pair of arrays of one length: entries of tables, int16 (n,), and the indexes of these tables, uint8
    (n,). Appends nothing of its own. Raises HpcmrefError if a table does not have its entry.
    """
    columns = tuple(zip(*parts, strict=True))
    entries = np.ascontiguousarray(np.concatenate(columns[0]), np.int16)
    indexes = np.ascontiguousarray(np.concatenate(columns[1]), np.uint8)
    library = _library()
    if library is None:
        return _encode_in_python(entries.tolist(), indexes.tolist(), tables)
    out = np.empty(4 * entries.size + 8, np.uint8)  # a symbol takes 16 bits at most
    packed, _ = _packed(tables)
    size = library.rans_encode(
        entries.ctypes.data, indexes.ctypes.data, entries.size, ctypes.byref(packed), out.ctypes.data, out.size
    )
    if size < 0:
        raise HpcmrefError("the range coder was given a symbol that its table does not have")
    return out[out.size - size :].tobytes()


class Decoder:
    """Decodes one payload."""

    def __init__(self, payload: bytes, most_words: int, tables: Tables) -> None:
        """
        payload: a valid state of 8 bytes and words of 4.
        most_words: not used, since any number of words of 0 can be read after the end.
        """
        self._payload = payload
        self._tables = tables
        self._state = ctypes.c_uint64(int.from_bytes(payload[:8], "little"))
        self._place = ctypes.c_int64(8)

    def take(self, indexes: NDArray[np.int32]) -> NDArray[np.int32]:
        """The next entries, int32 (n,), of the tables with these indexes, (n,), which have been checked.

        Raises HpcmrefError if the compiled coder finds that there is no table of an index after all.
        """
        library = _library()
        if library is None:
            return self._take_in_python(indexes)
        rows = np.ascontiguousarray(indexes, np.uint8)
        entries = np.empty(rows.size, np.int32)
        packed, _ = _packed(self._tables)
        failed = library.rans_decode(
            self._payload,
            len(self._payload),
            ctypes.byref(self._state),
            ctypes.byref(self._place),
            rows.ctypes.data,
            rows.size,
            ctypes.byref(packed),
            entries.ctypes.data,
        )
        if failed:
            raise HpcmrefError("the range coder was given the index of a table that it does not have")
        return entries

    def _take_in_python(self, indexes: NDArray[np.int32]) -> NDArray[np.int32]:
        x, place, tables = self._state.value, self._place.value, self._tables
        entries = []
        for index in indexes.tolist():
            cdf, m = tables.cdfs[index], x & 0xFFFF
            entry = bisect_right(cdf, m) - 1
            x = (cdf[entry + 1] - cdf[entry]) * (x >> 16) + m - cdf[entry]
            if x < _LOWEST:
                x = x << 32 | int.from_bytes(self._payload[place : place + 4], "little")
                place += 4
            entries.append(entry)
        self._state.value, self._place.value = x, place
        return np.array(entries, np.int32)


def name() -> str:
    """The name of this coder, for `rangecoder.implementation`."""
    return "builtin (Python)" if _library() is None else "builtin (C)"


def library_path() -> Path:
    """The path at which the compiled coder for this platform is expected."""
    system, machine = platform.system().lower(), platform.machine().lower()
    if system == "windows":  # whose platform.machine() may name the processor where Python itself is emulated
        machine = sysconfig.get_platform().removeprefix("win-")
    machine = _MACHINES.get((system, machine), machine)
    return Path(__file__).parent / "librans" / f"{system}-{machine}{_SUFFIXES.get(system, '.so')}"


def _encode_in_python(entries: list[int], indexes: list[int], tables: Tables) -> bytes:
    x, words = _LOWEST, []
    for entry, index in zip(reversed(entries), reversed(indexes), strict=True):
        cdf = tables.cdfs[index]
        if not 0 <= entry < len(cdf) - 1 or cdf[entry] == cdf[entry + 1]:
            raise HpcmrefError("the range coder was given a symbol that its table does not have")
        frequency = cdf[entry + 1] - cdf[entry]
        if x >= frequency << 47:
            words.append(x & 0xFFFFFFFF)
            x >>= 32
        x = (x // frequency << 16) + x % frequency + cdf[entry]
    return x.to_bytes(8, "little") + b"".join(word.to_bytes(4, "little") for word in reversed(words))


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled coder, or None if this platform has none. Then a warning says once that Python is used instead."""
    try:
        if sys.maxsize < 1 << 32:
            raise OSError("32-bit Python")
        library = ctypes.CDLL(str(library_path()))
    except OSError as error:
        warnings.warn(f"the range coder runs in Python, which is slow: {error}", stacklevel=2)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.rans_encode.argtypes = [pointer, pointer, number, pointer, pointer, number]
    library.rans_encode.restype = number
    library.rans_decode.argtypes = [ctypes.c_char_p, number, pointer, pointer, pointer, number, pointer, pointer]
    library.rans_decode.restype = number
    return library


def _packed(tables: Tables) -> tuple[_CTables, tuple[NDArray[Any], ...]]:
    """The tables in the form of rans.c, and the arrays that they point to, which must be kept as long as the tables."""
    kept = _cached_pack.get("tables")
    if kept is None or kept[0] is not tables:
        cdfs = np.zeros((len(tables.cdfs), max(tables.lengths)), np.uint32)
        for row, cdf in zip(cdfs, tables.cdfs, strict=True):
            row[: len(cdf)] = cdf
        lengths, offsets = np.array(tables.lengths, np.int32), np.zeros(len(tables.lengths), np.int32)
        addresses = (array.ctypes.data for array in (cdfs, lengths, offsets))
        kept = _cached_pack["tables"] = tables, (_CTables(*addresses, *cdfs.shape), (cdfs, lengths, offsets))
    return kept[1]


_cached_pack: dict[str, tuple[Tables, tuple[_CTables, tuple[NDArray[Any], ...]]]] = {}
