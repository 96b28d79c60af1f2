"""Edit EXIF data in place: set the orientation to upright, remove the thumbnail or the location, and limit its size.

EXIF is a small TIFF file: a header of 8 bytes, and directories (IFDs) of entries of 12 bytes that point into the rest.
The maker note may contain pointers whose format only the maker of the camera knows. So bytes are never moved, and those
that must change are overwritten.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

PREFIX = b"Exif\0\0"
"""The bytes before EXIF data in JPEG files."""

# Description, make, model, resolution, software, date, artist, host, copyright, and the directories of EXIF and GPS.
TAGS = frozenset(
    (0x010E, 0x010F, 0x0110, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x013B, 0x013C, 0x8298, 0x8769, 0x8825)
)
"""Tags of the main directory that do not describe how a TIFF file stores its pixels."""
DIRECTORIES = (0x8769, 0x8825)
"""The tags that point to the directories of EXIF and GPS."""

MAX_ENTRIES = 4096
"""The most entries in all directories together. Cameras write some hundreds."""
_MAX_OUTSIDE = 16
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_LINKS = (0x8769, 0x8825, 0xA005, 0x014A)

_EXIF_DIRECTORY, _GPS_DIRECTORY = DIRECTORIES
_MAKER_NOTE = 0x927C
_ORIENTATION = 0x0112
_THUMBNAIL = 0x0201
_THUMBNAIL_LENGTH = 0x0202
_SHORT = 3
_ENTRY_BYTES = 12


def upright(exif: bytes) -> bytes:
    """Return EXIF data with the orientation 1 (upright) and without the thumbnail.

    The thumbnail often takes more bytes than the rest of an encoded file. Its directory is unlinked, and its bytes are
    set to 0.

    exif: with or without PREFIX; the result has no PREFIX. Raises ValueError if it is damaged.
    """
    data = bytearray(exif.removeprefix(PREFIX).removeprefix(PREFIX))  # some programs write it twice
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(data[:4]))
    if order is None:
        raise ValueError("EXIF data begins with II or MM")
    try:
        (first,) = struct.unpack_from(order + "I", data, 4)
        entries, link = _directory(data, first, order)
        for entry in entries:
            if struct.unpack_from(order + "H", data, entry)[0] == _ORIENTATION:
                struct.pack_into(order + "HHIHH", data, entry, _ORIENTATION, _SHORT, 1, 1, 0)
        (second,) = struct.unpack_from(order + "I", data, link)
        if second:
            _erase_thumbnail(data, second, order)
            struct.pack_into(order + "I", data, link, 0)
    except struct.error as error:
        raise ValueError("EXIF data points outside itself") from error
    return bytes(data)


def without_location(exif: bytes) -> bytes:
    """Return EXIF data (without PREFIX) without its GPS directory and maker note, whose bytes are set to 0.

    Raises ValueError if it is damaged.
    """
    data = bytearray(exif)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(data[:4]))
    if order is None:
        raise ValueError("EXIF data begins with II or MM")
    try:
        (first,) = struct.unpack_from(order + "I", data, 4)
        found = _values(data, first, order)
        if (inner := found.get(_EXIF_DIRECTORY)) is not None:
            _remove(data, inner[1], order, _MAKER_NOTE)
        if (gps := found.get(_GPS_DIRECTORY)) is not None:
            for tag in _values(data, gps[1], order):
                _remove(data, gps[1], order, tag)
            _remove(data, first, order, _GPS_DIRECTORY)
    except struct.error as error:
        raise ValueError("EXIF data points outside itself") from error
    return bytes(data)


def _values(data: bytearray, offset: int, order: str) -> dict[int, tuple[int, int]]:
    """Return the length of the value and the value (or its position, if it is longer than 4 bytes) of each tag.

    offset: the position of the directory. order: the byte order for `struct`.
    """
    values = {}
    for entry in _directory(data, offset, order)[0]:
        tag, form, count, value = struct.unpack_from(order + "HHII", data, entry)
        values[tag] = (_BYTES.get(form, 1) * count, value)
    return values


def _remove(data: bytearray, offset: int, order: str, tag: int) -> None:
    """Remove every entry with this tag from the directory at `offset`, and overwrite its value with zeros."""
    while tag in (values := _values(data, offset, order)):
        length, value = values[tag]
        if length > 4:
            if value + length > len(data):
                raise ValueError("EXIF data points outside itself")
            if value < offset + 2 + _ENTRY_BYTES * len(values) + 4 and value + length > offset:
                raise ValueError("a value of EXIF data overlaps its directory")
            data[value : value + length] = bytes(length)
        entries, link = _directory(data, offset, order)
        entry = next(each for each in entries if struct.unpack_from(order + "H", data, each)[0] == tag)
        data[entry : link + 4] = data[entry + _ENTRY_BYTES : link + 4] + bytes(_ENTRY_BYTES)
        struct.pack_into(order + "H", data, offset, len(entries) - 1)


def is_bounded(exif: bytes | BinaryIO) -> bool:
    """Return whether a parser can read the directories of EXIF data, or of a TIFF file, without using much memory.

    A parser copies each value. So all values together must not be longer than the data, there may be at most
    MAX_ENTRIES entries, and at most 16 values may lie outside of the data. Data that no parser would read counts as
    bounded.
    """
    file = io.BytesIO(exif.removeprefix(PREFIX).removeprefix(PREFIX)) if isinstance(exif, bytes) else exif
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(8)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(head[:4])
    if order is None or len(head) < 8:
        return True  # it would not be parsed
    open_links, seen = [struct.unpack(order + "I", head[4:])[0]], set()
    entries = outside = total = 0
    while open_links:
        if (offset := open_links.pop()) in seen or not 0 < offset < size:
            continue
        seen.add(offset)
        file.seek(offset)
        count = int.from_bytes(file.read(2), "little" if order == "<" else "big")
        entries += count
        if entries > MAX_ENTRIES:
            return False
        content = file.read(_ENTRY_BYTES * count + 4)
        for start in range(0, len(content) - _ENTRY_BYTES + 1, _ENTRY_BYTES):
            tag, form, number, value = struct.unpack_from(order + "HHII", content, start)
            length = _BYTES.get(form, 1) * number
            if tag in _LINKS:
                open_links.append(value)
            if length > 4:
                outside += value + length > size
                total += length if value + length <= size else 0
        if len(content) == _ENTRY_BYTES * count + 4:
            open_links.append(struct.unpack_from(order + "I", content, _ENTRY_BYTES * count)[0])
        if total > size or outside > _MAX_OUTSIDE:
            return False
    return True


def _directory(data: bytearray, offset: int, order: str) -> tuple[range, int]:
    """Return the positions of the entries of the directory at `offset`, and of the link to the next directory."""
    (count,) = struct.unpack_from(order + "H", data, offset)
    link = offset + 2 + _ENTRY_BYTES * count
    return range(offset + 2, link, _ENTRY_BYTES), link


def _erase_thumbnail(data: bytearray, offset: int, order: str) -> None:
    values = {}
    for entry in _directory(data, offset, order)[0]:
        tag, _, _, value = struct.unpack_from(order + "HHII", data, entry)
        values[tag] = value
    start, length = values.get(_THUMBNAIL, 0), values.get(_THUMBNAIL_LENGTH, 0)
    if data[start : start + 2] == b"\xff\xd8" and start + length <= len(data):  # a JPEG, and not a directory
        data[start : start + length] = bytes(length)
