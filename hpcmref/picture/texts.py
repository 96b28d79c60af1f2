"""Text, IPTC data and resolution: read them from where Pillow stores them for each format, and convert them to chunks.

In images that hpcmref decodes they are in `Image.info` as "text" (a dictionary), "iptc" (bytes, IPTC-IIM) and "dpi" (a
pair).
"""

from __future__ import annotations

import binascii
import contextlib
import math
import struct
from collections.abc import Mapping
from typing import Any

from PIL import Image

from hpcmref.errors import FormatError
from hpcmref.picture import exif

COMMENT = "Comment"
MAX_TEXT = 1 << 20
"""The most bytes of all text in a file, before compression."""
MAX_ITEMS = 256

_PER_INCH = {2: 1.0, 3: 2.54}
_IPTC_TAG, _IPTC_RESOURCE = 33723, 0x0404
_IPTC_PROFILE = "Raw profile type iptc"
_ELSEWHERE = ("XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1", _IPTC_PROFILE)
_X, _Y, _UNIT = 0x011A, 0x011B, 0x0128
_RESOLUTION = struct.Struct(
    "<"
    "I"  # horizontal, thousandths of pixels per inch
    "I"  # vertical
)


def text_of(image: Image.Image) -> tuple[tuple[str, str], ...]:
    """Return the comment of a JPEG or GIF file, or the text of a PNG file, as pairs (keyword, text).

    Zero bytes are removed, and empty texts are left out.
    """
    found = image.info.get("text")
    if not isinstance(found, Mapping):
        found = {}
        with contextlib.suppress(Exception):  # Pillow reads text to the end of a PNG file, which may be damaged
            found = dict(getattr(image, "text", {}))
    items = {str(key): str(text) for key, text in found.items() if key not in _ELSEWHERE}
    comment = image.info.get("comment")
    if isinstance(comment, bytes) and COMMENT not in items:
        items[COMMENT] = _decoded(comment)
    cleaned = ((_clean(key), _clean(text)) for key, text in items.items())
    return tuple((key, text) for key, text in cleaned if key and text)


def _decoded(comment: bytes) -> str:
    try:
        return comment.decode()
    except UnicodeDecodeError:
        return comment.decode("latin-1")


def _clean(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode().strip()


def is_bounded(text: tuple[tuple[str, str], ...]) -> bool:
    """Return whether the text is within the limits of a chunk, MAX_ITEMS and MAX_TEXT."""
    return len(text) <= MAX_ITEMS and len(text_bytes(text)) <= MAX_TEXT


def text_bytes(text: tuple[tuple[str, str], ...]) -> bytes:
    """Return the content of the chunk of text, before compression."""
    return b"".join(part.encode() + b"\0" for item in text for part in item)


def text_from(data: bytes) -> tuple[tuple[str, str], ...]:
    """Return the text of the content of a chunk, the inverse of `text_bytes`. Raises FormatError if it is damaged."""
    parts = data.split(b"\0")
    if parts.pop() != b"" or len(parts) % 2 or len(parts) > 2 * MAX_ITEMS:
        raise FormatError("the file is damaged: its text is cut off or has too many items")
    try:
        words = [part.decode() for part in parts]
    except UnicodeDecodeError:
        raise FormatError("the file is damaged: its text is not UTF-8") from None
    return tuple(zip(words[::2], words[1::2], strict=True))


def iptc_of(image: Image.Image) -> bytes | None:
    """Return the IPTC data of an image, or None.

    It is looked for in `info["iptc"]`, in Photoshop's resources (JPEG), in TIFF tags, and in ImageMagick's text of PNG.
    """
    found = image.info.get("iptc")
    if found is None and isinstance(resources := image.info.get("photoshop"), Mapping):
        found = resources.get(_IPTC_RESOURCE)
    if found is None:
        found = _iptc_of_tiff(image)
    if found is None and isinstance(profile := image.info.get(_IPTC_PROFILE), str):
        found = _from_profile(profile)
    return found if isinstance(found, bytes) and found[:1] == b"\x1c" else None


def _iptc_of_tiff(image: Image.Image) -> bytes | None:
    tags: Any = getattr(image, "tag_v2", {})
    value = tags.get(_IPTC_TAG)
    if isinstance(value, int):
        value = (value,)
    if isinstance(value, tuple) and all(isinstance(each, int) and 0 <= each < 1 << 32 for each in value):
        # Many programs wrongly declare these bytes as 32-bit numbers.
        order = "<" if getattr(tags, "_endian", "<") == "<" else ">"
        return struct.pack(f"{order}{len(value)}I", *value).rstrip(b"\0")
    return value if isinstance(value, bytes) else None


def _from_profile(profile: str) -> bytes | None:
    """Return the bytes of a raw profile of ImageMagick: a name, a length and hexadecimal digits.

    If the data is one of Photoshop's resources, its content is returned.
    """
    try:
        data = bytes.fromhex("".join(profile.split("\n")[3:]))
    except ValueError:
        return None
    marker = b"8BIM\x04\x04"
    if (start := data.find(marker)) < 0:
        return data
    start += len(marker)
    start += (data[start] + 2) // 2 * 2 if start < len(data) else 0  # a name, with its length and padding
    return data[start + 4 : start + 4 + int.from_bytes(data[start : start + 4], "big")]


def iptc_profile(iptc: bytes) -> tuple[str, str]:
    """Return the keyword and the text that store IPTC data in a PNG file, as ImageMagick writes it."""
    digits = binascii.hexlify(iptc).decode()
    lines = "\n".join(digits[start : start + 72] for start in range(0, len(digits), 72))
    return _IPTC_PROFILE, f"\niptc\n{len(iptc):8}\n{lines}\n"


def iptc_segment(iptc: bytes) -> bytes:
    """Return the segment APP13 that stores IPTC data in a JPEG file. Raises ValueError if the data is too long."""
    body = b"Photoshop 3.0\x008BIM" + struct.pack(">HHI", _IPTC_RESOURCE, 0, len(iptc)) + iptc + bytes(len(iptc) % 2)
    if len(body) > 65533:
        raise ValueError("IPTC data does not fit in a segment")
    return b"\xff\xed" + struct.pack(">H", len(body) + 2) + body


def resolution_of(image: Image.Image) -> tuple[float, float] | None:
    """Return the horizontal and vertical pixels per inch of an image, or None.

    For JPEG files without a resolution, Pillow sets 72, which is ignored here.
    """
    is_jpeg = "jfif_unit" in image.info or image.format in ("JPEG", "MPO")
    if is_jpeg and image.info.get("jfif_unit") not in (1, 2):  # "dpi" is then that of EXIF, or 72
        return None
    value = image.info.get("dpi")
    try:
        across, down = (float(each) for each in value)  # type: ignore[union-attr]
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if all(_is_possible(each) for each in (across, down)) else None


def _is_possible(number: float) -> bool:
    return math.isfinite(number) and 1 <= round(1000 * number) < 1 << 32


def resolution_of_exif(data: bytes | None) -> tuple[float, float] | None:
    """Return the horizontal and vertical pixels per inch in EXIF data, or None."""
    if data is None or not exif.is_bounded(data):
        return None
    tags = Image.Exif()
    try:
        tags.load(exif.PREFIX + data)
        factor = _PER_INCH[tags.get(_UNIT, 2)]
        across, down = float(tags[_X]) * factor, float(tags[_Y]) * factor
    except Exception:  # damaged bytes can make Pillow raise any exception
        return None
    return (across, down) if all(_is_possible(each) for each in (across, down)) else None


def exif_of_resolution(resolution: tuple[float, float]) -> bytes:
    """Return EXIF data that contains only the resolution."""
    tags = Image.Exif()
    tags[_X], tags[_Y] = resolution
    tags[_UNIT] = 2
    return tags.tobytes().removeprefix(exif.PREFIX)


def resolution_bytes(resolution: tuple[float, float]) -> bytes:
    """Return the content of the chunk of the resolution."""
    return _RESOLUTION.pack(*(round(1000 * each) for each in resolution))


def resolution_from(data: bytes) -> tuple[float, float]:
    """Return the resolution of the content of a chunk, the inverse of `resolution_bytes`. Raises FormatError."""
    if len(data) != _RESOLUTION.size or 0 in (numbers := _RESOLUTION.unpack(data)):
        raise FormatError("the file is damaged: its resolution is not two positive numbers")
    return numbers[0] / 1000, numbers[1] / 1000
