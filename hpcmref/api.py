"""The functions of the package: images in, files out, and back. `import hpcmref` shows them under its own name.

What is heavy (torch, NumPy) is imported when a function is called.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from hpcmref import DEFAULT_MAX_PIXELS, arguments
from hpcmref.errors import ConfigError
from hpcmref.many import Progress, each_of
from hpcmref.sources import FileSource, ImageSource, array_of, content_of, image_of, portable_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from hpcmref.format.container import Container

_TARGETS = ("size", "bpp", "psnr")


def encode(
    image: ImageSource,
    quality: int | None = None,
    model: str | os.PathLike[str] | None = None,
    device: str = "auto",
    *,
    size: int | None = None,
    bpp: float | None = None,
    psnr: float | None = None,
    lossless: bool = False,
    keep_invisible: bool = False,
    strip: bool | Collection[str] = False,
    verify: bool = False,
    effort: int = 0,
    metric: str = "mse",
    max_seconds: float | None = None,
) -> bytes:
    """The file of one image: what the model makes of it, or a lossless stream where that is better, as it is for text,
    drawings and screenshots (`hpcmref.choice`).

    image: an image of Pillow; an array (H, W) or (H, W, 1 to 4) of bool, uint8, uint16 or floats from 0 to 1; a tensor
        (1 to 4, H, W) of uint8 or floats from 0 to 1; a path; the bytes of an image file; or a file opened in binary
        mode.
    quality: 0 (smallest) to 63 (best); None is the default of 32.
    size, bpp, psnr: instead of a quality, the most bytes or bits per pixel, or the least dB of RGB.
    lossless: instead of a quality, keep every pixel bit for bit; takes no model.
    model: a name or a path, see `load`. device: "cpu", "cuda" or "auto".
    keep_invisible: keep the colours of pixels whose alpha is 0.
    strip: leave out all metadata, or some of "location", "exif", "xmp", "icc", "iptc" and "text".
    verify: decode the file before it is returned, and compare.
    effort: 0 (fast) to 9: how long to search for a better file; any decoder reads it.
    metric: "mse" or "ms-ssim", which a search makes small.
    max_seconds: end the search after them, with the best file so far.

    Raises an HpcmrefError: ConfigError for a wrong argument (ArgumentTypeError, also a TypeError, for a wrong type),
    ImageError for an image that cannot be read or held, CheckpointError for a model that cannot be used.
    """
    parts = _parts(strip)
    return _Encoder(
        quality, model, device, size, bpp, psnr, lossless, keep_invisible, parts, verify, effort, metric, max_seconds
    )(image)


@overload
def decode(
    data: FileSource,
    device: str = "auto",
    model: str | os.PathLike[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    *,
    as_array: Literal[False] = False,
    upto: int = 3,
    partial: bool = False,
    damaged: bool = False,
) -> Image.Image: ...


@overload
def decode(
    data: FileSource,
    device: str = "auto",
    model: str | os.PathLike[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    *,
    as_array: Literal[True],
    upto: int = 3,
    partial: bool = False,
    damaged: bool = False,
) -> NDArray[Any]: ...


def decode(
    data: FileSource,
    device: str = "auto",
    model: str | os.PathLike[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    *,
    as_array: bool = False,
    upto: int = 3,
    partial: bool = False,
    damaged: bool = False,
) -> Image.Image | NDArray[Any]:
    """The image of one file.

    data: the bytes of a file, a path, or a file opened in binary mode.
    device, model: see `load`; by default the model that made the file is found among those that are here.
    max_pixels: larger images are refused.
    as_array: return an array (H, W), or (H, W, 2 to 4) for grey with alpha, RGB and RGBA, instead of an image: uint8,
        uint16 for an image of 16-bit grey, bool for one of black and white.
    upto: the last scale (1, 2 or 3) that is read; 1 and 2 give previews.
    partial, damaged: show what there is of a truncated or a damaged file.

    Raises an HpcmrefError: FormatError or UnsupportedError for what is not such a file, ModelMismatchError if its model
    is not here, DecodeError if its latents are not those that were encoded, ImageError for too large an image, and
    ConfigError for a wrong argument.
    """
    decoded: Image.Image | NDArray[Any] = _Decoder(device, model, max_pixels, as_array, upto, partial, damaged)(data)
    return decoded


def thumbnail(
    data: FileSource,
    side: int = 256,
    device: str = "auto",
    model: str | os.PathLike[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    *,
    partial: bool = False,
    damaged: bool = False,
) -> Image.Image:
    """The image of one file, made to fit a square of `side` pixels and never larger than it is.

    Of a picture at least 12 times as large it takes less than half the time of `decode`, and is an approximation that
    lies within 27 to 40 dB of the decoded picture, made as small. The other arguments and the errors are those of
    `decode`.
    """
    arguments.integer("side", side, 1)
    decoder = _Decoder(device, model, max_pixels, False, 3, partial, damaged)
    return decoder.small(data, side)


@dataclass(frozen=True)
class FileInfo:
    """What a file says about itself; nothing of it is decoded.

    width, height: pixels. grey, alpha: the image has one channel of colour, and transparency.
    metadata: which of "icc", "exif", "xmp", "cicp", "iptc", "text" and "resolution" it has.
    version: of the format. coding: "learned", "webp" or "png" (the last two are without loss).
    encoder: version of the hpcmref that wrote it, or None if unknown. effort: 0 to 9.
    model: the name of its model if that is here; fingerprint: of the model, 8 hexadecimal digits; quality: 0 to 63;
        arithmetic: which exact arithmetic, see FORMAT.md. All four are None in a file without loss.
    size: bytes of the file; parts: bytes of its header, chunks, payload and crc.
    metadata_sizes: bytes of the file that each item of `metadata` takes.
    about: what the metadata says in words, as far as it says it: "camera", "date", "software", "location" ("yes"),
        "resolution", and texts.
    exif: names and values of all EXIF tags.
    """

    width: int
    height: int
    grey: bool
    alpha: bool
    metadata: tuple[str, ...]
    version: int
    coding: str
    encoder: str | None
    effort: int
    model: str | None
    fingerprint: str | None
    quality: int | None
    arithmetic: int | None
    size: int
    parts: dict[str, int]
    metadata_sizes: dict[str, int]
    about: dict[str, str]
    exif: tuple[tuple[str, str], ...]

    @property
    def bits_per_pixel(self) -> float:
        """Bits of the whole file for each pixel."""
        return 8 * self.size / (self.width * self.height)


def info(data: FileSource) -> FileInfo:
    """What a file says about itself. data: as `decode` takes it. Raises FormatError, UnsupportedError, ConfigError."""
    from hpcmref import checkpoints
    from hpcmref.format.container import Encoder, Tag, parse, part_sizes

    content = content_of(data)
    file = parse(content)
    learned, encoder = file.learned, file.encoder
    sizes = {tag.name.lower(): len(chunk) for tag in Tag if (chunk := file.chunk(tag)) is not None}
    sizes = {name: size for name, size in sizes.items() if name not in ("alpha", "mode")}
    about, tags = _described(file)
    return FileInfo(
        width=file.width,
        height=file.height,
        grey=file.grey,
        alpha=file.chunk(Tag.ALPHA) is not None,
        metadata=tuple(sizes),
        version=file.version,
        coding=file.coding.name.lower(),
        encoder=None if encoder == Encoder() else f"{encoder.major}.{encoder.minor}",
        effort=encoder.effort,
        model=None if learned is None else checkpoints.name_of(learned.fingerprint),
        fingerprint=None if learned is None else learned.fingerprint.hex(),
        quality=None if learned is None else learned.quality,
        arithmetic=None if learned is None else learned.arithmetic,
        size=len(content),
        parts=part_sizes(content),
        metadata_sizes=sizes,
        about=about,
        exif=tags,
    )


def _described(file: Container) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """What the metadata says in words, and the tags of EXIF."""
    from hpcmref.errors import FormatError
    from hpcmref.format.container import METADATA, Tag

    if not any(tag in {*METADATA, Tag.RESOLUTION} for tag, _ in file.chunks):
        return {}, ()
    from hpcmref.picture.describe import described, exif_lines
    from hpcmref.picture.metadata import metadata_of

    try:
        extras = metadata_of(file)
    except FormatError as error:
        return {"metadata": str(error)}, ()
    return described(extras), tuple(exif_lines(extras.exif))


def encode_many(
    images: Iterable[ImageSource],
    quality: int | None = None,
    model: str | os.PathLike[str] | None = None,
    device: str = "auto",
    *,
    size: int | None = None,
    bpp: float | None = None,
    psnr: float | None = None,
    lossless: bool = False,
    keep_invisible: bool = False,
    strip: bool | Collection[str] = False,
    verify: bool = False,
    effort: int = 0,
    metric: str = "mse",
    max_seconds: float | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Iterator[bytes]:
    """The files of many images, one after the other and in their order, as they are asked for.

    images: an iterable of what `encode` takes. The other arguments are those of `encode`, and:
    jobs: processes at work. With more than one, images are taken some ahead; the script that calls this needs the usual
        `if __name__ == "__main__":`, since workers start afresh.
    progress: called after every image with how many are done and how many there are (None if `images` has no length).

    An image that fails ends it, with the error of `encode` and the number of the image, from 0. Closing the generator
    (or an exception in `progress`) stops the workers; nothing is left behind.
    """
    parts = _parts(strip)
    work = _Encoder(
        quality, model, device, size, bpp, psnr, lossless, keep_invisible, parts, verify, effort, metric, max_seconds
    )
    return each_of("images", images, work, portable_of, jobs, progress)


@overload
def decode_many(
    files: Iterable[FileSource],
    device: str = "auto",
    model: str | os.PathLike[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    *,
    as_array: Literal[False] = False,
    upto: int = 3,
    partial: bool = False,
    damaged: bool = False,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Iterator[Image.Image]: ...


@overload
def decode_many(
    files: Iterable[FileSource],
    device: str = "auto",
    model: str | os.PathLike[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    *,
    as_array: Literal[True],
    upto: int = 3,
    partial: bool = False,
    damaged: bool = False,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Iterator[NDArray[Any]]: ...


def decode_many(
    files: Iterable[FileSource],
    device: str = "auto",
    model: str | os.PathLike[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    *,
    as_array: bool = False,
    upto: int = 3,
    partial: bool = False,
    damaged: bool = False,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Iterator[Image.Image] | Iterator[NDArray[Any]]:
    """The images of many files, in their order. Arguments are those of `decode`, jobs and progress of `encode_many`."""
    work = _Decoder(device, model, max_pixels, as_array, upto, partial, damaged)
    return cast("Iterator[Image.Image]", each_of("files", files, work, content_of, jobs, progress))


@dataclass(frozen=True)
class _Encoder:
    """What `encode` does with its arguments, which are checked; it can be sent to another process."""

    quality: int | None
    model: str | os.PathLike[str] | None
    device: str
    size: int | None
    bpp: float | None
    psnr: float | None
    lossless: bool
    keep_invisible: bool
    strip: tuple[str, ...] | bool
    verify: bool
    effort: int
    metric: str
    max_seconds: float | None

    def __post_init__(self) -> None:
        arguments.model(self.model)
        arguments.device(self.device)
        for name in ("lossless", "keep_invisible", "verify"):
            arguments.flag(name, getattr(self, name))
        if self.quality is not None:
            arguments.integer("quality", self.quality, 0, 63)
        if self.size is not None:
            arguments.integer("size", self.size, 1)
        for name in ("bpp", "psnr"):
            if getattr(self, name) is not None:
                arguments.positive(name, getattr(self, name))
        ways = [name for name in ("quality", *_TARGETS) if getattr(self, name) is not None]
        ways += ["lossless"] * self.lossless
        if len(ways) > 1:
            raise ConfigError(f"only one of {' and '.join(ways)} can decide the quality")
        arguments.effort(self.effort, self.max_seconds)
        arguments.metric(self.metric, self.effort)
        if self.effort and self.lossless:
            raise ConfigError("effort looks for a better lossy file: lossless coding has none")

    def __call__(self, source: Any) -> bytes:
        from PIL import Image

        from hpcmref.picture import images

        image = image_of(source)
        if self.strip and isinstance(image, Image.Image):  # an array has no metadata
            image = images.strip(image) if self.strip is True else images.strip_only(image, cast("Any", self.strip))
        if self.lossless:
            from hpcmref import lossless

            data = lossless.encode(image)
            if self.verify:
                lossless.verify(data, image)
            return data
        from hpcmref.codec import load

        codec = load(self.model, self.device)
        options: Any = {
            "verify": self.verify,
            "keep_invisible": self.keep_invisible,
            "choose": True,
            "effort": self.effort,
            "metric": self.metric,
            "max_seconds": self.max_seconds,
        }
        target = {name: value for name in _TARGETS if (value := getattr(self, name)) is not None}
        if target:
            return codec.encode_to(image, **target, **options)
        return codec.encode(image, self.quality, **options)


@dataclass(frozen=True)
class _Decoder:
    """What `decode` does with its arguments, which are checked; it can be sent to another process."""

    device: str
    model: str | os.PathLike[str] | None
    max_pixels: int
    as_array: bool
    upto: int
    partial: bool
    damaged: bool

    def __post_init__(self) -> None:
        arguments.model(self.model)
        arguments.device(self.device)
        arguments.integer("max_pixels", self.max_pixels, 1)
        arguments.integer("upto", self.upto, 1, 3)
        for name in ("as_array", "partial", "damaged"):
            arguments.flag(name, getattr(self, name))

    def __call__(self, source: Any) -> Any:
        from hpcmref.format.container import parse

        file = parse(content_of(source), self.partial, self.damaged)
        if file.learned is None:
            from hpcmref import lossless

            image = lossless.decode(file, self.max_pixels)
        else:
            from hpcmref.codec import codec_for

            image = codec_for(file, self.device, self.model).decode(file, self.upto, max_pixels=self.max_pixels)
        return array_of(image) if self.as_array else image

    def small(self, source: Any, side: int) -> Image.Image:
        """What `thumbnail` returns."""
        from hpcmref.format.container import parse

        file = parse(content_of(source), self.partial, self.damaged)
        if file.learned is None:
            from hpcmref import lossless
            from hpcmref.picture.images import fitted

            return fitted(lossless.decode(file, self.max_pixels), side)
        from hpcmref.codec import codec_for

        return codec_for(file, self.device, self.model).thumbnail(file, side, max_pixels=self.max_pixels)


def _parts(strip: object) -> tuple[str, ...] | bool:
    """What is left out of the metadata: all (True), nothing (False) or these parts."""
    from hpcmref.picture.privacy import PARTS

    if isinstance(strip, bool):
        return strip
    wanted = f"True, False, or some of {', '.join(PARTS)}"
    if not isinstance(strip, (str, Collection)):
        raise arguments.wrong_type("strip", strip, wanted)
    parts = (strip,) if isinstance(strip, str) else tuple(strip)
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"strip has {part!r:.60}, and must be {wanted}")
    return parts
