"""The public functions: encode, decode, thumbnail, info. `import hpcmref` offers them under its own name.

torch and NumPy are imported inside the functions, so that `import hpcmref` stays fast.
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
    """Encode an image and return the bytes of an hpcmref file.

    The image is coded with the model, or losslessly where that is better. Lossless coding is often better for text,
    drawings and screenshots (`hpcmref.choice` has the rule).

    Args:
        image: An image of Pillow; an array (H, W) or (H, W, C) with C of 1 to 4, of bool, uint8, uint16, or floats
            from 0 to 1; a tensor (C, H, W) of uint8 or floats from 0 to 1; a path; the bytes of an image file; or a
            file opened in binary mode.
        quality: 0 (smallest file) to 63 (best picture). None means 32.
        model: The name of a model or the path of a model file, see `load`. None means the default model.
        device: "cpu", "cuda", or "auto" for CUDA if there is a CUDA device.
        size: The largest permitted size of the file in bytes. It replaces `quality`.
        bpp: The largest permitted rate of the file in bits per pixel. It replaces `quality`.
        psnr: The smallest permitted PSNR in dB, over RGB samples. It replaces `quality`.
        lossless: Keep every pixel exactly. It replaces `quality`, and no model is needed.
        keep_invisible: Keep the colours of pixels whose alpha is 0. They are otherwise replaced by colours that
            take fewer bits.
        strip: True leaves out all metadata. A list leaves out some of "location", "exif", "xmp", "icc", "iptc" and
            "text".
        verify: Decode the file with a second decoder, and compare the result before the file is returned.
        effort: 0 (fast) to 9 (slow): how long to search for a better file. Every decoder reads the result.
        metric: The error that the search reduces, "mse" or "ms-ssim".
        max_seconds: End the search after this many seconds and use its best file so far.

    Returns:
        The bytes of the file.

    Raises:
        ConfigError: An argument has a wrong value. For a wrong type it is an ArgumentTypeError, which is a TypeError
            too.
        ImageError: The image cannot be read, or the format cannot hold it.
        CheckpointError: The model cannot be used.
        HpcmrefError: No quality reaches the given size, rate or PSNR, or the source cannot be read. It is the base
            class of all others.
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
    """Decode an hpcmref file and return the image.

    Args:
        data: The bytes of a file, a path, or a file opened in binary mode.
        device: "cpu", "cuda", or "auto" for CUDA if there is a CUDA device.
        model: The name of a model or the path of a model file. None means the model that the file names, which must
            be among the installed models.
        max_pixels: Images with more pixels are refused.
        as_array: Return a NumPy array instead of an image of Pillow. Its shape is (H, W) for grey, and (H, W, C) with
            C of 2 to 4 for grey with alpha, RGB and RGBA. Its type is uint8, but uint16 for 16-bit grey and bool
            for black and white.
        upto: The last scale (1, 2 or 3) that is read. 1 and 2 give previews.
        partial: Decode a truncated file as far as it goes.
        damaged: Decode a damaged file as far as its checksums match.

    Returns:
        The image in the mode of the original, with its metadata in `info`, or an array.

    Raises:
        FormatError: The data is not an hpcmref file, or it is damaged or truncated.
        UnsupportedError: A newer version of hpcmref has written the file.
        ModelMismatchError: The model of the file is not installed, or `model` is another one.
        DecodeError: The decoded latents are not those that were encoded.
        ImageError: The image has more than `max_pixels` pixels.
        ConfigError: An argument has a wrong value or type.
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
    """Decode a file to a small image that fits into a square. A picture that is smaller than the square keeps its size.

    If the longer side of the picture is at least 12 times that of the thumbnail, only a part of the latents is decoded,
    which takes less than half the time of `decode`. The thumbnail is then an approximation: on Kodak, its PSNR against
    the decoded and reduced picture was 27 to 40 dB. Otherwise the picture is decoded and reduced.

    Args:
        data: The bytes of a file, a path, or a file opened in binary mode.
        side: The side of the square in pixels.
        device: As in `decode`.
        model: As in `decode`.
        max_pixels: As in `decode`. It counts the pixels of the whole picture.
        partial: As in `decode`.
        damaged: As in `decode`.

    Returns:
        The small image.

    Raises:
        HpcmrefError: The errors are those of `decode`.
    """
    arguments.integer("side", side, 1)
    decoder = _Decoder(device, model, max_pixels, False, 3, partial, damaged)
    return decoder.small(data, side)


@dataclass(frozen=True)
class FileInfo:
    """The header and the metadata of a file, as `info` returns them.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        grey: Whether the image has one colour channel.
        alpha: Whether the image has transparency.
        metadata: The kinds of metadata in the file, of "icc", "exif", "xmp", "cicp", "iptc", "text" and "resolution".
        version: The version of the file format.
        coding: "learned", or "webp" or "png" for a lossless payload.
        encoder: The version of the hpcmref that wrote the file, such as "0.2", or None if it is unknown.
        effort: The effort of the encoder, 0 to 9.
        model: The name of the model, or None if the model is not installed or the file is lossless.
        fingerprint: The fingerprint of the model as 8 hexadecimal digits, or None in a lossless file.
        quality: 0 to 63, or None in a lossless file.
        arithmetic: The number of the exact arithmetic (see FORMAT.md), or None in a lossless file.
        size: The size of the file in bytes.
        parts: The bytes of its "header", "chunks", "payload" and "crc".
        metadata_sizes: The bytes that each item of `metadata` takes in the file.
        about: The most useful metadata as text: "camera", "date", "software", "location" ("yes"), "resolution", and
            texts of the file. Only items that exist are in it.
        exif: Names and values of all EXIF tags.
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
        """The size of the whole file in bits, divided by the number of pixels."""
        return 8 * self.size / (self.width * self.height)


def info(data: FileSource) -> FileInfo:
    """Read the header and the metadata of a file, without decoding its pixels.

    Args:
        data: The bytes of a file, a path, or a file opened in binary mode.

    Returns:
        What the file contains.

    Raises:
        FormatError: The data is not an hpcmref file, or it is damaged or truncated.
        UnsupportedError: A newer version of hpcmref has written the file.
        ConfigError: The argument has a wrong type.
    """
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
    """Return the metadata as text (see `FileInfo.about`), and the names and values of the EXIF tags."""
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
    """Encode many images, and yield the bytes of each file in the order of the images.

    The images are taken from the iterable as results are asked for. With more than one job, some are taken ahead.

    Args:
        images: An iterable of what `encode` takes.
        quality: As in `encode`.
        model: As in `encode`.
        device: As in `encode`.
        size: As in `encode`.
        bpp: As in `encode`.
        psnr: As in `encode`.
        lossless: As in `encode`.
        keep_invisible: As in `encode`.
        strip: As in `encode`.
        verify: As in `encode`.
        effort: As in `encode`.
        metric: As in `encode`.
        max_seconds: As in `encode`, for each image.
        jobs: The number of processes. With more than one, the calling script needs the usual
            `if __name__ == "__main__":`, because the processes are started with "spawn".
        progress: A function that is called after each image, with the number of finished images and the number of all
            images. The latter is None if `images` has no length.

    Yields:
        The bytes of one file for each image.

    Raises:
        HpcmrefError: The errors are those of `encode`. The first image that fails ends the generator; its number,
            from 0, is in the message. When the generator is closed, or `progress` raises an exception, all
            processes end.
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
    """Decode many files, and yield their images in the order of the files.

    Args:
        files: An iterable of what `decode` takes.
        device: As in `decode`.
        model: As in `decode`.
        max_pixels: As in `decode`.
        as_array: As in `decode`.
        upto: As in `decode`.
        partial: As in `decode`.
        damaged: As in `decode`.
        jobs: As in `encode_many`.
        progress: As in `encode_many`.

    Yields:
        One image, or one array, for each file.

    Raises:
        HpcmrefError: The errors are those of `decode`. The first file that fails ends the generator.
    """
    work = _Decoder(device, model, max_pixels, as_array, upto, partial, damaged)
    return cast("Iterator[Image.Image]", each_of("files", files, work, content_of, jobs, progress))


@dataclass(frozen=True)
class _Encoder:
    """The checked arguments of `encode`. A call with an image encodes it. It can be pickled for worker processes."""

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
            raise ConfigError("a lossless file cannot be improved: leave out effort")

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
    """The checked arguments of `decode`. A call with a file decodes it. It can be pickled for worker processes."""

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
        """The small image that `thumbnail` returns."""
        from hpcmref.format.container import parse

        file = parse(content_of(source), self.partial, self.damaged)
        if file.learned is None:
            from hpcmref import lossless
            from hpcmref.picture.images import fitted

            return fitted(lossless.decode(file, self.max_pixels), side)
        from hpcmref.codec import codec_for

        return codec_for(file, self.device, self.model).thumbnail(file, side, max_pixels=self.max_pixels)


def _parts(strip: object) -> tuple[str, ...] | bool:
    """Check the argument `strip`: True (leave out all metadata), False (keep it), or the parts to leave out."""
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
