"""HEIC and JPEG XL, which Pillow reads and writes with separate plugins (the extra `hpcmref[formats]`)."""

from __future__ import annotations

import functools
import importlib
import importlib.util

# Pillow's name of the format -> the module of its plugin, and the usual name of the format.
_PLUGINS = {"HEIF": ("pillow_heif", "HEIC"), "JXL": ("pillow_jxl", "JPEG XL")}


@functools.cache
def register(form: str) -> bool:
    """Register the plugin of a format with Pillow, if it needs one. Return whether the format can be used."""
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
    """Return the error message for a format whose plugin is not installed."""
    return f"{_PLUGINS[form][1]} needs a plugin that is not installed: pip install 'hpcmref[formats]'"


def recognise(beginning: bytes) -> str | None:
    """Return the format of a file with this beginning if it needs a plugin that is not installed, else None."""
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
