"""Convert image files to arrays of pixels, and arrays to image files.

file -- open_image --> Image -- picture_of --> (H, W, 3) uint8 and extras -- image_of --> Image -- save_image --> file

| image | coded as | decoded to |
| --- | --- | --- |
| L, RGB | themselves | themselves |
| LA, RGBA, or any with transparency | L or RGB, and alpha without loss | LA or RGBA |
| 1 | L | 1, black below 128 |
| I;16 and other 16-bit grey | the nearest 8 bits, L | I;16, times 257 |
| CMYK | RGB | CMYK, with as much black as possible |
| P, YCbCr, LAB, HSV, 16 bits a channel | RGB or RGBA of 8 bits | RGB or RGBA |

An RGB or RGBA image whose three channels are equal everywhere is coded as grey and decoded to RGB or RGBA. Colours of
fully transparent pixels are replaced by a smooth continuation of the visible ones, unless the caller keeps them. A
palette is not restored, because decoded colours are only near to those of the palette. `hpcmref.picture.ranges` defines
which numbers are black and white in images of more than 8 bits.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from hpcmref.arguments import wrong_type
from hpcmref.errors import ImageError
from hpcmref.format.container import MAX_PIXELS, MAX_SIDE
from hpcmref.picture import exif, plugins, texts
from hpcmref.picture.frames import frames_of
from hpcmref.picture.invisible import filled
from hpcmref.picture.metadata import MAX_METADATA, Extras, info_of
from hpcmref.picture.privacy import without
from hpcmref.picture.ranges import image_of_array, is_wide, normalised
from hpcmref.picture.render import render
from hpcmref.picture.transparency import keyed
from hpcmref.runtime.files import atomic_write

FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "JXL": (".jxl",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "NPY": (".npy",),
}
"""The formats that are written, by Pillow's names, and NPY for arrays of NumPy. The first suffix is the default."""

ALLOWED = (
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "HEIF",
    "HPCM",
    "ICO",
    "JPEG",
    "JPEG2000",
    "JXL",
    "MPO",
    "PCX",
    "PNG",
    "PPM",
    "QOI",
    "TGA",
    "TIFF",
    "WEBP",
)
"""Pillow's names of the formats that are read; HEIF and JXL need plugins. All of them are decoded within this process.
Formats that start other programs are never opened, such as EPS, which starts Ghostscript, WMF, and Pillow's stubs."""

_EXIF_KEYS = ("exif", "Raw profile type exif", "Raw profile type APP1")
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation(?:\s*=\s*[\"']|>)\s*)[0-9]")

# EXIF orientation -> the transposition that turns the stored image upright. With any other value, it is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_SIDEWAYS = (5, 6, 7, 8)
"""The orientations for which width and height are exchanged."""

_pillow_limit = threading.Lock()


def open_image(source: Path | BinaryIO, frame: int | None = None) -> Image.Image:
    """Read one frame or page of an image file and decode its pixels.

    frame: its number, from 1. None means the first, with a warning if there are others.

    Raises ImageError if the file cannot be read, is not an image, is damaged, or has more than MAX_PIXELS pixels or a
    side above MAX_SIDE. The size is checked before any pixel is decoded.
    """
    name = _name_of(source)
    with _reading(source, name) as file:
        return _frame(file, name, frame)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file, read only its header, and yield the image. Raises ImageError as `open_image` does."""
    with _reading(path, str(path)) as file:
        yield _opened(file, str(path))[1]


def _name_of(source: Path | BinaryIO) -> str:
    return str(source) if isinstance(source, Path) else getattr(source, "name", "the image")


@contextlib.contextmanager
def _reading(source: Path | BinaryIO, name: str) -> Iterator[BinaryIO]:
    """Open a source and yield the file. Exceptions in this context become ImageErrors that name the source."""
    try:
        if isinstance(source, Path):
            with source.open("rb") as file:
                yield file
        else:
            yield source
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        if (form := _unknown_format(source)) is not None:
            raise ImageError(f"cannot read {name}: {plugins.missing(form)}") from None
        raise ImageError(f"{name} is not an image in one of the supported formats: {', '.join(_formats())}") from None
    except Exception as error:  # damaged bytes can make Pillow's plugins raise any exception
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"cannot read {name}: {reason}") from error


@dataclass(frozen=True, eq=False)
class Picture:
    """An upright image, ready to be coded.

    pixels: (H, W, 3) uint8. If `grey`, the three channels are equal.
    extras: alpha, mode and metadata.
    is_filled: the colours of pixels with alpha 0 have been replaced.
    """

    pixels: NDArray[Any]
    grey: bool
    extras: Extras
    is_filled: bool = False


def picture_of(image: Image.Image | NDArray[Any], keep_invisible: bool = False) -> Picture:
    """Convert an image, or an array (see `ranges.image_of_array`), to the form in which it is coded.

    keep_invisible: keep the colours of pixels whose alpha is 0. They are otherwise replaced, see `picture.invisible`.

    Warns of everything that is lost: more than 8 bits, colours that are not RGB, and damaged or too large metadata.

    Raises ImageError for numbers whose range is unknown, for an image that cannot be decoded or is closed, for one
    without pixels or above the limits of the format, and for a lazily opened image of a format outside ALLOWED. Raises
    ArgumentTypeError for other objects.
    """
    if isinstance(image, np.ndarray):
        image = image_of_array(image)
    if not isinstance(image, Image.Image):
        raise wrong_type("image", image, "an image of Pillow or an array of NumPy")
    _load(image)
    metadata = _metadata(image)
    colours, alpha, mode = _split(_upright(image))
    if colours.mode != image.mode and image.mode in ("LAB", "YCbCr", "HSV") and metadata.icc is not None:
        metadata = replace(metadata, icc=None)  # the profile describes the colours before their conversion to RGB
    pixels = np.array(colours)
    is_filled = alpha is not None and not keep_invisible
    if alpha is not None and is_filled:
        pixels = filled(pixels.reshape(*alpha.shape, -1), alpha).reshape(pixels.shape)
    grey = pixels.ndim == 2
    if grey:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    elif mode is None and _is_grey(pixels):
        grey, mode = True, "RGB"
    return Picture(pixels, grey, replace(metadata, alpha=alpha, mode=mode), is_filled)


def pixels_of(image: Image.Image) -> tuple[NDArray[Any], bool]:
    """Return the pixels (H, W, 3) uint8 of `picture_of`, and whether they are grey. Warns if there is transparency."""
    picture = picture_of(image)
    if picture.extras.alpha is not None and picture.extras.alpha.min() < 255:
        _warn("transparency is not kept")
    return picture.pixels, picture.grey


def image_of(pixels: NDArray[Any], grey: bool, extras: Extras | None = None) -> Image.Image:
    """Make an image of pixels (H, W, 3) uint8 in the mode of `extras`, with its alpha and metadata.

    grey: use the rounded mean of the three channels. The metadata is stored in `info` (see `metadata.info_of`).
    """
    extras = extras or Extras()
    if grey:
        pixels = ((pixels.sum(axis=2, dtype=np.uint16) + 1) // 3).astype(np.uint8)
    if extras.mode == "1":
        image = Image.fromarray(pixels >= 128)
    elif extras.mode == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16) * 257)
    elif extras.mode == "CMYK":
        image = _cmyk(pixels)
    elif extras.mode == "RGB":
        image = Image.fromarray(pixels).convert("RGB")
    else:
        image = Image.fromarray(pixels)
    if extras.alpha is not None:
        image.putalpha(Image.fromarray(extras.alpha))
    image.info.update(info_of(extras))
    return image


def fitting(width: int, height: int, side: int) -> tuple[int, int]:
    """Return the width and height of a picture that is scaled down to fit a square of `side` pixels, not enlarged."""
    factor = max(1.0, max(width, height) / side)
    return max(1, round(width / factor)), max(1, round(height / factor))


def fitted(image: Image.Image, side: int) -> Image.Image:
    """Scale an image down to fit a square of `side` pixels, and keep its `info`. If it is scaled, mode 1 becomes L."""
    size = fitting(image.width, image.height, side)
    if size == image.size:
        return image
    image = image.convert("L") if image.mode == "1" else image
    gap = None if image.mode == "I;16" else 3.0  # Pillow cannot use reducing_gap with I;16
    small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=gap)
    small.info = image.info
    return small


def without_exif(image: Image.Image) -> Image.Image:
    """Return the upright image without EXIF data. Its `info` is a new dictionary without any of Pillow's EXIF items."""
    turned = _upright(image)
    turned = turned.copy() if turned is image else turned
    turned.info = {name: value for name, value in image.info.items() if name not in _EXIF_KEYS}
    return turned


def strip_only(image: Image.Image, parts: Collection[str]) -> Image.Image:
    """Return the upright image without the named parts of its metadata (see `hpcmref.picture.privacy`)."""
    bare = strip(image)
    bare.info.update(info_of(without(_metadata(image), parts)))
    return bare


def strip(image: Image.Image) -> Image.Image:
    """Return the upright image without any metadata."""
    _load(image)
    bare = _upright(image).copy()
    bare.info = {name: value for name, value in bare.info.items() if name == "transparency"}
    return bare


def format_of(path: Path) -> str:
    """Return the format of FORMATS that has the suffix of `path`. Raises ImageError for an unknown suffix."""
    for form, suffixes in FORMATS.items():
        if path.suffix.lower() in suffixes:
            return form
    known = ", ".join(suffix for suffixes in FORMATS.values() for suffix in suffixes)
    raise ImageError(f"cannot tell the image format of {path}: its suffix must be one of {known}")


def rendered(
    image: Image.Image,
    path: Path,
    form: str | None = None,
    quality: int | None = None,
    background: tuple[int, int, int] | None = None,
) -> bytes:
    """Return the bytes of an image file.

    path: names the file in messages, and its suffix gives the format. form: another format than that of the suffix.
    quality, background: as in `render`.
    Raises ImageError if the suffix is unknown or the format cannot hold the image, and ConfigError as `render` does.
    """
    form = form or format_of(path)
    try:
        return render(image, form, quality, background)
    except ImageError as error:
        raise ImageError(f"cannot save {path} as {form}: {error}") from error


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image file, completely or not at all. Raises the errors of `rendered` and `atomic_write`."""
    atomic_write(path, rendered(image, path))


def _frame(file: BinaryIO, name: str, frame: int | None) -> Image.Image:
    file, image = _opened(file, name)
    _check_size(image, name)
    if frame is None:
        if others := len(frames_of(image)) - 1:
            _warn(f"only the first frame of {name} is used; {others} more are left out")
    elif frame not in range(1, (frames := getattr(image, "n_frames", 1)) + 1):
        raise ImageError(f"{name} has {frames} frame{'s' * (frames > 1)}, and no frame {frame}")
    else:
        image.seek(frame - 1)
        _check_size(image, name)
    # Pillow has no mode for colours of 16 bits a channel, and drops the lower 8 bits when it reads them.
    if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) and not is_wide(image):
        _warn(f"{name} has 16 bits a channel, and 8 are kept")
    image = keyed(image, file)
    image.load()
    _note_colour_space(image, file)
    found = _exif(image)
    if image.format == "TIFF":  # Pillow reads EXIF only when it is asked for, and the file will be closed by then
        for directory in exif.DIRECTORIES:
            with contextlib.suppress(Exception):  # one damaged directory must not cost the others
                found.get_ifd(directory)
    return image


def _check_size(image: Image.Image, name: str) -> None:
    if min(image.size) < 1 or max(image.size) > MAX_SIDE or image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {image.width} x {image.height} pixels; "
            f"the limits are {MAX_SIDE} pixels a side and {MAX_PIXELS} in all"
        )


def _opened(file: BinaryIO, name: str) -> tuple[BinaryIO, Image.Image]:
    """Open an image, and return it with the file that its pixels will be read from.

    If Pillow refuses a PNG file because of long text, it is opened again without text.
    """
    if not exif.is_bounded(file):
        raise ImageError(f"cannot read {name}: its directory of tags describes more data than the file has")
    for attempt in (file, None):
        if attempt is None:
            file.seek(0)
            attempt = io.BytesIO(_without_text(file.read()))
        attempt.seek(0)
        try:
            with _no_bomb_check():
                return attempt, Image.open(attempt, formats=_formats())
        except ValueError as error:
            if attempt is not file or "text" not in str(error).lower():
                raise
            _warn(f"the text in {name} is not kept: unpacked, it is too long")
    raise AssertionError  # the second attempt returns or raises


def _without_text(png: bytes) -> bytes:
    """Return a PNG file without its chunks of text."""
    parts, position = [png[:8]], 8
    while position + 12 <= len(png):
        end = position + 12 + int.from_bytes(png[position : position + 4], "big")
        if png[position + 4 : position + 8] not in (b"tEXt", b"zTXt", b"iTXt"):
            parts.append(png[position:end])
        position = end
    return b"".join(parts)


def _note_colour_space(image: Image.Image, file: BinaryIO) -> None:
    """Store the cICP chunk of a PNG file in `info`, because Pillow does not.

    Warns of other information about the colour space that is not kept: gain maps, and gAMA and cHRM chunks of PNG.
    """
    if image.format != "PNG":
        if b"hdrgm:" in (image.info.get("xmp") or b""):
            _warn("its gain map is not kept: the picture is the one for screens without HDR")
        return
    file.seek(8)
    while len(head := file.read(8)) == 8 and (length := int.from_bytes(head[:4], "big")) < 1 << 31:
        if head[4:] in (b"IDAT", b"IEND"):
            break
        if head[4:] == b"cICP" and length == 4:
            image.info["cicp"] = file.read(4)
            file.seek(4, io.SEEK_CUR)
        else:
            file.seek(length + 4, io.SEEK_CUR)
    # In PNG, cICP and ICC profiles take precedence over both, and sRGB is what is assumed without them.
    if not {"cicp", "icc_profile", "srgb"} & set(image.info):
        gamma, primaries = image.info.get("gamma"), image.info.get("chromaticity")
        if (gamma and abs(gamma - 0.45455) > 0.002) or (primaries and not _is_srgb(primaries)):
            _warn("its gAMA and cHRM chunks, which say that its colours are not sRGB, are not kept")


def _is_srgb(chromaticity: tuple[float, ...]) -> bool:
    """Return whether white, red, green and blue (x and y of each) are those of sRGB."""
    srgb = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
    return all(abs(a - b) < 0.002 for a, b in zip(chromaticity, srgb, strict=False))


def _unknown_format(source: Path | BinaryIO) -> str | None:
    """Return the format of a file if it needs a plugin that is not installed, else None."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return plugins.recognise(file.read(12))
    source.seek(0)
    return plugins.recognise(source.read(12))


def _formats() -> list[str]:
    """Return Pillow's names of those formats of ALLOWED that are available here."""
    Image.init()
    return [name for name in ALLOWED if plugins.register(name) and name in Image.OPEN]


def _load(image: Image.Image) -> None:
    """Decode an image unless that is done already.

    Raises ImageError if it is outside the limits, cannot be decoded, or has a format outside ALLOWED.
    """
    _check_size(image, "the image")
    is_lazy = isinstance(image, ImageFile.StubImageFile) or bool(getattr(image, "tile", None))
    if isinstance(image, ImageFile.ImageFile) and is_lazy and image.format not in ALLOWED:
        raise ImageError(f"images of format {image.format} are not decoded; call load() yourself if you trust the file")
    try:
        image.load()
        image.getpixel((0, 0))  # fails if the image is closed
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can make Pillow's plugins raise any exception
        raise ImageError(f"the image cannot be decoded: {error}") from error


def _is_grey(pixels: NDArray[Any]) -> bool:
    """Return whether the three channels of (H, W, 3) are equal everywhere."""
    return bool((pixels[..., :1] == pixels[..., 1:]).all())


@contextlib.contextmanager
def _no_bomb_check() -> Iterator[None]:
    """Lift Pillow's limit on pixels, which is lower than ours. It is global, so this is used only to read headers."""
    with _pillow_limit, warnings.catch_warnings():
        # Pillow warns of each damaged entry, and there may be thousands. Damaged EXIF data is reported once, later.
        warnings.filterwarnings("ignore", "Corrupt EXIF|Possibly corrupt EXIF|Truncated File Read|Metadata Warning")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _exif(image: Image.Image) -> Image.Exif:
    if isinstance(raw := image.info.get("exif"), bytes) and not exif.is_bounded(raw):
        return Image.Exif()  # `_upright_exif` warns
    try:
        return image.getexif()
    except Exception:  # damaged bytes can make Pillow raise any exception
        _warn("its EXIF data is damaged; the image may not be upright")
        return Image.Exif()


def _orientation(image: Image.Image) -> Any:
    return _exif(image).get(ExifTags.Base.Orientation, 1)


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    image = normalised(image)
    return image if turn is None else image.transpose(turn)


def _split(image: Image.Image) -> tuple[Image.Image, NDArray[Any] | None, str | None]:
    """Split an image into colours (mode RGB or L), alpha (H, W) or None, and the mode to restore or None.

    Warns of what the conversion loses.
    """
    if is_wide(image):
        _warn("16-bit grey is reduced to 8 bits")
        sixteen = np.asarray(image)
        rounded = Image.fromarray(((sixteen.astype(np.uint32) + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
        key = image.info.get("transparency")
        if isinstance(key, int):
            return rounded, (sixteen != key) * np.uint8(255), None
        return rounded, None, "I;16"
    if image.has_transparency_data:
        if image.mode in ("P", "PA"):
            _warn("palette colours are converted to RGBA")
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        return image.convert(image.mode.removesuffix("A")), np.array(image.getchannel("A")), None
    if image.mode == "1":
        return image.convert("L"), None, "1"
    if image.mode == "CMYK":
        _warn("CMYK is coded as RGB; how much of a colour was black ink is not kept")
        return image.convert("RGB"), None, "CMYK"
    if image.mode in ("RGB", "L"):
        return image, None, None
    _warn(f"{'palette' if image.mode == 'P' else image.mode} colours are converted to RGB")
    return image.convert("RGB"), None, None


def _cmyk(pixels: NDArray[Any]) -> Image.Image:
    """Convert RGB (H, W, 3) uint8 to CMYK, with as much black as possible.

    It is an inverse of Pillow's conversion from CMYK to RGB, which is r = (1 - c) (1 - k).
    """
    light = pixels.max(axis=2, keepdims=True)
    inks = 255 - (pixels * np.float32(255) / np.maximum(light, 1) + np.float32(0.5)).astype(np.uint8)
    inks[light[..., 0] == 0] = 0
    height, width = pixels.shape[:2]
    return Image.frombytes("CMYK", (width, height), np.concatenate([inks, 255 - light], axis=2).tobytes())


def _metadata(image: Image.Image) -> Extras:
    """Return the metadata of an image, changed to that of the upright image."""
    icc, xmp = (_bounded(image.info.get(name), name) for name in ("icc_profile", "xmp"))
    if xmp is not None:
        xmp = _XMP_ORIENTATION.sub(rb"\g<1>1", xmp)
    cicp = image.info.get("cicp")
    cicp = cicp if isinstance(cicp, bytes) and len(cicp) == 4 else None
    tags = _bounded(_upright_exif(image), "exif")
    text = texts.text_of(image)
    if not texts.is_bounded(text):
        _warn(f"its text is not kept: it has more than {texts.MAX_ITEMS} items or {texts.MAX_TEXT} bytes")
        text = ()
    resolution = texts.resolution_of(image)
    if resolution is not None and resolution == texts.resolution_of_exif(tags):
        resolution = None
    if resolution is not None and resolution[0] != resolution[1] and _orientation(image) in _SIDEWAYS:
        resolution = resolution[::-1]
    iptc = _bounded(texts.iptc_of(image), "iptc")
    return Extras(icc=icc, exif=tags, xmp=xmp, cicp=cicp, iptc=iptc, text=text, resolution=resolution)


def _bounded(content: Any, name: str) -> bytes | None:
    if not isinstance(content, bytes) or not content:
        return None
    if len(content) > MAX_METADATA:
        _warn(f"its {name} is not kept: {len(content)} bytes are more than {MAX_METADATA}")
        return None
    return content


def _upright_exif(image: Image.Image) -> bytes | None:
    raw = image.info.get("exif")
    try:
        if not isinstance(raw, bytes):  # TIFF, and PNG as ImageMagick writes it
            found, tags = _exif(image), Image.Exif()
            for tag in set(found) & exif.TAGS:
                tags[tag] = found.get_ifd(tag) if tag in exif.DIRECTORIES else found[tag]
            raw = tags.tobytes() if tags else b""
        elif not exif.is_bounded(raw):
            raise ValueError("its directories describe more data than there is")
        return exif.upright(raw) if raw else None
    except Exception:  # damaged bytes can make Pillow raise any exception
        _warn("its EXIF data is damaged and not kept")
        return None


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
