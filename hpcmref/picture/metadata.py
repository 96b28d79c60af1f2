"""What an image has besides colours, and the chunks of a file that store it.

It is alpha, the mode of the original image, its ICC, EXIF, XMP and IPTC data, text and resolution. `FORMAT.md`
specifies the chunks. Most of them are compressed as a raw LZMA2 stream with a dictionary of 1 MiB. Unpacking a chunk
never takes more memory than the number of pixels (alpha) or MAX_METADATA.
"""

from __future__ import annotations

import io
import lzma
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmref.errors import FormatError
from hpcmref.format.container import Container, Tag
from hpcmref.picture import texts
from hpcmref.picture.exif import PREFIX

MAX_METADATA = 1 << 24
"""The most bytes of ICC, EXIF, XMP or IPTC data, each, before compression."""

RESTORED = {"1": 1, "I;16": 2, "CMYK": 3, "RGB": 4}
"""Modes that are coded as another mode and restored by the decoder, with the content of their chunk."""

_METADATA = (("icc", Tag.ICC), ("exif", Tag.EXIF), ("xmp", Tag.XMP), ("iptc", Tag.IPTC))
_LZMA2 = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 0}]
_SAMPLE = 1 << 20


@dataclass(frozen=True, eq=False)
class Extras:
    """What an image has besides colours.

    alpha: (H, W) uint8, or None.
    mode: a key of RESTORED, or None for the modes L, LA, RGB and RGBA, which follow from colours and alpha.
    cicp: 4 bytes as in PNG's chunk cICP (primaries, transfer function, matrix, full range; ITU-T H.273), or None.
    icc, exif, xmp, iptc: None, or 1 byte to MAX_METADATA in the form of their standards; EXIF without "Exif\\0\\0", and
        IPTC as datasets of IPTC-IIM.
    text: pairs (keyword, text), such as comments.
    resolution: horizontal and vertical pixels per inch, or None if it is unknown or equal to that of the EXIF data.
    """

    alpha: NDArray[np.uint8] | None = None
    mode: str | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    cicp: bytes | None = None
    iptc: bytes | None = None
    text: tuple[tuple[str, str], ...] = ()
    resolution: tuple[float, float] | None = None

    def chunks(self) -> tuple[tuple[int, bytes], ...]:
        """Return the chunks (tag, content) that store this, in ascending order of tags."""
        found: list[tuple[int, bytes]] = []
        for name, tag in _METADATA:
            if (content := getattr(self, name)) is not None:
                found.append((tag, _pack(content)))
        if self.alpha is not None:
            found.append((Tag.ALPHA, pack_alpha(self.alpha)))
        if self.mode is not None:
            found.append((Tag.MODE, bytes([RESTORED[self.mode]])))
        if self.cicp is not None:
            found.append((Tag.CICP, self.cicp))
        if self.text:
            found.append((Tag.TEXT, _pack(texts.text_bytes(self.text))))
        if self.resolution is not None:
            found.append((Tag.RESOLUTION, texts.resolution_bytes(self.resolution)))
        return tuple(sorted(found))


def extras_of(file: Container) -> Extras:
    """Read alpha, mode and metadata from the chunks of a file.

    Raises FormatError if a chunk is damaged or does not match the image.
    """
    mode = mode_of(file).replace("RGBA", "RGB") if file.chunk(Tag.MODE) is not None else None
    mode = mode if mode in RESTORED and (mode != "RGB" or file.grey) else None
    alpha = file.chunk(Tag.ALPHA)
    return replace(
        metadata_of(file),
        alpha=None if alpha is None else unpack_alpha(alpha, file.height, file.width),
        mode=mode,
    )


def metadata_of(file: Container) -> Extras:
    """Read the metadata from the chunks of a file, without alpha and mode. Raises FormatError if it is damaged."""
    metadata: dict[str, Any] = {}
    for name, tag in _METADATA:
        packed = file.chunk(tag)
        metadata[name] = None if packed is None else _unpack(packed, MAX_METADATA, name.upper())
    if (cicp := file.chunk(Tag.CICP)) is not None and len(cicp) != 4:
        raise FormatError(f"the file is damaged: its CICP data has {len(cicp)} bytes, not 4")
    if (text := file.chunk(Tag.TEXT)) is not None:
        metadata["text"] = texts.text_from(_unpack(text, texts.MAX_TEXT, "text"))
    if (resolution := file.chunk(Tag.RESOLUTION)) is not None:
        metadata["resolution"] = texts.resolution_from(resolution)
    return Extras(**metadata, cicp=cicp)


def mode_of(file: Container) -> str:
    """Return Pillow's name of the mode of a file's image. Raises FormatError if the mode does not match the image."""
    base = ("L" if file.grey else "RGB") + ("A" if file.chunk(Tag.ALPHA) is not None else "")
    content = file.chunk(Tag.MODE)
    if content is None:
        return base
    if content == bytes([RESTORED["RGB"]]) and file.grey:
        return base.replace("L", "RGB")
    for mode, number in RESTORED.items():
        if content == bytes([number]) and base == ("RGB" if mode == "CMYK" else "L") and mode != "RGB":
            return mode
    if file.version > 1 and len(content) == 1 and content[0] not in RESTORED.values():
        return base  # a mode of a later version, which only concerns how the image is presented
    raise FormatError(f"the file is damaged: its mode {content[:8].hex()} does not match {base}")


def info_of(extras: Extras) -> dict[str, Any]:
    """Return the metadata as a dictionary for Pillow's `Image.info`.

    Keys are Pillow's where it has some, and else those of hpcmref (see `picture.texts`).
    """
    text = dict(extras.text)
    info = {
        "icc_profile": extras.icc,
        "exif": None if extras.exif is None else PREFIX + extras.exif,
        "xmp": extras.xmp,
        "cicp": extras.cicp,
        "iptc": extras.iptc,
        "text": text or None,
        "comment": text[texts.COMMENT].encode() if texts.COMMENT in text else None,
        "dpi": extras.resolution or texts.resolution_of_exif(extras.exif),
    }
    return {name: content for name, content in info.items() if content is not None}


def pack_alpha(alpha: NDArray[np.uint8]) -> bytes:
    """Compress alpha (H, W) uint8 to the content of a chunk.

    FORMAT.md lists the kinds. Equal values take one byte, and values of 0 and 255 become bits. For other values, the
    kind of differences that needs the fewest bytes for a sample of rows is used, or lossless WebP if that is smaller.
    """
    first = int(alpha.flat[0])
    if not (alpha != first).any():
        return bytes([first])
    if ((alpha == 0) | (alpha == 255)).all():
        return bytes([_BITS]) + _pack(np.packbits(alpha != 0, axis=1).tobytes())
    rows = max(1, _SAMPLE // alpha.shape[1])
    middle = max(0, (len(alpha) - rows) // 2)
    sample = alpha[middle : middle + rows]
    best = min(range(len(_FORWARD)), key=lambda number: len(_pack(_FORWARD[number](sample).tobytes())))
    packed = bytes([best]) + _pack(_FORWARD[best](alpha).tobytes())
    if len(packed) > alpha.size // 4 and max(alpha.shape) <= _MAX_WEBP_SIDE:  # WebP is slow, but better for noise
        file = io.BytesIO()
        Image.fromarray(alpha).save(file, "WEBP", lossless=True, quality=80, method=4)
        packed = min(packed, bytes([_WEBP]) + file.getvalue(), key=len)
    return packed


def unpack_alpha(content: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """Decompress the content of a chunk to alpha (height, width) uint8. Raises FormatError if it has another size."""
    if len(content) == 1:
        return np.full((height, width), content[0], np.uint8)
    if content and content[0] == _WEBP:
        return _unpack_webp(content[1:], height, width)
    if not content or content[0] > _BITS:
        raise FormatError("the file is damaged: its alpha has an unknown kind")
    columns = (width + 7) // 8 if content[0] == _BITS else width
    data = _unpack(memoryview(content)[1:], height * columns, "alpha")
    if len(data) != height * columns:
        raise FormatError(f"the file is damaged: its alpha does not have {width} x {height} pixels")
    plane = np.frombuffer(data, np.uint8).reshape(height, columns)
    if content[0] == _BITS:
        return np.unpackbits(plane, axis=1, count=width) * np.uint8(255)
    plane = plane.copy()
    for axis in _AXES[content[0]]:
        np.add.accumulate(plane, axis=axis, dtype=np.uint8, out=plane)
    return plane


def _unpack_webp(content: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """Decode the green channel of a WebP file. Raises FormatError if it is damaged or has another size."""
    try:
        with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
            if image.size == (width, height):
                return np.array(image.convert("RGB"))[..., 1]
    except Exception as error:  # damaged bytes can make Pillow's plugins raise any exception
        raise FormatError(f"the file is damaged: its alpha cannot be unpacked ({error})") from None
    raise FormatError(f"the file is damaged: its alpha does not have {width} x {height} pixels")


def _differences(axes: tuple[int, ...]) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Return a function that subtracts from each value the one before it (modulo 256), along each of the axes."""

    def forward(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
        for axis in axes:
            plane = np.diff(plane, axis=axis, prepend=np.uint8(0))
        return plane

    return forward


# The first byte of the content says what is subtracted from each value: nothing, the left neighbour, the upper
# neighbour, or left + upper - upper left. Cumulative sums along these axes undo it, which is fast in NumPy.
_AXES = ((), (1,), (0,), (1, 0))
_FORWARD = [_differences(axes) for axes in _AXES]
_WEBP = len(_AXES) + 1
_MAX_WEBP_SIDE = 16383
_BITS = len(_AXES)  # only 0 and 255, packed to 8 values a byte: measured to be 30 % smaller


def _pack(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_LZMA2)


def _unpack(packed: bytes | memoryview, limit: int, name: str) -> bytes:
    """Decompress a raw LZMA2 stream. Raises FormatError unless it is exactly one stream of 1 to `limit` bytes."""
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA2)
    try:
        data = unpacker.decompress(packed, limit + 1)
    except lzma.LZMAError:
        raise FormatError(f"the file is damaged: its {name} data cannot be unpacked") from None
    if not 1 <= len(data) <= limit or not unpacker.eof or unpacker.unused_data:
        raise FormatError(f"the file is damaged: its {name} data is cut off, too long, or followed by more")
    return data
