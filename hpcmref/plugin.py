"""The Pillow plugin. `import hpcmref` registers it, and heavy modules are imported only on first use.

Image.open("photo.bin")                   opens files with any suffix, since their first bytes identify them
image.save("photo.hpcm", quality=40)      writes a file; for other suffixes than .hpcm, add format="HPCM"
"""

from __future__ import annotations

import threading
from typing import IO, TYPE_CHECKING, Any

from PIL import Image, ImageFile

from hpcmref.errors import ConfigError, HpcmrefError

if TYPE_CHECKING:
    from hpcmref.format.container import Container

FORMAT = "HPCM"

_MAGIC = b"\x89HPC"
_METADATA = ("icc_profile", "exif", "xmp", "dpi", "comment")


def register() -> None:
    """Register the format with Pillow."""
    Image.register_open(FORMAT, HpcmImageFile, _is_ours)
    Image.register_save(FORMAT, _save)
    Image.register_save_all(FORMAT, _save_all)
    Image.register_extension(FORMAT, ".hpcm")
    Image.register_mime(FORMAT, "image/x-hpcm")


class HpcmImageFile(ImageFile.ImageFile):
    """An hpcmref file as an image of Pillow.

    Opening it reads the header and the metadata. Loading it decodes the pixels with the model that the file names,
    which must be installed. Errors are OSErrors, as with Pillow's own formats.
    """

    format = FORMAT
    format_description = "hpcmref learned image codec"
    _is_encoded = False
    _side: int | None = None
    """The longer side of the preview that is loaded instead of the whole picture, or None."""

    def _open(self) -> None:
        from hpcmref.format.container import peek
        from hpcmref.picture.metadata import info_of, metadata_of, mode_of

        assert self.fp is not None
        try:
            file = peek(self.fp)
            self._mode = mode_of(file)
            self._size = (file.width, file.height)
            self.info.update(info_of(metadata_of(file)))
        except HpcmrefError as error:
            raise OSError(str(error)) from error
        self._is_encoded = True
        self._decoding = threading.Lock()

    def verify(self) -> None:
        """Compare the checksum of the file, and close it. Raises OSError if they differ."""
        from hpcmref.format.container import parse

        if self.fp is not None:
            self.fp.seek(0)
            try:
                parse(self.fp.read())
            except HpcmrefError as error:
                raise OSError(str(error)) from error
        super().verify()

    def draft(self, mode: str | None, size: tuple[int, int] | None) -> tuple[str, tuple[int, int, float, float]] | None:
        """Prepare to load a picture that is scaled down by 8, 16, 32 ..., but not below `size` (width, height).

        The picture is an approximation, see `hpcmref.thumbnail`. `mode` is ignored. Returns the mode and the area as
        Pillow expects them, or None if the whole picture will be loaded.
        """
        if not self._is_encoded or self._side is not None or size is None or self.mode == "1":
            return None
        longer, factor = max(self.size), 1
        while max(self.size[0] // max(1, size[0]), self.size[1] // max(1, size[1])) >= 2 * factor:
            factor *= 2
        if factor < 8:
            return None
        from hpcmref.picture.images import fitting

        width, height = self.size
        self._side = longer // factor
        self._size = fitting(width, height, self._side)
        return self.mode, (0, 0, float(self._size[0]), float(self._size[1]))

    def thumbnail(self, size: tuple[float, float], *arguments: Any, **options: Any) -> None:
        """Do the same as `Image.thumbnail` of Pillow, but decode no larger a picture than is needed (see `draft`)."""
        self.draft(None, (int(size[0]), int(size[1])))
        super().thumbnail(size, *arguments, **options)

    def load(self) -> Any:
        """Decode the file, unless that is done already. Raises OSError.

        If Pillow's LOAD_TRUNCATED_IMAGES is set, a truncated file is decoded as far as it goes. If several threads load
        the image, one of them decodes it, and the others wait.
        """
        if self._is_encoded:
            with self._decoding:
                if self._is_encoded and self.fp is not None:  # no other thread has decoded it in the meantime
                    self._decode(self.fp)
        return super().load()

    def _decode(self, source: IO[bytes]) -> None:
        from hpcmref.format.container import MAX_PIXELS, parse

        # Pillow has checked its own limit on pixels when the file was opened.
        partial = bool(ImageFile.LOAD_TRUNCATED_IMAGES)
        source.seek(0)
        data = source.read()
        try:
            file = parse(data, partial)
            image = _decoded(file, MAX_PIXELS, self._side)
        except HpcmrefError as error:
            raise OSError(str(error)) from error
        self.im = image.im
        if self._exclusive_fp:
            source.close()
        self.fp = None
        self._is_encoded = False  # the last step, since from now on other threads do not wait


def _decoded(file: Container, max_pixels: int, side: int | None) -> Image.Image:
    if file.learned is None:
        from hpcmref.lossless import decode
        from hpcmref.picture.images import fitted

        image = decode(file, max_pixels)
        return image if side is None else fitted(image, side)
    from hpcmref.codec import codec_for

    if side is not None:
        return codec_for(file).thumbnail(file, side, max_pixels=max_pixels)
    return codec_for(file).decode(file, max_pixels=max_pixels)


def _is_ours(prefix: bytes) -> bool:
    return prefix.startswith(_MAGIC)


def _save_all(image: Image.Image, file: IO[bytes], filename: str | bytes) -> None:
    raise ConfigError("a file holds one picture: save each frame to a file of its own")


def _save(image: Image.Image, file: IO[bytes], filename: str | bytes) -> None:
    """Encode an image for `Image.save`.

    The options of `hpcmref.encode` mean what they mean there, and have the same errors. The metadata icc_profile, exif,
    xmp, dpi and comment is taken from the options, and without an option from the image. None leaves it out, and
    `strip` leaves out parts of both. Options of other formats are ignored, as in Pillow's own formats.
    """
    import inspect

    from hpcmref.api import encode
    from hpcmref.picture.images import without_exif

    options = image.encoderinfo
    if "exif" in options and options["exif"] is None:  # Pillow reads EXIF from several items of `info`
        image = without_exif(image)
    if any(name in options for name in _METADATA):
        image = image.copy()
        for name in _METADATA:
            value = options.get(name, image.info.get(name))
            image.info[name] = value.tobytes() if isinstance(value, Image.Exif) else value
        overruled = {"comment": "text", "dpi": "jfif_unit"}
        for name in overruled.keys() & options.keys():
            image.info.pop(overruled[name], None)
    known = inspect.signature(encode).parameters.keys() - {"image"}
    file.write(encode(image, **{name: options[name] for name in known & options.keys()}))
