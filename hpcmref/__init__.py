"""hpcmref: a learned image codec. `encode` an image to bytes, `decode` bytes to an image.

    import hpcmref
    from PIL import Image

    data = hpcmref.encode(Image.open("photo.png"), quality=32)
    image = hpcmref.decode(data)

`encode_many` and `decode_many` take many, `thumbnail` gives a small picture, `info` says what a file holds, and `load`
gives a codec to keep. torch is imported on first use, so that importing hpcmref is cheap.
"""

from typing import TYPE_CHECKING, Any

from hpcmref._version import __version__
from hpcmref.errors import HpcmrefError
from hpcmref.plugin import register as _register
from hpcmref.runtime.forks import watch_forks as _watch_forks

if TYPE_CHECKING:
    from hpcmref.api import FileInfo, decode, decode_many, encode, encode_many, info, thumbnail
    from hpcmref.codec import Codec, load

DEFAULT_QUALITY = 32

DEFAULT_MAX_PIXELS = 1 << 27
"""Larger images are not decoded unless the caller allows it: 134 megapixels, for which there should be 8 GB."""

_register()
_watch_forks()

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "DEFAULT_QUALITY",
    "Codec",
    "FileInfo",
    "HpcmrefError",
    "__version__",
    "decode",
    "decode_many",
    "encode",
    "encode_many",
    "info",
    "load",
    "thumbnail",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # or every name would exist for mypy

    def __getattr__(name: str) -> Any:
        if name in ("Codec", "load"):
            from hpcmref import codec

            return getattr(codec, name)
        if name in __all__:
            from hpcmref import api

            return getattr(api, name)
        raise AttributeError(f"module 'hpcmref' has no attribute {name!r}")
