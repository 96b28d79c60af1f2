"""Lossless coding: the payload is a WebP or PNG file of the colours, whichever is smaller. No model is needed.

Alpha, metadata and mode are in chunks, as in files with a learned payload. WebP is limited to 16383 pixels a side, so
larger pictures are always PNG.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmref import DEFAULT_MAX_PIXELS, __version__
from hpcmref.errors import DecodeError, ImageError
from hpcmref.format import container
from hpcmref.format.container import Coding, Container, Encoder
from hpcmref.picture import images, ranges
from hpcmref.picture.images import Picture
from hpcmref.picture.metadata import extras_of

_MAX_WEBP_SIDE = 16383
_WEBP: dict[str, Any] = {"lossless": True, "quality": 100, "method": 4, "exact": True}
_THOROUGH: dict[str, Any] = {**_WEBP, "method": 5}
_SIMPLE = 0.25
"""Bits per pixel below which WebP's thorough search is worth its time: it saves a tenth on ordered dither."""


def encode(image: Image.Image | NDArray[Any]) -> bytes:
    """Encode an image so that its colours, alpha and grey levels decode exactly, also where alpha is 0.

    Returns the bytes of the file. Raises ImageError for images that 8 bits of grey or RGB cannot represent exactly
    (16 bits, CMYK, YCbCr, LAB, HSV), and the errors of `picture_of`.
    """
    _refuse_inexact(image)
    picture = images.picture_of(image, keep_invisible=True)
    return file_of(picture, *pack(picture))


def file_of(picture: Picture, coding: Coding, payload: bytes) -> bytes:
    """Return the bytes of a file with the payload that `pack` made of the picture."""
    height, width = picture.pixels.shape[:2]
    encoder = Encoder(*map(int, __version__.split(".")[:2]))
    chunks = picture.extras.chunks()
    return container.write(Container(width, height, picture.grey, None, payload, coding, chunks, encoder))


def pack(picture: Picture) -> tuple[Coding, bytes]:
    """Return the smallest lossless payload of a picture's colours, and its coding."""
    colours = Image.fromarray(picture.pixels[..., 0] if picture.grey else picture.pixels)
    payloads = [(Coding.PNG, _saved(colours, "PNG", {"optimize": True}))]
    if max(colours.size) <= _MAX_WEBP_SIDE:
        webp = _saved(colours, "WEBP", _WEBP)
        if 8 * len(webp) < _SIMPLE * colours.width * colours.height:
            webp = min(webp, _saved(colours, "WEBP", _THOROUGH), key=len)
        payloads.append((Coding.WEBP, webp))
    return min(payloads, key=lambda each: len(each[1]))


def _saved(colours: Image.Image, form: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    colours.save(file, form, **options)
    return file.getvalue()


def unpack(file: Container) -> NDArray[Any]:
    """Decode the colours (H, W, 3) uint8 of a file with a lossless payload.

    Raises DecodeError if the payload is damaged, or has not the size that the header states. The size is compared
    before any pixel is decoded.
    """
    try:
        with Image.open(io.BytesIO(file.payload), formats=[file.coding.name]) as image:
            if image.size != (file.width, file.height) or image.mode not in ("1", "L", "P", "RGB"):
                raise DecodeError(
                    f"the file is damaged: its payload is a picture of {image.width} x {image.height} {image.mode}, "
                    f"not of {file.width} x {file.height}"
                )
            return np.array(image.convert("RGB"))
    except DecodeError:
        raise
    except Exception as error:  # damaged bytes can make Pillow's plugins raise any exception
        raise DecodeError(f"the file is damaged: its {file.coding.name} payload cannot be decoded ({error})") from None


def decode(file: Container, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode the image of a file with a lossless payload.

    Raises DecodeError for a damaged payload, FormatError for damaged chunks, and ImageError for more pixels than
    max_pixels or for a truncated file.
    """
    if (pixels := file.width * file.height) > max_pixels:
        raise ImageError(f"the image has {pixels} pixels, more than the {max_pixels} that max_pixels allows")
    return images.image_of(unpack(file), file.grey, extras_of(file))


def verify(data: bytes, image: Image.Image | NDArray[Any]) -> None:
    """Decode a file that `encode` returned and compare all pixels with the image that it was given.

    image: as in `encode`. Raises DecodeError if a pixel differs.
    """
    compare(data, images.picture_of(image, keep_invisible=True))


def compare(data: bytes, picture: Picture) -> None:
    """Decode a lossless file, and compare all pixels with those of a picture. Raises DecodeError if one differs."""
    file = container.parse(data)
    alpha, expected = extras_of(file).alpha, picture.extras.alpha
    same_alpha = alpha is expected or (alpha is not None and expected is not None and np.array_equal(alpha, expected))
    if not (same_alpha and np.array_equal(unpack(file), picture.pixels)):
        raise DecodeError("the decoded picture is not the one that was encoded: nothing was returned")


def _refuse_inexact(image: Image.Image | NDArray[Any]) -> None:
    if isinstance(image, np.ndarray):
        wide = ranges.checked_array(image).dtype not in (np.uint8, bool)
    else:
        wide = isinstance(image, Image.Image) and ranges.is_wide(image)
    if wide:
        raise ImageError(
            "more than 8 bits a channel cannot be stored losslessly; leave out lossless, or use PNG or TIFF"
        )
    if isinstance(image, Image.Image) and image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        raise ImageError(f"{image.mode} colours are converted to RGB, which is not lossless; convert them first")
