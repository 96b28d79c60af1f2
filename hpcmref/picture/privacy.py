"""Remove parts of the metadata: whole items, or only the location where the picture was taken."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from hpcmref.picture import exif
from hpcmref.picture.metadata import Extras

PARTS = ("location", "exif", "xmp", "icc", "iptc", "text")
_EMPTY = {"text": ()}

# Names of XMP attributes and elements, in any namespace, that begin with GPS or name a place.
_NAME = rb"[\w.-]+:(?:GPS\w*|Location\w*|City|State|Country\w*|Sublocation|LocationCreated|LocationShown)"
_ATTRIBUTE = re.compile(rb"\s" + _NAME + rb"\s*=\s*(?:\"[^\"]*\"|'[^']*')")
_ELEMENT = re.compile(rb"<(" + _NAME + rb")(?:\s[^>]*)?(?:/>|>.*?</\1\s*>)", re.DOTALL)
_DATASET = 0x1C
_PLACES = {(2, number) for number in (26, 27, 90, 92, 95, 100, 101)}  # content location, city to country
_SUSPICIOUS = re.compile(rb"GPS", re.IGNORECASE)


def without(extras: Extras, parts: Collection[str]) -> Extras:
    """Return the extras without the named parts of PARTS.

    "location" removes the GPS directory and the maker note of EXIF (whose content only the maker of the camera knows),
    GPS and places in XMP, places in IPTC, and text that mentions GPS. EXIF, XMP or IPTC data is removed completely if
    its location cannot be removed with certainty.
    """
    if "location" in parts:
        extras = replace(extras, exif=_exif_without_location(extras.exif), xmp=_xmp_without_location(extras.xmp))
        text = tuple(item for item in extras.text if not any(_SUSPICIOUS.search(part.encode()) for part in item))
        extras = replace(extras, iptc=_iptc_without_location(extras.iptc), text=text)
    left_out: dict[str, Any] = {name: _EMPTY.get(name) for name in PARTS[1:] if name in parts}
    return replace(extras, **left_out)


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
    return None if _SUSPICIOUS.search(xmp.replace(b"\0", b"")) else xmp  # zeros are removed to find GPS in UTF-16


def _iptc_without_location(iptc: bytes | None) -> bytes | None:
    """Remove the datasets of IPTC-IIM that name places.

    A dataset is a marker, a record, a number, a length of 15 bits, and a value. Returns None for any other data.
    """
    if iptc is None:
        return None
    kept, position = [], 0
    while position < len(iptc):
        head = iptc[position : position + 5]
        length = int.from_bytes(head[3:], "big")
        end = position + 5 + length
        if len(head) < 5 or head[0] != _DATASET or length >= 1 << 15 or end > len(iptc):
            return None
        if (head[1], head[2]) not in _PLACES:
            kept.append(iptc[position:end])
        position = end
    return b"".join(kept) or None
