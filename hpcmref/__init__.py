"""hpcmref: a learned image codec. `encode` turns an image into bytes, and `decode` turns bytes into an image.

    import hpcmref
    from PIL import Image

    data = hpcmref.encode(Image.open("photo.png"), quality=32)
    image = hpcmref.decode(data)

`encode_many` and `decode_many` process many images, `thumbnail` returns a small image, `info` reads the header of a
file, and `load` returns a codec that can be kept. torch is imported on first use, so that importing hpcmref is fast.
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
"""The quality of `encode` if none is given. Qualities are 0 (smallest file) to 63 (best picture)."""

DEFAULT_MAX_PIXELS = 1 << 27
"""The most pixels that are decoded unless the caller allows more: 134 megapixels, which take about 8 GB of memory."""

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


if not TYPE_CHECKING:  # with a visible __getattr__, mypy would accept every name

    def __getattr__(name: str) -> Any:
        if name in ("Codec", "load"):
            from hpcmref import codec

            return getattr(codec, name)
        if name in __all__:
            from hpcmref import api

            return getattr(api, name)
        raise AttributeError(f"module 'hpcmref' has no attribute {name!r}")
