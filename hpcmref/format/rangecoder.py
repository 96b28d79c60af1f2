"""Convert integer symbols to bytes and back, with one of two rANS coders behind two common classes.

If CompressAI is installed, its coder is used (`rans_compressai`, the reference), and otherwise that of this package
(`rans_builtin`). Both write and read the same bytes. HPCMREF_RANGECODER=compressai or builtin selects one of them.

Every symbol is coded with one of 60 stored tables, the cumulative frequencies (16 bits) of a generalized Gaussian
(beta = 1.5) at the scales of `scale_table()`. The last symbol of a table is its escape: it stands for every value
outside the table's range, and the value follows as two bytes.

Why a hostile file cannot make the decoder read outside its buffer
------------------------------------------------------------------
CompressAI's decoder does not know where its buffer ends. It also sets no limit to its own escapes, which read as many
words as the stream tells them to. Three measures make that harmless:

1. CompressAI takes the last entry of a table as its escape. Here every table is given one more entry, equal to the
   total 65536. So CompressAI's escape has frequency 0, and it is never decoded, because the decoder takes the first
   entry above a number that is below 65536. The table's own escape becomes an ordinary symbol. (A debug build of
   CompressAI asserts that entries increase, and would stop here. The published wheels and every default build have no
   asserts.)
2. Then each symbol reads at most one 32-bit word, and two consecutive symbols together at most one. Decoding maps a
   state x to f * (x >> 16) + r, with frequency f >= 1 and 0 <= r < f, and reads a word if the result is below 2^31.
   From 2^31 <= x < 2^63 (checked for the first state, which is the first 8 bytes) the result is at least 2^15 and below
   2^63; if it is below 2^31 the word makes it 2^47..2^63; and from 2^47 on the result is at least 2^31, so the next
   symbol reads nothing.
3. The number of symbols is known: those that the caller asks for, and two bytes for each escape. Regard the encoder's
   state and the words it has written as one number. No symbol lowers it, a byte multiplies it by 256, and an escape
   (with a frequency of at most 422 of 65536) by more than 100, both up to a factor of 1 - 2^-14. So each escape takes
   more than 16 bits of the payload. A decoder that finds more escapes than fit is decoding a forged payload, and stops.

So each payload is padded with zeros to the length of the state and one word for every two symbols. No read goes beyond
that length.

This padding would be large if a forged header announces a large image but little payload follows. So the decoder also
adds up the bits of its symbols, and stops soon after the end of the payload. Decoding a symbol of frequency f lowers
log2(state) by 16 - log2(f), up to a rounding of less than 2^-14, and reading a word adds 32 to it. As
31 <= log2(state) < 63, this gives the number of words that have been read, up to two words and the rounding. After each
block of symbols, the decoder continues only if the words can have come from the payload. So the zeros need to last only
for one more block.

The built-in coder knows where its buffer ends, and continues with words of 0 from there, so it needs none of this. It
has the same limits, so that both coders give the same result or the same error for every payload.
"""

from __future__ import annotations

import importlib.resources
import os
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpcmref.errors import ConfigError, FormatError, TruncatedError
from hpcmref.format import rans_builtin, rans_compressai

_TOTAL = 1 << 16  # of the frequencies in a table
_STATE_BYTES = 8
_WORD_BYTES = 4
_BLOCK = 1 << 16  # symbols between two checks of what is left of the payload
_ROUNDING = 2.0**-14  # bits; an upper bound of the rounding of one symbol


class Tables(NamedTuple):
    """The 60 tables, followed by the uniform table of bytes, in the form that the coders need.

    cdfs: cumulative frequencies from 0 to 65536, then 65536 again (see the top of the file).
    lengths: number of entries of each.
    lowest, escapes: int32 (61,). Table i codes lowest[i] <= symbol < escapes[i]; escapes[i] itself is the escape. The
        coders get and return entries of tables instead of symbols: entry = symbol - lowest[i].
    """

    cdfs: list[list[int]]
    lengths: list[int]
    lowest: NDArray[np.int32]
    escapes: NDArray[np.int32]

    @property
    def of_bytes(self) -> int:
        """Index of the uniform table, which is also the number of the other tables."""
        return len(self.cdfs) - 1


class SymbolEncoder:
    """Collects symbols with `put`; `payload` turns them into bytes.

    CompressAI's encoder needs six bytes of memory for every symbol until it writes the first word. So it gets all
    symbols at the end, when the networks need no memory any more.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def put(self, symbols: NDArray[np.int32], indexes: NDArray[np.int32]) -> None:
        """Append `symbols`, and after them the values of the escaped ones.

        symbols: (n,) integers from -32768 to 32767.
        indexes: (n,) integers from 0 to 59, the table of each symbol.

        Raises ConfigError if shapes or ranges are different.
        """
        tables = _tables()
        _check_indexes(indexes)
        if symbols.shape != indexes.shape:
            raise ConfigError(f"symbols of shape {symbols.shape} do not go with table indexes of {indexes.shape}")
        if symbols.size == 0:
            return
        if symbols.min() < -(1 << 15) or symbols.max() >= 1 << 15:
            raise ConfigError("a symbol does not fit into 16 bits")
        values = []
        for i in range(0, symbols.size, _BLOCK):
            block, rows = symbols[i : i + _BLOCK], indexes[i : i + _BLOCK]
            lowest, escapes = tables.lowest[rows], tables.escapes[rows]
            escaped = (block < lowest) | (block >= escapes)
            self._append(np.where(escaped, escapes, block) - lowest, rows)
            values.append(block[escaped].astype("<i2").view(np.uint8))
        escaped_bytes = np.concatenate(values)
        if escaped_bytes.size:
            self._append(escaped_bytes, np.full(escaped_bytes.size, tables.of_bytes))

    def payload(self) -> bytes:
        """The payload of all symbols. The encoder cannot be used after this call.

        It is empty if there are no symbols. Otherwise its length is a multiple of 4, and at least 8 bytes.
        """
        if not self._parts:
            return b""
        # CompressAI allocates one word per symbol. It writes up to one word per two symbols, and two words for the
        # state, which is more than it allocates for one or two symbols. So two symbols are added. The decoder never
        # asks for them. As they are the likeliest symbol of table 0, they take 0.0002 bits.
        tables = _tables()
        self._append(np.full(2, -tables.lowest[0]), np.zeros(2, np.int32))
        parts, self._parts = self._parts, []
        return bytes(_coder().encode(parts, tables))

    def _append(self, entries: NDArray[np.int32], indexes: NDArray[np.int32]) -> None:
        """Append entries of tables, (n,), and the indexes of these tables, (n,)."""
        self._parts.append((entries.astype(np.int16), indexes.astype(np.uint8)))


class SymbolDecoder:
    """Returns the symbols of a payload in the order in which they were put.

    The caller must detect damage by checksums. This class detects only that a payload is too short for its symbols.
    """

    def __init__(self, payload: bytes, count: int) -> None:
        """
        payload: what `SymbolEncoder.payload` returned.
        count: number of symbols that will be asked for, all calls of `get` together.

        Raises FormatError if no encoder can have written the payload.
        """
        self._symbols_left = count
        self._escapes_left = min(count, len(payload) // 2)
        self._bits_left = 0.0
        self._rounding = 0.0
        if count == 0:
            return
        if len(payload) < _STATE_BYTES or len(payload) % _WORD_BYTES:
            raise FormatError(f"a payload of {len(payload)} bytes is not one that the range coder writes")
        state = int.from_bytes(payload[:_STATE_BYTES], "little")
        if not 1 << 31 <= state < 1 << 63:
            raise FormatError("the payload does not begin with a state of the range coder")
        self._bits_left = 8.0 * (len(payload) - _STATE_BYTES) + state.bit_length()
        most_symbols = count + 2 * self._escapes_left
        before_the_end = len(payload) // _WORD_BYTES + int(most_symbols * _ROUNDING / 16) + 4
        most_words = min((most_symbols + 1) // 2, before_the_end + _BLOCK // 2 + 1)
        self._coder = _coder().Decoder(payload, most_words, _tables())

    @property
    def is_whole(self) -> bool:
        """Whether all symbols so far certainly came from the payload, not from zeros that follow a truncated one."""
        return self._bits_left - self._rounding >= 64

    def get(self, indexes: NDArray[np.int32]) -> NDArray[np.int32]:
        """The next symbols, int32 (n,).

        indexes: (n,) integers from 0 to 59, the tables that the symbols were put with, n as in that call of `put`.

        Raises ConfigError if the shape or the range is different, or if more symbols are asked for than announced.
        Raises TruncatedError if the payload ends before its symbols do, and FormatError if it has more escapes than can
        fit into it.
        """
        tables = _tables()
        _check_indexes(indexes)
        if indexes.size > self._symbols_left:
            raise ConfigError(f"{indexes.size} symbols asked for where {self._symbols_left} are left")
        if indexes.size == 0:
            return np.empty(0, np.int32)
        self._symbols_left -= indexes.size
        symbols: NDArray[np.int32] = self._take(indexes) + tables.lowest[indexes]
        escaped = symbols == tables.escapes[indexes]
        escapes = np.count_nonzero(escaped)
        if escapes:
            if escapes > self._escapes_left:
                raise FormatError("the payload is damaged: it has more escapes than fit into it")
            self._escapes_left -= escapes
            values = self._take(np.full(2 * escapes, tables.of_bytes))
            symbols[escaped] = values.astype(np.uint8).view("<i2")
        return symbols

    def _take(self, indexes: NDArray[np.int32]) -> NDArray[Any]:
        """The next entries of the tables with these indexes."""
        blocks = [self._take_block(indexes[i : i + _BLOCK]) for i in range(0, indexes.size, _BLOCK)]
        return np.concatenate(blocks)

    def _take_block(self, indexes: NDArray[np.int32]) -> NDArray[Any]:
        entries: NDArray[Any] = self._coder.take(indexes)
        bits = _bits()[indexes, entries]
        self._bits_left -= float(bits.sum(dtype=np.float64))
        self._rounding += _ROUNDING * indexes.size
        if self._bits_left + self._rounding < 31:
            raise TruncatedError("the payload is damaged: it ends before its symbols do")
        return entries


def scale_table() -> NDArray[np.float32]:
    """The scale of each table, ascending from 0.12 to 64: (60,) float32."""
    return _stored()["scale_table"].copy()


def _check_indexes(indexes: NDArray[np.int32]) -> None:
    # CompressAI's coder does not check any index.
    if indexes.ndim != 1:
        raise ConfigError(f"table indexes have shape {indexes.shape}, and must be flat")
    count = _tables().of_bytes
    if indexes.size and (indexes.min() < 0 or indexes.max() >= count):
        raise ConfigError(f"a table index is outside 0 to {count - 1}")


@cache
def _stored() -> dict[str, NDArray[Any]]:
    """tables.npz: scale_table (60,) float32, cdf (60, 699) int32, cdf_length (60,) and offset (60,) int32."""
    with (importlib.resources.files("hpcmref.format") / "tables.npz").open("rb") as file, np.load(file) as arrays:
        return dict(arrays)


@cache
def _tables() -> Tables:
    stored = _stored()
    cdfs = [row[:length].tolist() for row, length in zip(stored["cdf"], stored["cdf_length"], strict=True)]
    cdfs.append(list(range(0, _TOTAL + 1, _TOTAL // 256)))
    offset = np.append(stored["offset"], 0).astype(np.int32)
    symbols = np.array([len(cdf) - 1 for cdf in cdfs], np.int32)
    return Tables(
        cdfs=[[*cdf, _TOTAL] for cdf in cdfs],
        lengths=[len(cdf) + 1 for cdf in cdfs],
        lowest=offset,
        escapes=offset + symbols - 1,
    )


@cache
def _bits() -> NDArray[np.float32]:
    """Bits of entry j of table i: (61, entries) float32, infinite where there is none."""
    cdfs = _tables().cdfs
    frequencies = np.zeros((len(cdfs), max(map(len, cdfs))))
    for row, cdf in zip(frequencies, cdfs, strict=True):
        row[: len(cdf) - 1] = np.diff(cdf)
    with np.errstate(divide="ignore"):
        return (16 - np.log2(frequencies)).astype(np.float32)


def symbol_bits(limit: int) -> NDArray[np.float32]:
    """Bits of each symbol from -limit to limit in each table, including escaped values: (60, 2 limit + 1) float32."""
    tables, bits = _tables(), _bits()
    symbols = np.arange(-limit, limit + 1)
    result = np.empty((tables.of_bytes, len(symbols)), np.float32)
    for row in range(len(result)):
        escaped = (symbols < tables.lowest[row]) | (symbols >= tables.escapes[row])
        entries = np.where(escaped, tables.escapes[row], symbols) - tables.lowest[row]
        result[row] = bits[row, entries] + 16 * escaped
    return result


def implementation() -> str:
    """Name of the coder that this process uses: "compressai", "builtin (C)" or "builtin (Python)".

    Raises ConfigError if HPCMREF_RANGECODER names none, HpcmrefError if it names one that is not installed.
    """
    return str(_coder().name())


@cache
def _coder() -> ModuleType:
    wanted = os.environ.get("HPCMREF_RANGECODER", "")
    if wanted not in ("", "compressai", "builtin"):
        raise ConfigError(f"HPCMREF_RANGECODER is {wanted!r}, and must be compressai or builtin")
    if wanted == "builtin" or (not wanted and rans_compressai.find() is None):
        return rans_builtin
    rans_compressai.ans()  # fails now rather than in the middle of a file
    return rans_compressai
