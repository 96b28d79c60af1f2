"""How do image files become arrays of pixels, and arrays image files? Pillow in and out.

file -- open_image --> Image -- pixels_of --> (H, W, 3) uint8 -- image_of --> Image -- save_image --> file
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from hpcmref.container import MAX_PIXELS, MAX_SIDE
from hpcmref.errors import HpcmrefError, ImageError

_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
}

# EXIF orientation -> what turns the stored image upright; 1, or anything else, is upright already.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_pillow_limit = threading.Lock()


def open_image(source: Path | BinaryIO) -> Image.Image:
    """The first frame of an image file, with its pixels decoded and the file closed.

    Warns if there are more frames. Raises ImageError if the file cannot be read, is no image, is damaged, or has more
    than MAX_PIXELS pixels or a side above MAX_SIDE; the latter before any pixel is decoded.
    """
    name = str(source) if isinstance(source, Path) else getattr(source, "name", "the image")
    try:
        if isinstance(source, Path):
            with source.open("rb") as file:
                return _first_frame(file, name)
        return _first_frame(source, name)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image of a kind that Pillow reads") from None
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes lead them to
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"cannot read {name}: {reason}") from error


def pixels_of(image: Image.Image) -> tuple[np.ndarray, bool]:
    """Upright pixels (H, W, 3) uint8, and whether the image is grey (its three channels are then equal).

    Warns if anything is lost: transparency, more than 8 bits, colours that are not RGB. Raises ImageError for images of
    floating-point numbers, whose range is unknown.
    """
    pixels = np.array(_eight_bit(_upright(image)))
    grey = pixels.ndim == 2
    return (np.repeat(pixels[..., None], 3, axis=2) if grey else pixels), grey


def image_of(pixels: np.ndarray, grey: bool) -> Image.Image:
    """An RGB image of pixels (H, W, 3) uint8, or an L image of the rounded mean of the three channels."""
    if grey:
        pixels = ((pixels.sum(axis=2, dtype=np.uint16) + 1) // 3).astype(np.uint8)
    return Image.fromarray(pixels)


def format_of(path: Path) -> str:
    """Pillow's name for the format that the suffix of `path` asks for; raises ImageError if none does."""
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        known = ", ".join(_FORMATS)
        raise ImageError(f"cannot tell the image format of {path}: its suffix must be one of {known}") from None


def save_image(image: Image.Image, path: Path) -> None:
    """Write the image whole or not at all, in the format of the suffix; all but JPEG (quality 95) are lossless.

    Raises ImageError if the suffix is unknown or the format cannot hold the image, HpcmrefError as `atomic_write`.
    """
    form = format_of(path)
    rendered = io.BytesIO()
    try:
        image.save(rendered, form, **_OPTIONS.get(form, {}))
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot save {path} as {form}: {error}") from error
    atomic_write(path, rendered.getvalue())


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that at every moment its old content or all of `data` is there, and never a part.

    Links are followed; pipes and devices are written to, not replaced. Raises HpcmrefError if the folder is missing, is
    full, or may not be written to; whatever ends the write early, no temporary file stays behind.
    """
    target = path.resolve()
    temporary = target.with_name(f".hpcmref-{secrets.token_hex(8)}.tmp")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise HpcmrefError(f"cannot write {path}: {error.strerror or error}") from error


def _first_frame(file: BinaryIO, name: str) -> Image.Image:
    with _no_bomb_check():
        image = Image.open(file)
    if min(image.size) < 1 or max(image.size) > MAX_SIDE or image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {image.width} x {image.height} pixels; "
            f"the limits are {MAX_SIDE} pixels a side and {MAX_PIXELS} in all"
        )
    # The later images of an MPO are thumbnails and gain maps that cameras append to a JPEG, not frames.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        _warn(f"only the first frame of {name} is used")
    image.load()
    _exif(image)  # TIFF reads it from the file, which is closed soon; Pillow remembers it
    return image


@contextlib.contextmanager
def _no_bomb_check() -> Iterator[None]:
    """Lift Pillow's own limit on pixels, which is below ours; only where headers are read, as it is global."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _exif(image: Image.Image) -> Image.Exif:
    try:
        return image.getexif()
    except Exception:  # whatever damaged bytes lead Pillow to
        _warn("its EXIF data is damaged; the image may not be upright")
        return Image.Exif()


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_exif(image).get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image in mode RGB or L, with warnings about what that loses."""
    if image.mode == "F":
        raise ImageError("an image of floating-point numbers cannot be encoded; convert it to 8 bits first")
    if image.mode.startswith("I"):
        _warn("16-bit grey is reduced to 8 bits")
        sixteen = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((sixteen + 128) // 257).astype(np.uint8))  # rounds: white is 65535 = 255 * 257
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            _warn("transparency is not kept")
        return image.convert(image.mode.removesuffix("A"))
    if image.mode == "1":
        _warn("black and white is kept as grey")
        return image.convert("L")
    if image.mode in ("RGB", "L"):
        return image
    _warn(f"{'palette' if image.mode == 'P' else image.mode} colours are converted to RGB")
    return image.convert("RGB")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
