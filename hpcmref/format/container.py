"""Which bytes make up a file? Writes and parses them, and knows nothing of images, models or arithmetic.

    magic | version arithmetic flags fingerprint quality | width height | latent checksum | chunks | payload | crc32

Every accepted file has exactly one meaning and every meaning exactly one file: `write(parse(data)) == data`.
`FORMAT.md` is the specification.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum
from typing import IO, Any

from hpcmref.errors import ConfigError, FormatError, UnsupportedError

# The first byte is above 127, so that a transfer as text damages it visibly; the rest spells HPC.
MAGIC = b"\x89HPC"
VERSION = 1

MAX_SIDE = 1 << 15
MAX_PIXELS = 1 << 28
MAX_QUALITY = 63
MAX_CHUNKS = 64

_FIXED = struct.Struct(
    "<"
    "B"  # version
    "B"  # arithmetic
    "B"  # flags
    "4s"  # fingerprint
    "B"  # quality
)
_U32 = struct.Struct("<I")

_HAS_CHUNKS = 1 << 0
_GREY = 1 << 1
_END_OF_CHUNKS = 0
_PIECE = 1 << 20


class Tag(IntEnum):
    """The chunks that this version knows; `hpcmref/picture/metadata.py` makes and reads their contents."""

    ICC = 1
    EXIF = 2
    XMP = 3
    ALPHA = 4
    MODE = 5


@dataclass(frozen=True)
class Container:
    """What one file holds. Making one with a value that the format cannot hold raises ConfigError.

    arithmetic: number of the entropy path's arithmetic; the codec knows which numbers it can decode.
    fingerprint: 4 bytes that name the model.
    quality: 0..63.
    width, height: pixels of the image, after orientation.
    grey: the image has one channel.
    latent_checksum: unsigned 32 bits over the decoded latents.
    payload: the range coder's bytes.
    chunks: (tag 1..255, bytes) in file order, at most 64, each tag of `Tag` at most once; a reader skips the tags that
        it does not know.
    version: of the format.
    truncated: the end of the payload is missing (see `parse`).
    """

    arithmetic: int
    fingerprint: bytes
    quality: int
    width: int
    height: int
    grey: bool
    latent_checksum: int
    payload: bytes
    chunks: tuple[tuple[int, bytes], ...] = ()
    version: int = VERSION
    truncated: bool = False

    def __post_init__(self) -> None:
        _check_range("version", self.version, VERSION, VERSION)
        _check_range("arithmetic", self.arithmetic, 0, 255)
        _check_range("quality", self.quality, 0, MAX_QUALITY)
        _check_range("width", self.width, 1, MAX_SIDE)
        _check_range("height", self.height, 1, MAX_SIDE)
        _check_range("number of pixels", self.width * self.height, 1, MAX_PIXELS)
        _check_range("latent checksum", self.latent_checksum, 0, 2**32 - 1)
        _check_range("length of the fingerprint", len(self.fingerprint), 4, 4)
        _check_range("length of the payload", len(self.payload), 0, 2**32 - 1)
        for tag, content in self.chunks:
            _check_range("tag of a chunk", tag, 1, 255)
            _check_range("length of a chunk", len(content), 0, 2**32 - 1)
        _check_range("number of chunks", len(self.chunks), 0, MAX_CHUNKS)
        tags = [tag for tag, _ in self.chunks]
        for known in Tag:
            _check_range(f"number of {known.name} chunks", tags.count(known), 0, 1)

    def chunk(self, tag: Tag) -> bytes | None:
        """The content of the chunk with this tag, if there is one."""
        return next((content for each, content in self.chunks if each == tag), None)


def write(container: Container) -> bytes:
    """The bytes of a file."""
    body = b"".join((_header(container), _chunks(container), _varint(len(container.payload)), container.payload))
    return MAGIC + body + _U32.pack(zlib.crc32(body))


def part_sizes(container: Container) -> dict[str, int]:
    """Bytes of each part of the file: header (magic and the payload's length included), chunks, payload, crc."""
    return {
        "header": len(MAGIC) + len(_header(container)) + len(_varint(len(container.payload))),
        "chunks": len(_chunks(container)),
        "payload": len(container.payload),
        "crc": _U32.size,
    }


def parse(data: bytes, partial: bool = False) -> Container:
    """The container that was written as `data`.

    Raises FormatError if the bytes are not a file of this format or are damaged, and UnsupportedError if the file needs
    a newer version. Nothing larger than `data` is ever allocated.

    partial: accept a file that ends within its payload, as it is after an interrupted transfer; the payload is then
    what there is of it, in whole words of the range coder.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise FormatError("this is not an hpcmref file")
    body = data[len(MAGIC) : -_U32.size]
    if body:
        _refuse_newer(body[0])  # before the checksum: a later version may place its checksum elsewhere
    if zlib.crc32(body).to_bytes(_U32.size, "little") != data[-_U32.size :]:
        if partial and (truncated := _parse_truncated(data[len(MAGIC) :])):
            return truncated
        raise FormatError("the file is damaged or truncated: its checksum does not match")

    file = io.BytesIO(body)
    reader = _Reader(file)
    fields = _fields(reader, skip=())
    payload = reader.take(reader.varint())
    if left := len(body) - file.tell():
        raise FormatError(f"the file is damaged: {left} bytes follow the payload")
    return _checked(fields, payload)


def _parse_truncated(body: bytes) -> Container | None:
    """The container of a body without its end; None if it is all there."""
    file = io.BytesIO(body)
    reader = _Reader(file)
    fields = _fields(reader, skip=())
    announced = reader.varint()
    left = len(body) - file.tell()
    if left >= announced + _U32.size:
        return None
    return _checked(fields | {"truncated": True}, file.read(left // 4 * 4))


def peek(file: IO[bytes]) -> Container:
    """The container that begins in an open file, without reading what may be long: payload and alpha come out empty.

    No checksum is compared. Raises as `parse` does.
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise FormatError("this is not an hpcmref file")
    return _checked(_fields(_Reader(file), skip={Tag.ALPHA}), b"")


def _fields(reader: _Reader, skip: Collection[int]) -> dict[str, Any]:
    """What stands before the payload, as arguments of Container; chunks with a tag in `skip` come out empty."""
    version, arithmetic, flags, fingerprint, quality = reader.unpack(_FIXED)
    _refuse_newer(version)
    if unknown := flags & ~(_HAS_CHUNKS | _GREY):
        raise UnsupportedError(f"the file uses a feature that this hpcmref does not know (flags {unknown:#04x})")
    return {
        "version": version,
        "arithmetic": arithmetic,
        "fingerprint": fingerprint,
        "quality": quality,
        "grey": bool(flags & _GREY),
        "width": reader.varint(),
        "height": reader.varint(),
        "latent_checksum": reader.unpack(_U32)[0],
        "chunks": reader.chunks(skip) if flags & _HAS_CHUNKS else (),
    }


def _refuse_newer(version: int) -> None:
    if version > VERSION:
        raise UnsupportedError(f"the file has format version {version}, newer than version {VERSION} of this hpcmref")


def _checked(fields: dict[str, Any], payload: bytes) -> Container:
    try:
        return Container(payload=payload, **fields)
    except ConfigError as error:
        raise FormatError(f"the file is damaged: {error}") from None


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"the {name} is {value}, and must be {low if low == high else f'{low} to {high}'}")


def _header(container: Container) -> bytes:
    flags = _HAS_CHUNKS * bool(container.chunks) | _GREY * container.grey
    fixed = _FIXED.pack(container.version, container.arithmetic, flags, container.fingerprint, container.quality)
    return fixed + _varint(container.width) + _varint(container.height) + _U32.pack(container.latent_checksum)


def _chunks(container: Container) -> bytes:
    if not container.chunks:
        return b""
    parts = [bytes([tag]) + _varint(len(content)) + content for tag, content in container.chunks]
    return b"".join(parts) + bytes([_END_OF_CHUNKS])


def _varint(value: int) -> bytes:
    """LEB128: 7 bits a byte, lowest first, the top bit set on all bytes but the last."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class _Reader:
    """Takes bytes from the front of a file; every method raises FormatError if too few are left."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def take(self, length: int) -> bytes:
        pieces = []
        while length:
            # In pieces, because a file makes room for all that it is asked for before it looks at what it has.
            piece = self._file.read(min(length, _PIECE))
            if not piece:
                raise FormatError(f"the file is damaged: it ends {length} bytes too early")
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)

    def unpack(self, form: struct.Struct) -> tuple:
        return form.unpack(self.take(form.size))

    def varint(self) -> int:
        """Unsigned, below 2^32, in the fewest bytes that hold it."""
        value = 0
        for shift in (0, 7, 14, 21, 28):
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                break
        if byte > 127 or value >> 32 or (byte == 0 and shift):
            raise FormatError("the file is damaged: a size or length is too large or not in its shortest form")
        return value

    def chunks(self, skip: Collection[int]) -> tuple[tuple[int, bytes], ...]:
        found: list[tuple[int, bytes]] = []
        while (tag := self.take(1)[0]) != _END_OF_CHUNKS:
            if len(found) == MAX_CHUNKS:  # now, as empty chunks take far more memory than file
                raise FormatError(f"the file is damaged: it has more than {MAX_CHUNKS} chunks")
            length = self.varint()
            if tag in skip:
                self._file.seek(length, io.SEEK_CUR)
                length = 0
            found.append((tag, self.take(length)))
        if not found:
            raise FormatError("the file is damaged: it announces chunks and has none")
        return tuple(found)
