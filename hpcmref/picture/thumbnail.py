"""A small PNG of an image, with what the thumbnail specification of freedesktop.org wants to be told."""

from __future__ import annotations

import io
from collections.abc import Mapping

from PIL import Image, PngImagePlugin


def thumbnail(image: Image.Image, side: int, about: Mapping[str, str], whole: tuple[int, int] | None = None) -> bytes:
    """A PNG (RGB or RGBA of 8 bits) of an image that is made to fit a square, never larger than it is.

    side: pixels of the square. whole: width and height of the picture, if the image is small already. about: texts of
    the PNG, such as Thumb::URI; Thumb::Image::Width and Height are added.
    """
    text = PngImagePlugin.PngInfo()
    width, height = whole or image.size
    sizes = {"Thumb::Image::Width": str(width), "Thumb::Image::Height": str(height)}
    for name, value in {**about, **sizes, "Software": "hpcmref"}.items():
        text.add_text(name, value)
    if image.mode == "I;16":
        image = image.point(lambda value: value / 257).convert("L")
    small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    profile = None if image.mode in ("CMYK", "1") else image.info.get("icc_profile")
    small.save(file, "PNG", pnginfo=text, icc_profile=profile)
    return file.getvalue()
