"""Write and parse the bytes of a file. This module does not depend on images, models or arithmetic.

    magic | version | flags coding | width height | encoder | learned stream's header | chunks | payload | crc32

Files of version 2 are written, and files of versions 1 and 2 are read. Every accepted file has exactly one meaning. In
version 2, every meaning also has exactly one file: `write(parse(data)) == data`. `FORMAT.md` is the specification.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import IO, Any

from hpcmref.arguments import bytes_like
from hpcmref.errors import ConfigError, FormatError, UnsupportedError

# The first byte is above 127, so that a transfer as text damages it visibly; the rest spells HPC.
MAGIC = b"\x89HPC"
VERSION = 2
"""The version that is written. Older versions are read."""

MAX_SIDE = 1 << 15
MAX_PIXELS = 1 << 28
MAX_QUALITY = 63
MAX_CHUNKS = 64
CRITICAL = 128
"""Chunks with this tag or a higher one change what the pixels are. Readers refuse files with an unknown one."""

_FIXED_1 = struct.Struct(
    "<"
    "B"  # arithmetic
    "B"  # flags
    "4s"  # fingerprint
    "B"  # quality
)
_FIXED_2 = struct.Struct(
    "<"
    "B"  # flags
    "B"  # coding
)
_ENCODER = struct.Struct(
    "<"
    "B"  # major version
    "B"  # minor version
    "B"  # effort
)
_LEARNED = struct.Struct(
    "<"
    "B"  # arithmetic
    "4s"  # fingerprint
    "B"  # quality
    "H"  # checksum up to s1
    "H"  # checksum up to s2
    "I"  # checksum of all latents
)
_U32 = struct.Struct("<I")
LEARNED_BYTES = _LEARNED.size
"""The number of bytes that a learned payload adds to the header."""

_HAS_CHUNKS = 1 << 0
_GREY = 1 << 1
_END_OF_CHUNKS = 0
_PIECE = 1 << 20


class Coding(IntEnum):
    """How the payload holds the pixels."""

    LEARNED = 0
    WEBP = 1
    """Without loss: WebP files, see `FORMAT.md`."""
    PNG = 2
    """Without loss: a PNG file."""


class Tag(IntEnum):
    """The chunks that this version knows; `hpcmref/picture/metadata.py` makes and reads their contents."""

    ICC = 1
    EXIF = 2
    XMP = 3
    ALPHA = 4
    MODE = 5
    CICP = 6
    IPTC = 7
    TEXT = 8
    RESOLUTION = 9


METADATA = (Tag.ICC, Tag.EXIF, Tag.XMP, Tag.IPTC, Tag.TEXT)
"""The chunks that are not needed to show the image, and that can be large."""


@dataclass(frozen=True)
class Encoder:
    """The version of hpcmref that wrote the file, and its effort 0..9. In files of version 1 all are unknown, and 0."""

    major: int = 0
    minor: int = 0
    effort: int = 0


@dataclass(frozen=True)
class Checksums:
    """Checksums of the decoded latents: up to the end of s1, up to the end of s2, and of all.

    The first two have 16 bits, and are None in version 1.
    """

    s1: int | None
    s2: int | None
    all: int

    def of(self, scale: int) -> int | None:
        """The checksum that covers the latents up to `scale` (1, 2 or 3), or None if the file has none."""
        return (self.s1, self.s2, self.all)[scale - 1]


@dataclass(frozen=True)
class Learned:
    """The header fields that a decoder needs before it reads a learned payload.

    arithmetic: number of the entropy path's arithmetic; the codec knows which numbers it can decode.
    fingerprint: 4 bytes that name the model.
    quality: 0..63.
    """

    arithmetic: int
    fingerprint: bytes
    quality: int
    checksums: Checksums


@dataclass(frozen=True)
class Container:
    """The contents of one file. Making one with a value that the format cannot hold raises ConfigError.

    width, height: pixels of the image, after orientation.
    grey: the image has one channel.
    learned: the header of a learned payload, or None for a lossless payload.
    payload: the bytes of the range coder, or of a lossless codec.
    coding: how the payload holds the pixels.
    chunks: (tag 1..255, bytes) in file order, at most 64, each tag of `Tag` at most once; a reader skips the tags below
        CRITICAL that it does not know.
    version: of the format.
    truncated: the end of the payload is missing (see `parse`).
    damaged: the checksum of the file does not match (see `parse`).
    """

    width: int
    height: int
    grey: bool
    learned: Learned | None
    payload: bytes
    coding: Coding = Coding.LEARNED
    chunks: tuple[tuple[int, bytes], ...] = ()
    encoder: Encoder = Encoder()
    version: int = VERSION
    truncated: bool = False
    damaged: bool = False

    def __post_init__(self) -> None:
        _check_range("version", self.version, 1, VERSION)
        _check_range("width", self.width, 1, MAX_SIDE)
        _check_range("height", self.height, 1, MAX_SIDE)
        _check_range("number of pixels", self.width * self.height, 1, MAX_PIXELS)
        _check_range("length of the payload", len(self.payload), 0, 2**32 - 1)
        if (self.coding is Coding.LEARNED) != (self.learned is not None):
            raise ConfigError(
                f"a payload of coding {self.coding.name} and a learned stream's header do not go together"
            )
        if self.learned is not None:
            self._check_learned(self.learned)
        _check_range("encoder's major version", self.encoder.major, 0, 255)
        _check_range("encoder's minor version", self.encoder.minor, 0, 255)
        _check_range("effort", self.encoder.effort, 0, 9)
        for tag, content in self.chunks:
            _check_range("tag of a chunk", tag, 1, 255)
            _check_range("length of a chunk", len(content), 0, 2**32 - 1)
        _check_range("number of chunks", len(self.chunks), 0, MAX_CHUNKS)
        tags = [tag for tag, _ in self.chunks]
        for known in Tag:
            _check_range(f"number of {known.name} chunks", tags.count(known), 0, 1)

    def _check_learned(self, learned: Learned) -> None:
        _check_range("arithmetic", learned.arithmetic, 0, 255)
        _check_range("length of the fingerprint", len(learned.fingerprint), 4, 4)
        _check_range("quality", learned.quality, 0, MAX_QUALITY)
        checksums = learned.checksums
        _check_range("latent checksum", checksums.all, 0, 2**32 - 1)
        for each in (checksums.s1, checksums.s2):
            if (each is None) != (self.version == 1):
                raise ConfigError("checksums of s1 and s2 belong to version 2 of the format, and to no other")
            _check_range("checksum of a scale", each or 0, 0, 2**16 - 1)

    def chunk(self, tag: Tag) -> bytes | None:
        """The content of the chunk with this tag, if there is one."""
        return next((content for each, content in self.chunks if each == tag), None)


def write(file: Container) -> bytes:
    """The bytes of a file. Raises ConfigError for a container of an older version: only the newest is written."""
    if file.version != VERSION or file.truncated or file.damaged:
        raise ConfigError(f"only whole files of version {VERSION} are written")
    body = b"".join((_header(file), _chunks(file), _varint(len(file.payload)), file.payload))
    return MAGIC + body + _U32.pack(zlib.crc32(body))


def part_sizes(data: bytes) -> dict[str, int]:
    """Bytes of each part of a file: header (magic and the payload's length included), chunks, payload, crc.

    Raises as `parse` does.
    """
    file = parse(data)
    chunks, payload = len(_chunks(file)), len(file.payload)
    header = len(data) - chunks - payload - _U32.size
    return {"header": header, "chunks": chunks, "payload": payload, "crc": _U32.size}


def parse(data: bytes, partial: bool = False, damaged: bool = False) -> Container:
    """The container that was written as `data`.

    Raises FormatError if the bytes are not a file of this format or are damaged, UnsupportedError if the file needs
    a newer version, and ArgumentTypeError for what is not bytes. Nothing larger than `data` is ever allocated.

    partial: accept a file that ends within its payload, as after an interrupted transfer. The payload is then the part
    that is present, cut to whole 32-bit words of the range coder.
    damaged: accept a file whose structure is valid although its checksum does not match. The container then has
    `damaged` set, and nothing in it can be trusted.
    """
    data = bytes_like("data", data)
    if data[: len(MAGIC)] != MAGIC:
        raise FormatError("this is not an hpcmref file")
    body = data[len(MAGIC) : -_U32.size]
    if body:
        _refuse_newer(body[0])  # before the checksum: a later version may place its checksum elsewhere
    whole = zlib.crc32(body).to_bytes(_U32.size, "little") == data[-_U32.size :]
    if not whole:
        if partial and (truncated := _parse_truncated(data[len(MAGIC) :])):
            return truncated
        if not damaged:
            raise FormatError("the file is damaged or truncated: its checksum does not match")

    file = io.BytesIO(body)
    reader = _Reader(file)
    fields = _fields(reader, skip=())
    payload = reader.take(reader.varint())
    if left := len(body) - file.tell():
        raise FormatError(f"the file is damaged: {left} bytes follow the payload")
    return replace(_checked(fields, payload), damaged=not whole)


def _parse_truncated(body: bytes) -> Container | None:
    """The container of a truncated body, or None if the body is complete."""
    file = io.BytesIO(body)
    reader = _Reader(file)
    fields = _fields(reader, skip=())
    announced = reader.varint()
    left = len(body) - file.tell()
    if left >= announced + _U32.size:
        return None
    return _checked(fields | {"truncated": True}, file.read(left // 4 * 4))


def peek(file: IO[bytes]) -> Container:
    """The container at the start of an open file. Payload and alpha may be long, so they are not read, but left empty.

    No checksum is compared. Raises FormatError and UnsupportedError as `parse` does.
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise FormatError("this is not an hpcmref file")
    return _checked(_fields(_Reader(file), skip={Tag.ALPHA}), b"")


def _fields(reader: _Reader, skip: Collection[int]) -> dict[str, Any]:
    """The fields before the payload, as arguments of Container. Chunks with a tag in `skip` are empty in the result."""
    (version,) = reader.take(1)
    _refuse_newer(version)
    return {"version": version, **(_fields_1(reader, skip) if version < 2 else _fields_2(reader, skip))}


def _fields_1(reader: _Reader, skip: Collection[int]) -> dict[str, Any]:
    """The fields of version 1."""
    arithmetic, flags, fingerprint, quality = reader.unpack(_FIXED_1)
    _check_flags(flags)
    fields = {"grey": bool(flags & _GREY), "width": reader.varint(), "height": reader.varint()}
    checksums = Checksums(None, None, reader.unpack(_U32)[0])
    chunks = reader.chunks(skip) if flags & _HAS_CHUNKS else ()
    return {**fields, "learned": Learned(arithmetic, fingerprint, quality, checksums), "chunks": chunks}


def _fields_2(reader: _Reader, skip: Collection[int]) -> dict[str, Any]:
    """The fields of version 2."""
    flags, coding = reader.unpack(_FIXED_2)
    _check_flags(flags)
    if coding not in set(Coding):
        raise UnsupportedError(f"the file uses coding {coding}, which this hpcmref does not know")
    fields: dict[str, Any] = {"grey": bool(flags & _GREY), "coding": Coding(coding)}
    fields |= {"width": reader.varint(), "height": reader.varint(), "encoder": Encoder(*reader.unpack(_ENCODER))}
    learned = None
    if coding == Coding.LEARNED:
        arithmetic, fingerprint, quality, *checksums = reader.unpack(_LEARNED)
        learned = Learned(arithmetic, fingerprint, quality, Checksums(*checksums))
    chunks = reader.chunks(skip) if flags & _HAS_CHUNKS else ()
    for tag, _ in chunks:
        if tag >= CRITICAL and tag not in set(Tag):
            raise UnsupportedError(f"the file has a chunk of tag {tag}, which this hpcmref would have to know")
    return {**fields, "learned": learned, "chunks": chunks}


def _check_flags(flags: int) -> None:
    if unknown := flags & ~(_HAS_CHUNKS | _GREY):
        raise UnsupportedError(f"the file uses a feature that this hpcmref does not know (flags {unknown:#04x})")


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


def _header(file: Container) -> bytes:
    flags = _HAS_CHUNKS * bool(file.chunks) | _GREY * file.grey
    encoder = file.encoder
    header = bytes([file.version]) + _FIXED_2.pack(flags, file.coding)
    header += _varint(file.width) + _varint(file.height)
    header += _ENCODER.pack(encoder.major, encoder.minor, encoder.effort)
    if (learned := file.learned) is not None:
        checksums = learned.checksums
        numbers = (learned.arithmetic, learned.fingerprint, learned.quality)
        header += _LEARNED.pack(*numbers, checksums.s1, checksums.s2, checksums.all)
    return header


def _chunks(file: Container) -> bytes:
    if not file.chunks:
        return b""
    parts = [bytes([tag]) + _varint(len(content)) + content for tag, content in file.chunks]
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
            # In pieces, because read() allocates memory for all requested bytes, even if the file has fewer.
            piece = self._file.read(min(length, _PIECE))
            if not piece:
                raise FormatError(f"the file is damaged: it ends {length} bytes too early")
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
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
            if len(found) == MAX_CHUNKS:  # checked here: empty chunks take far more memory than bytes of the file
                raise FormatError(f"the file is damaged: it has more than {MAX_CHUNKS} chunks")
            length = self.varint()
            if tag in skip:
                self._file.seek(length, io.SEEK_CUR)
                length = 0
            found.append((tag, self.take(length)))
        if not found:
            raise FormatError("the file is damaged: it announces chunks and has none")
        return tuple(found)
