"""Check for --resume whether an existing output is complete and has the wanted settings."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcmref import DEFAULT_QUALITY
from hpcmref.errors import FormatError, HpcmrefError, ImageError
from hpcmref.format.container import MAGIC, Container, parse


@dataclass(frozen=True)
class Wanted:
    """The settings that an encoded file should have, as far as the file shows them.

    target: "size", "bpp" or "psnr" with its value, instead of a quality. lossless: instead of a quality, too. Whether
    the pixels are those of the image, or near enough for "psnr", is for the encoder to say.
    """

    model: str | None
    quality: int | None
    target: Mapping[str, Any]
    lossless: bool

    def is_there(self, path: Path) -> bool:
        """Return whether the file is complete and has the wanted settings. If not, it is to be encoded again.

        Raises HpcmrefError if the file is neither empty nor begins as an hpcmref file does.
        """
        data = path.read_bytes()
        if data[: len(MAGIC)] != MAGIC[: len(data)]:
            raise HpcmrefError(f"{path} exists already and is not an hpcmref file (--force replaces it)")
        try:
            file = parse(data)
        except FormatError:
            return False
        if self.lossless:
            return file.learned is None
        pixels = file.width * file.height
        fits = bool(len(data) <= self.target.get("size", self.target.get("bpp", float("inf")) * pixels / 8))
        if file.learned is None:  # the encoder has chosen a lossless stream, which is as good as any quality
            return fits
        fingerprint, usual = self._model
        if file.learned.fingerprint != fingerprint:
            return False
        return fits if self.target else file.learned.quality == (usual if self.quality is None else self.quality)

    @functools.cached_property
    def _model(self) -> tuple[bytes, int]:
        """The fingerprint of the model, and its default quality."""
        from hpcmref.checkpoints import find, info

        found = info(find(self.model))
        return found.fingerprint, DEFAULT_QUALITY if found.qualities > 1 else 0


def is_decoded(path: Path, form: str, source: Path | None, side: int | None) -> bool:
    """Return whether an image file is complete and has the width and height of the encoded file `source`.

    form: the format of the image. side: that of the square that a thumbnail fits, or None for the whole image. If the
    result is False, the image is to be decoded again. Raises HpcmrefError if the file is neither empty nor of this
    format.
    """
    from hpcmref.picture.images import open_image

    data = path.read_bytes()
    if data and not _begins_as(data, form):
        raise HpcmrefError(f"{path} exists already and is not in the format {form} (--force replaces it)")
    if not _is_complete(data, form):
        return False
    try:
        size = _shape_of_npy(data) if form == "NPY" else open_image(_named(data, path)).size
    except ImageError:
        return False
    return source is None or size == _size(source, side)


def _size(source: Path, side: int | None) -> tuple[int, int] | None:
    """The width and height that an encoded file is decoded to, or None if it cannot be read."""
    from hpcmref.picture.images import fitting

    try:
        file: Container = parse(source.read_bytes(), partial=True, damaged=True)
    except (HpcmrefError, OSError):
        return None  # decoding will report the error
    return (file.width, file.height) if side is None else fitting(file.width, file.height, side)


_BEGINNINGS = {
    "AVIF": (b"\0\0\0",),
    "BMP": (b"BM",),
    "JPEG": (b"\xff\xd8\xff",),
    "JXL": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "NPY": (b"\x93NUMPY",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "PPM": (b"P4", b"P5", b"P6"),
    "TIFF": (b"II*\0", b"MM\0*"),
    "WEBP": (b"RIFF",),
}


def _begins_as(data: bytes, form: str) -> bool:
    return any(data[: len(magic)] == magic[: len(data)] for magic in _BEGINNINGS[form])


def _is_complete(data: bytes, form: str) -> bool:
    """Return whether a file has its end. Pillow opens files that lack it, if all pixels are there."""
    if form == "PNG":
        return data.endswith(b"IEND\xaeB`\x82")
    if form == "JPEG":
        return data.endswith(b"\xff\xd9")
    if form == "WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return bool(data)


def _shape_of_npy(data: bytes) -> tuple[int, int]:
    import numpy as np

    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ImageError(str(error)) from error
    return array.shape[1], array.shape[0]


def _named(data: bytes, path: Path) -> io.BytesIO:
    file = io.BytesIO(data)
    file.name = str(path)
    return file
