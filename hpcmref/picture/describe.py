"""Describe the metadata of a file as text: the camera, the date, whether there is a location, and every tag of EXIF."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from PIL import ExifTags, Image

from hpcmref.picture import exif
from hpcmref.picture.metadata import Extras, info_of
from hpcmref.picture.privacy import without

_LONGEST = 200


def described(extras: Extras) -> dict[str, str]:
    """Describe metadata as text.

    Keys are "camera", "date", "software", "location" (value "yes"), "resolution", and "text KEYWORD" for each text.
    Items that do not exist are left out.
    """
    tags = _directories(extras.exif)
    main, details = tags.get("", {}), tags.get("Exif", {})
    words = {
        "camera": _joined(main.get(ExifTags.Base.Make), main.get(ExifTags.Base.Model)),
        "date": _word(details.get(ExifTags.Base.DateTimeOriginal) or main.get(ExifTags.Base.DateTime)),
        "software": _word(main.get(ExifTags.Base.Software)),
        "location": "yes" if _has_location(extras, tags) else "",
    }
    if resolution := info_of(extras).get("dpi"):
        words["resolution"] = " x ".join(f"{each:g}" for each in resolution) + " pixels per inch"
    words |= {f"text {keyword}": _word(text) for keyword, text in extras.text}
    return {name: text for name, text in words.items() if text}


def exif_lines(data: bytes | None) -> list[tuple[str, str]]:
    """Return name and value (one line) of every EXIF tag that Pillow can read. Names begin with the directory."""
    found = []
    for directory, tags in _directories(data).items():
        names: Any = ExifTags.GPSTAGS if directory == "GPS" else ExifTags.TAGS
        for tag, value in tags.items():
            if tag not in exif.DIRECTORIES:
                name = names.get(tag, f"{tag:#06x}")
                found.append((f"{directory}.{name}" if directory else name, _word(value)))
    return found


def _directories(data: bytes | None) -> dict[str, dict[int, Any]]:
    """Return tags and values by directory: the main directory (""), "Exif" and "GPS"."""
    if data is None or not exif.is_bounded(data):
        return {}
    tags = Image.Exif()
    with contextlib.suppress(Exception):  # damaged bytes can make Pillow raise any exception
        tags.load(exif.PREFIX + data)
    found: dict[str, dict[int, Any]] = {}
    for name, read in _readers(tags):
        with contextlib.suppress(Exception):
            found[name] = dict(read())
    return found


def _readers(tags: Image.Exif) -> Iterator[tuple[str, Any]]:
    yield "", lambda: tags.items()
    yield "Exif", lambda: tags.get_ifd(ExifTags.IFD.Exif).items()
    yield "GPS", lambda: tags.get_ifd(ExifTags.IFD.GPSInfo).items()


def _has_location(extras: Extras, tags: dict[str, dict[int, Any]]) -> bool:
    """Return whether the metadata names a location: in EXIF, or in what `privacy.without` would remove elsewhere."""
    bare = without(extras, ("location",))
    return bool(tags.get("GPS")) or any(
        getattr(bare, name) != getattr(extras, name) for name in ("xmp", "iptc", "text")
    )


def _joined(make: Any, model: Any) -> str:
    """Join maker and model. Some models begin with the name of the maker, which is then not repeated."""
    first, second = _word(make), _word(model)
    return second if second.startswith(first) else f"{first} {second}".strip()


def _word(value: Any) -> str:
    """Format a value as one printable line of at most 200 characters."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        text = value.decode("latin-1").rstrip("\0") if len(value) <= _LONGEST else f"{len(value)} bytes"
        text = text if text.isprintable() else f"{len(value)} bytes"
    else:
        text = str(value)
    text = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
