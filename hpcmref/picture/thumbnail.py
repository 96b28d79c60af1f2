"""Make a small PNG of an image, with the metadata that the thumbnail specification of freedesktop.org requires."""

from __future__ import annotations

import io
from collections.abc import Mapping

from PIL import Image, PngImagePlugin


def thumbnail(image: Image.Image, side: int, about: Mapping[str, str], whole: tuple[int, int] | None = None) -> bytes:
    """Return a PNG file (RGB or RGBA of 8 bits) of an image that is scaled down to fit a square, and not enlarged.

    side: the side of the square in pixels. about: texts for the PNG, such as Thumb::URI; Thumb::Image::Width and Height
    are added. whole: width and height of the original picture, if `image` is a smaller version of it.
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
