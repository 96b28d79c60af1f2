"""The range coder of CompressAI (`compressai.ans`, C++), the reference implementation.

Its decoder does not know where its buffer ends, and sets no limit to its own escapes. `hpcmref.format.rangecoder`
explains why it still cannot read outside the buffer that it is given here.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpcmref.errors import HpcmrefError

if TYPE_CHECKING:
    from hpcmref.format.rangecoder import Tables


def encode(parts: Iterable[tuple[NDArray[Any], NDArray[Any]]], tables: Tables) -> bytes:
    """Return the payload of all symbols of `parts`, in their order.

    Each part is a pair of arrays of one length: entries of tables, int16 (n,), and the indexes of these tables, uint8
    (n,).
    """
    coder, no_offsets = ans().BufferedRansEncoder(), [0] * len(tables.cdfs)
    for entries, indexes in parts:
        # As lists: the extension converts arrays element by element, which is three times slower.
        coder.encode_with_indexes(entries.tolist(), indexes.tolist(), tables.cdfs, tables.lengths, no_offsets)
    return bytes(coder.flush())


class Decoder:
    """Decodes one payload."""

    def __init__(self, payload: bytes, most_words: int, tables: Tables) -> None:
        """
        payload: a valid state of 8 bytes and words of 4.
        most_words: the largest number of words that can be read; the payload is padded with zeros to that number.
        """
        self._tables = tables
        self._no_offsets = [0] * len(tables.cdfs)
        self._coder = ans().RansDecoder()
        self._coder.set_stream(payload.ljust(8 + 4 * most_words, b"\0"))

    def take(self, indexes: NDArray[np.int32]) -> NDArray[Any]:
        """The next entries, (n,), of the tables with these indexes, (n,), which have been checked."""
        tables = self._tables
        entries = self._coder.decode_stream(indexes.tolist(), tables.cdfs, tables.lengths, self._no_offsets)
        try:  # nearly all are below 256, and bytes() converts those ten times faster than NumPy converts a list
            return np.frombuffer(bytes(entries), np.uint8)
        except ValueError:
            return np.array(entries, np.int32)


def name() -> str:
    """The name of this coder, for `rangecoder.implementation`."""
    return "compressai"


@cache
def find() -> importlib.machinery.ModuleSpec | None:
    """The spec of the extension module, or None if CompressAI is not installed. Nothing is imported."""
    package = importlib.util.find_spec("compressai")
    folders = package.submodule_search_locations if package else None
    return importlib.machinery.PathFinder.find_spec("compressai.ans", list(folders)) if folders else None


@cache
def ans() -> ModuleType:
    """The module `compressai.ans` without the package around it, which takes seconds to import and needs torchvision.

    Raises HpcmrefError if CompressAI is not installed.
    """
    loaded = sys.modules.get("compressai.ans")
    if loaded is not None:
        return loaded
    spec = find()
    if spec is None or spec.loader is None:
        raise HpcmrefError("CompressAI's range coder needs the package compressai with its module ans: install it")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Its types can be registered only once in a process: a later import of the package must find this module.
    sys.modules["compressai.ans"] = module
    return module
