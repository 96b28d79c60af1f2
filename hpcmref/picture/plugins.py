"""HEIC and JPEG XL, which Pillow reads and writes through plugins of their own: the extra `hpcmref[formats]`."""

from __future__ import annotations

import functools
import importlib
import importlib.util

# Pillow's name of the format -> its module, and what it is called.
_PLUGINS = {"HEIF": ("pillow_heif", "HEIC"), "JXL": ("pillow_jxl", "JPEG XL")}


@functools.cache
def register(form: str) -> bool:
    """Make a format known to Pillow; whether its plugin is installed. Other formats need none."""
    if form not in _PLUGINS:
        return True
    module, _ = _PLUGINS[form]
    if importlib.util.find_spec(module) is None:
        return False
    plugin = importlib.import_module(module)
    if form == "HEIF":
        plugin.register_heif_opener()
    return True


def missing(form: str) -> str:
    """What to do about a format whose plugin is not installed, as a sentence."""
    return f"{_PLUGINS[form][1]} needs a plugin that is not here: pip install 'hpcmref[formats]'"


def recognise(beginning: bytes) -> str | None:
    """The format of a file that begins so, if it is one that needs a plugin which is not installed."""
    form = None
    if beginning.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        form = "JXL"
    elif beginning[4:8] == b"ftyp" and beginning[8:12] in (
        b"heic",
        b"heix",
        b"heim",
        b"heis",
        b"hevc",
        b"mif1",
        b"msf1",
    ):
        form = "HEIF"
    return form if form is not None and not register(form) else None
