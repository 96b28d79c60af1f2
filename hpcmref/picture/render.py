"""Write an image as the bytes of an image file. What a format cannot store is left out, with a warning."""

from __future__ import annotations

import codecs
import io
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from hpcmref.errors import ConfigError, ImageError
from hpcmref.picture import exif, plugins, texts

_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 3},  # photographs are 1 to 3 % smaller than with the default 6, and take half the time
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},
    "WEBP": {"lossless": True, "exact": True},  # exact: keep the colours of transparent pixels
    "TIFF": {"compression": "tiff_lzw"},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "JXL": {"lossless": True},
}
WITH_QUALITY = ("JPEG", "WEBP", "AVIF", "JXL")
"""The lossy formats, which have a quality from 1 to 100."""

_MODES = {
    "PNG": {"1", "L", "LA", "I;16", "RGB", "RGBA"},
    "JPEG": {"L", "RGB", "CMYK"},
    "WEBP": {"RGB", "RGBA"},
    "TIFF": {"1", "L", "LA", "I;16", "RGB", "RGBA", "CMYK"},
    "PPM": {"1", "L", "I;16", "RGB"},
    "BMP": {"1", "L", "RGB"},
    "AVIF": {"RGB", "RGBA"},
    "JXL": {"L", "LA", "RGB", "RGBA"},
    "NPY": {"1", "L", "LA", "I;16", "RGB", "RGBA", "CMYK"},
}
_PLAIN = ("BMP", "NPY", "PPM")  # formats without metadata
_NAMES = {
    "icc_profile": "ICC profile",
    "exif": "EXIF data",
    "xmp": "XMP data",
    "cicp": "cICP data",
    "iptc": "IPTC data",
    "text": "text",
    "dpi": "resolution",
}
_ROOM = {"cicp": ("PNG",), "iptc": ("PNG", "JPEG", "TIFF"), "text": ("PNG", "JPEG", "TIFF")}
_LONG = 1024  # longer text is compressed
_COMMENT_ALONE = ("JPEG", "TIFF")
_JPEG_SEGMENT = 65533
_XMP_HEADER, _IPTC_HEADER = 29, 27


def render(
    image: Image.Image, form: str, quality: int | None = None, background: tuple[int, int, int] | None = None
) -> bytes:
    """Return the bytes of an image file.

    form: Pillow's name of the format, or "NPY" for a NumPy array of the pixels.
    quality: 1 to 100 for a format of WITH_QUALITY. None means 95 for JPEG and AVIF, and lossless for WebP and JPEG XL.
    background: the colour behind transparent pixels, if the format has no transparency. None is white, with a warning.

    Warns of metadata that the format cannot store. Raises ImageError if it cannot store the image, and ConfigError for
    an invalid quality.
    """
    check_writable(form, quality)
    options = dict(_OPTIONS.get(form, {}))
    if quality is not None:
        options["quality"] = quality
        if "lossless" in options:
            options["lossless"] = False
    image = _fitting(image, form, background)
    items = _items(image, form)
    if form == "NPY":
        array = io.BytesIO()
        np.save(array, np.asarray(image))
        return array.getvalue()
    try:
        return _saved(image, form, items, options)
    except Exception as error:  # damaged metadata can make Pillow raise any exception
        try:
            data = _saved(image, form, {}, options)
        except Exception:
            raise ImageError(str(error)) from error
    kept: dict[str, Any] = {}
    for name, content in items.items():
        try:
            data = _saved(image, form, {**kept, name: content}, options)
            kept[name] = content
        except Exception:
            _warn(f"its {_NAMES[name]} is damaged and cannot be written to {form}")
    return data


def check_writable(form: str, quality: int | None) -> None:
    """Check that a format can be written with a quality (1 to 100, or None for the default).

    Raises ImageError if the plugin of the format is not installed, and ConfigError for an invalid quality.
    """
    if not plugins.register(form):
        raise ImageError(plugins.missing(form))
    if quality is None:
        return
    if form not in WITH_QUALITY:
        raise ConfigError(f"{form} is lossless and has no quality; {', '.join(WITH_QUALITY)} have one")
    if not 1 <= quality <= 100:
        raise ConfigError(f"the quality of {form} is {quality}, and must be 1 to 100")


def _fitting(image: Image.Image, form: str, background: tuple[int, int, int] | None) -> Image.Image:
    """Convert the image to a mode of the format. Warns of transparency that is lost, unless there is a background."""
    modes, mode, info = _MODES[form], image.mode, image.info
    if mode in modes:
        return image
    if mode == "I;16":
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if "RGBA" not in modes:
            if background is None and image.getchannel("A").getextrema() != (255, 255):
                _warn(f"{form} has no transparency: the image is placed on white")
            behind = Image.new("RGBA", image.size, (*(background or (255, 255, 255)), 255))
            image = Image.composite(image, behind, image.getchannel("A"))
    if image.mode not in modes:
        grey = "L" in modes and (mode == "1" or (mode == "LA" and _is_grey(background)))
        image = image.convert("L" if grey else "RGB")
    image.info = info
    return image


def _is_grey(colour: tuple[int, int, int] | None) -> bool:
    return colour is None or len(set(colour)) == 1


def _items(image: Image.Image, form: str) -> dict[str, Any]:
    """Return the metadata in the image's `info` that the format can store. Warns of the rest."""
    found: dict[str, Any] = {
        "text": dict(texts.text_of(image)),
        "dpi": texts.resolution_of(image),
        "iptc": texts.iptc_of(image),
    }
    found |= {name: image.info.get(name) for name in _NAMES if name not in found}
    items = {name: content for name, content in found.items() if content}
    lost = [name for name, content in items.items() if not _has_room(form, image.mode, name, content)]
    if form in _COMMENT_ALONE and "text" in items and "text" not in lost:
        others = ", ".join(key for key in items["text"] if key != texts.COMMENT)
        items["text"] = {texts.COMMENT: items["text"][texts.COMMENT]}
        if others:
            _warn(f"{form} cannot store its text {others}")
    if shown := [_NAMES[name] for name in lost if name != "dpi"]:
        _warn(f"{form} of mode {image.mode} cannot store its {' and '.join(shown)}")
    return {name: content for name, content in items.items() if name not in lost}


def _has_room(form: str, mode: str, name: str, content: Any) -> bool:
    if form in _PLAIN or form not in _ROOM.get(name, (form,)):
        return False
    if name == "icc_profile":
        return not _is_foreign(content, mode)
    if name == "text":
        return form not in _COMMENT_ALONE or texts.COMMENT in content
    limits = {"exif": _JPEG_SEGMENT, "xmp": _JPEG_SEGMENT - _XMP_HEADER, "iptc": _JPEG_SEGMENT - _IPTC_HEADER}
    return form != "JPEG" or name not in limits or len(content) <= limits[name]


def _metadata_options(form: str, items: dict[str, Any]) -> dict[str, Any]:
    """Return the options of Pillow's `save` that write the metadata. items: see `_items`."""
    options: dict[str, Any] = {"icc_profile": items.get("icc_profile")}
    tags = items.get("exif")
    if "dpi" in items:
        if form in ("PNG", "JPEG", "TIFF"):
            options["dpi"] = items["dpi"]
        elif not tags:
            tags = exif.PREFIX + texts.exif_of_resolution(items["dpi"])
    if form == "TIFF":
        return options | _tiff_options(items)
    if tags:
        options["exif"] = tags
    if form == "PNG":
        options["pnginfo"] = _png_chunks(items)
        return options
    if "xmp" in items:
        options["xmp"] = items["xmp"]
    if form == "JPEG" and "iptc" in items:
        options["extra"] = texts.iptc_segment(items["iptc"])
    if form == "JPEG" and "text" in items:
        options["comment"] = items["text"][texts.COMMENT].encode()
    return options


def _tiff_options(items: dict[str, Any]) -> dict[str, Any]:
    directory = Image.Exif()
    options: dict[str, Any] = {}
    if tags := items.get("exif"):
        directory = _writable(tags)
        options["compression"] = None  # with compression, Pillow cannot write the directories of EXIF
    if "xmp" in items:
        directory[ExifTags.Base.XMLPacket] = items["xmp"]
    if "iptc" in items:
        directory[ExifTags.Base.IPTCNAA] = items["iptc"]
    if "text" in items and ExifTags.Base.ImageDescription not in directory:
        directory[ExifTags.Base.ImageDescription] = items["text"][texts.COMMENT].encode()
    return {**options, "exif": directory} if directory else options


def _png_chunks(items: dict[str, Any]) -> PngImagePlugin.PngInfo:
    """Return the chunks of metadata for which Pillow has no option."""
    chunks = PngImagePlugin.PngInfo()
    if "xmp" in items:
        chunks.add_itxt("XML:com.adobe.xmp", _text(items["xmp"]))
    if "cicp" in items:
        chunks.add(b"cICP", items["cicp"])
    if "iptc" in items:
        chunks.add_text(*texts.iptc_profile(items["iptc"]), zip=True)
    for keyword, text in items.get("text", {}).items():
        chunks.add_text(keyword[:79].encode("latin-1", "replace"), text, zip=len(text) > _LONG)
    return chunks


def _writable(tags: bytes) -> Image.Exif:
    """Return the tags of EXIF data that Pillow can write to a TIFF file. Warns of damaged ones.

    Tags that describe how a TIFF file stores its pixels are left out.
    """
    lost = []
    for tag in sorted(set(_tags_of(tags, exif.TAGS))):
        try:
            Image.new("L", (1, 1)).save(io.BytesIO(), "TIFF", exif=_tags_of(tags, {tag}))
        except Exception:
            lost.append(tag)
    if lost:
        names = ", ".join(ExifTags.TAGS.get(tag, f"{tag:#06x}") for tag in lost)
        _warn(f"its EXIF tags {names} are damaged and cannot be written to TIFF")
    return _tags_of(tags, exif.TAGS - set(lost))


def _tags_of(tags: bytes, wanted: Collection[int]) -> Image.Exif:
    """Return the wanted tags of EXIF data."""
    directory = Image.Exif()
    directory.load(tags)
    for tag in set(directory) - set(wanted):
        del directory[tag]
    return directory


def _text(xmp: bytes) -> str:
    """Decode an XMP packet, which may be in UTF-8, UTF-16 or UTF-32."""
    xmp = xmp.removeprefix(codecs.BOM_UTF8)
    if xmp.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return xmp.decode("utf-32")
    if xmp.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return xmp.decode("utf-16")
    for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        if xmp.startswith("<".encode(encoding)) and b"\0" in xmp[:4]:
            return xmp.decode(encoding)
    return xmp.rstrip(b"\0").decode()


def _is_foreign(icc: bytes, mode: str) -> bool:
    """Return whether an ICC profile describes other colours than those of the mode.

    RGB profiles of grey images are accepted, because they are common.
    """
    own = {"CMYK": (b"CMYK",), "RGB": (b"RGB ",), "RGBA": (b"RGB ",)}.get(mode, (b"GRAY", b"RGB "))
    return icc[16:20] in (b"CMYK", b"RGB ", b"GRAY", b"Lab ") and icc[16:20] not in own


def _saved(image: Image.Image, form: str, items: dict[str, Any], options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **{**options, **_metadata_options(form, items)})
    return file.getvalue()


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
