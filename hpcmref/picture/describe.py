"""The metadata of a file in words: the camera, the date, whether it says a place, and every tag of EXIF."""

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
    """What there is of: camera, date, software, location ("yes"), resolution, and each text by its keyword."""
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
    """Every tag of EXIF data that Pillow can read: its name, with that of its directory, and its value in one line."""
    found = []
    for directory, tags in _directories(data).items():
        names: Any = ExifTags.GPSTAGS if directory == "GPS" else ExifTags.TAGS
        for tag, value in tags.items():
            if tag not in exif.DIRECTORIES:
                name = names.get(tag, f"{tag:#06x}")
                found.append((f"{directory}.{name}" if directory else name, _word(value)))
    return found


def _directories(data: bytes | None) -> dict[str, dict[int, Any]]:
    """Tags and values by directory: the first ("") and those of Exif and GPS."""
    if data is None or not exif.is_bounded(data):
        return {}
    tags = Image.Exif()
    with contextlib.suppress(Exception):  # whatever damaged bytes lead Pillow to
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
    """A place is named by EXIF, or by what would be left out of XMP, IPTC and text to hide it."""
    bare = without(extras, ("location",))
    return bool(tags.get("GPS")) or any(
        getattr(bare, name) != getattr(extras, name) for name in ("xmp", "iptc", "text")
    )


def _joined(make: Any, model: Any) -> str:
    """Maker and model, without the maker twice."""
    first, second = _word(make), _word(model)
    return second if second.startswith(first) else f"{first} {second}".strip()


def _word(value: Any) -> str:
    """A value in one printable line of at most 200 characters."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        text = value.decode("latin-1").rstrip("\0") if len(value) <= _LONGEST else f"{len(value)} bytes"
        text = text if text.isprintable() else f"{len(value)} bytes"
    else:
        text = str(value)
    text = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
