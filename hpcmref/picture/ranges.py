"""Scale images whose numbers are not 0..255 to 0..65535 or 0..255 by fixed rules, or refuse them.

| image | rule |
| --- | --- |
| TIFF with SMinSampleValue and SMaxSampleValue | these two are black and white |
| unsigned TIFF of 9 to 16 bits | 0 is black, 2^bits - 1 is white |
| grey of 32 bits without a range, signed numbers | unchanged if all values are 0..65535, else refused |
| floating-point numbers | 0 is black, 1 is white; refused if any value is outside or not a number |
| PhotometricInterpretation WhiteIsZero, above 8 bits | inverted |
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmref.errors import ImageError

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _LOWEST, _HIGHEST = 258, 262, 339, 340, 341
_WHITE_IS_ZERO = 0
_SIGNED = 2


def is_wide(image: Image.Image) -> bool:
    """Return whether the image has one channel of more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def normalised(image: Image.Image) -> Image.Image:
    """Convert an image of more than 8 bits to mode I;16, with 0 for black and 65535 for white; return others unchanged.

    Raises ImageError for numbers whose range is unknown.
    """
    if not is_wide(image):
        return image
    tags: Any = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("an image with numbers that are infinite or not numbers cannot be encoded")
    low, high = _range(image, tags, values)
    if values.min() < low or values.max() > high:
        raise ImageError(
            f"the image has numbers from {values.min():.6g} to {values.max():.6g}, and which of them are black and "
            f"white is not known ({low:.6g} to {high:.6g} would be): scale it to 8 or 16 bits first"
        )
    scaled = np.rint((values - low) / (high - low) * 65535)
    if _first(tags.get(_PHOTOMETRIC)) == _WHITE_IS_ZERO:
        scaled = 65535 - scaled
    result = Image.fromarray(scaled.astype(np.uint16))
    if isinstance(key := image.info.get("transparency"), int) and image.mode != "F":
        result.info["transparency"] = round((key - low) / (high - low) * 65535)
    return result


def image_of_array(array: NDArray[Any]) -> Image.Image:
    """Make an image of an array (H, W) or (H, W, 1 to 4) of bool, uint8, uint16, or floating-point numbers from 0 to 1.

    The channels are grey, grey and alpha, RGB, or RGB and alpha. More than one channel of 16 bits is rounded to 8 bits,
    with a warning. Raises ImageError for any other array.
    """
    array = checked_array(array)
    if array.dtype.kind == "f":
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    if array.dtype == np.uint16 and array.ndim == 3:
        warnings.warn("16 bits a channel are rounded to 8", stacklevel=4)
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype == bool and array.ndim == 3:
        array = array * np.uint8(255)
    return Image.fromarray(np.ascontiguousarray(array))


def checked_array(array: NDArray[Any]) -> NDArray[Any]:
    """Check that an array is an image, as `image_of_array` describes it.

    Returns it in native byte order, and without the last axis if that has one channel. Raises ImageError.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (2, 3, 4))) or not array.size:
        raise ImageError(f"an image is an array (H, W) or (H, W, 1 to 4), not one of shape {array.shape}")
    if array.dtype.kind == "f":
        if not ((array >= 0) & (array <= 1)).all():
            raise ImageError("an image of floating-point numbers must have them between 0 and 1")
    elif array.dtype.newbyteorder("=") not in (np.uint8, np.uint16, bool):
        raise ImageError(f"an image is an array of bool, uint8, uint16 or floating-point numbers, not of {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _range(image: Image.Image, tags: Any, values: NDArray[Any]) -> tuple[float, float]:
    """Return the numbers that mean black and white, by the rules of this module."""
    low, high = _first(tags.get(_LOWEST)), _first(tags.get(_HIGHEST))
    if low is not None and high is not None and low < high and low <= values.min() and values.max() <= high:
        return float(low), float(high)
    if image.mode == "F":
        return 0.0, 1.0
    bits = _first(tags.get(_BITS))
    if bits is not None and 8 < bits < 16 and _first(tags.get(_SAMPLE_FORMAT)) != _SIGNED:
        return 0.0, float(2**bits - 1)
    return 0.0, 65535.0


def _first(value: Any) -> Any:
    """Return the number in a value of a TIFF tag, which may be a tuple, or None if it is not a number."""
    if isinstance(value, tuple):
        value = value[0] if value else None
    return value if isinstance(value, (int, float)) or hasattr(value, "numerator") else None
