"""Apply the transparent colour of a PNG file (tRNS) as the PNG specification defines it.

Pillow compares that colour with pixels that it has scaled (from 1, 2 and 4 bits) or cut (from 16 bits a channel) to 8
bits. Here it is compared with the samples of the file.
"""

from __future__ import annotations

import io
from typing import BinaryIO

import numpy as np
from PIL import Image

_SCALED = {"1": (1, 255), "L;2": (3, 85), "L;4": (15, 17)}
_HIGH_BYTES, _LOW_BYTES = "RGB;16B", "RGB;16L"


def keyed(image: Image.Image, reopen: BinaryIO) -> Image.Image:
    """Correct the transparent colour of a PNG image that has been opened, but not loaded.

    Returns the image with the correct colour in `info`, or an RGBA image if it has 16 bits a channel.
    reopen: the file of the image, at any position. It is read only for 16 bits a channel.
    """
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", ())
    if image.format != "PNG" or key is None or not tiles:
        return image
    raw = tiles[0][3]
    raw = raw if isinstance(raw, str) else raw[0]
    if raw in _SCALED and isinstance(key, int):
        mask, factor = _SCALED[raw]
        image.info["transparency"] = (key & mask) * factor
    elif raw == _HIGH_BYTES and isinstance(key, tuple):
        return _with_alpha_of_16_bits(image, key, reopen)
    return image


def _with_alpha_of_16_bits(image: Image.Image, key: tuple[int, ...], reopen: BinaryIO) -> Image.Image:
    """Return an RGBA image that is transparent where all 16 bits of all channels are equal to those of `key`."""
    reopen.seek(0)
    low = Image.open(io.BytesIO(reopen.read()), formats=["PNG"])
    # Pillow keeps the upper byte of each sample. If it reads the samples as little-endian, it keeps the lower byte.
    low.tile = [tile._replace(args=_LOW_BYTES) for tile in low.tile]
    high, low_bytes = np.asarray(image).astype(np.uint16), np.asarray(low)
    opaque = ((high << 8 | low_bytes) != np.array(key, np.uint16)).any(axis=2)
    image.putalpha(Image.fromarray(opaque * np.uint8(255)))
    image.info.pop("transparency", None)
    return image
