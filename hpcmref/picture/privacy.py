"""Leave out parts of the metadata: all of an item, or only where the picture was taken."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from hpcmref.picture import exif
from hpcmref.picture.metadata import Extras

PARTS = ("location", "exif", "xmp", "icc")

# Attributes and elements of XMP whose name begins with GPS, in any namespace, and places named in words.
_NAME = rb"[\w.-]+:(?:GPS\w*|Location\w*|City|State|Country\w*|Sublocation|LocationCreated|LocationShown)"
_ATTRIBUTE = re.compile(rb"\s" + _NAME + rb"\s*=\s*(?:\"[^\"]*\"|'[^']*')")
_ELEMENT = re.compile(rb"<(" + _NAME + rb")(?:\s[^>]*)?(?:/>|>.*?</\1\s*>)", re.DOTALL)
_SUSPICIOUS = re.compile(rb"GPS", re.IGNORECASE)


def without(extras: Extras, parts: Collection[str]) -> Extras:
    """The extras without the named parts of PARTS.

    location: the GPS directory and the maker note of EXIF, whose content only the maker of the camera knows, and GPS
    and places in XMP. EXIF or XMP data in which that cannot be done for certain is left out whole.
    """
    if "location" in parts:
        extras = replace(extras, exif=_exif_without_location(extras.exif), xmp=_xmp_without_location(extras.xmp))
    return replace(extras, **{name: None for name in ("exif", "xmp", "icc") if name in parts})


def _exif_without_location(data: bytes | None) -> bytes | None:
    if data is None:
        return None
    try:
        return exif.without_location(data)
    except ValueError:
        return None


def _xmp_without_location(xmp: bytes | None) -> bytes | None:
    if xmp is None:
        return None
    xmp = _ELEMENT.sub(b"", _ATTRIBUTE.sub(b"", xmp))
    return None if _SUSPICIOUS.search(xmp.replace(b"\0", b"")) else xmp  # without zeros: UTF-16 is not cleaned
