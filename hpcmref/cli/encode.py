"""How does an image on disk become a small file?"""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcmref.cli.batch import ENCODED_SUFFIX, Job, Made, plan, run_spread
from hpcmref.cli.effort import (
    NO_EFFORT,
    Effort,
    EffortOption,
    MaxSecondsOption,
    MetricOption,
    OnInterrupt,
    OnInterruptOption,
)
from hpcmref.cli.options import Device, DeviceOption, ForceOption, JobsOption, ModelOption, QuietOption, RayOption
from hpcmref.errors import ImageError

if TYPE_CHECKING:
    from hpcmref.codec import Codec

# What a folder is searched for; a file named on its own may have any suffix that Pillow can read.
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)


def encode(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Images, folders of images, or - for standard input."),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE|DIR|-",
            help="A file for one image, a folder for several (made if needed), - for standard output. "
            "By default a single image is written next to the input with the suffix .bin.",
        ),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(
            "-q", "--quality", min=0, max=63, help="0 is the smallest file, 63 the best image.", show_default="32"
        ),
    ] = None,
    bpp: Annotated[
        float | None, typer.Option("--bpp", help="Instead of -q: the best image of at most so many bits per pixel.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="BYTES", help="Instead of -q: the best image of at most so many bytes (40kB)."),
    ] = None,
    psnr: Annotated[
        float | None, typer.Option("--psnr", help="Instead of -q: the smallest file of at least so many dB.")
    ] = None,
    frame: Annotated[
        int | None, typer.Option("--frame", metavar="N", min=1, help="Encode this frame or page, counted from 1.")
    ] = None,
    effort: EffortOption = 0,
    metric: MetricOption = "mse",
    max_seconds: MaxSecondsOption = None,
    on_interrupt: OnInterruptOption = OnInterrupt.drop,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Instead of -q: keep every pixel exactly, invisible ones too.")
    ] = False,
    keep_invisible: Annotated[
        bool, typer.Option("--keep-invisible", help="Keep the colours under transparent pixels instead of smooth ones.")
    ] = False,
    strip: Annotated[bool, typer.Option("--strip", help="Leave out the ICC profile, EXIF and XMP data.")] = False,
    strip_only: Annotated[
        str | None,
        typer.Option("--strip-only", metavar="PARTS", help="Leave out some of: location,exif,xmp,icc."),
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    force: ForceOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Skip images whose output exists already.")] = False,
    jobs: JobsOption = 1,
    ray: RayOption = None,
    quiet: QuietOption = False,
) -> None:
    """Encode images to small files."""
    if force and resume:
        raise typer.BadParameter("--force replaces what --resume keeps.")
    parts = parse_parts(strip_only) if strip_only is not None else ()
    target: dict[str, Any] = {"bpp": bpp, "size": size and parse_size(size), "psnr": psnr}
    target = {name: value for name, value in target.items() if value is not None}
    if len(target) + (quality is not None) + lossless > 1:
        raise typer.BadParameter("only one of -q, --bpp, --size, --psnr and --lossless can decide the quality.")

    def prepare(job: Job) -> bytes:
        job.make_room(force)
        try:
            return job.read()
        except OSError as error:
            raise ImageError(f"cannot read {job.name}: {error.strerror or error}") from error

    def finish(job: Job, made: Made) -> str:
        job.write(made.data)
        return _summary(job, made.data)

    planned = plan(images, output, IMAGE_SUFFIXES, ENCODED_SUFFIX)
    if resume:  # what is there is whole, because files appear complete or not at all
        planned = [job for job in planned if job.target is None or not job.target.is_file()]
    if lossless and effort:
        raise typer.BadParameter("--lossless leaves nothing to search for.", param_hint="--effort")
    searching = Effort.of(
        effort,
        metric,
        max_seconds,
        on_interrupt,
        spread=jobs > 1 or ray is not None,
        alone=len(planned) == 1,
        quiet=quiet,
    )
    run_spread(
        planned,
        prepare,
        _Encoder(model, device.value, quality, target, strip, lossless, keep_invisible, frame, parts, searching),
        finish,
        quiet,
        jobs,
        ray,
    )


@dataclass(frozen=True)
class _Encoder:
    """What is done to every image; it can be sent to another process."""

    model: str | None
    device: str
    quality: int | None
    target: dict[str, Any]
    strip: bool
    lossless: bool = False
    keep_invisible: bool = False
    frame: int | None = None
    strip_only: tuple[str, ...] = ()
    effort: Effort = NO_EFFORT

    def __call__(self, job: Job, content: bytes) -> Made:
        from hpcmref.picture import images

        file = io.BytesIO(content)
        file.name = job.name
        image = images.open_image(file, self.frame or 1)
        if self.strip:
            image = images.strip(image)
        elif self.strip_only:
            image = images.strip_only(image, self.strip_only)
        if self.lossless:
            from hpcmref.lossless import encode

            return Made(encode(image))
        with self.effort.options() as options:
            if self.target:
                return Made(self._codec.encode_to(image, **self.target, keep_invisible=self.keep_invisible, **options))
            return Made(self._codec.encode(image, self.quality, keep_invisible=self.keep_invisible, **options))

    @functools.cached_property
    def _codec(self) -> Codec:
        from hpcmref.codec import load  # torch takes a second: not before there is something to encode

        return load(self.model, self.device)


def parse_parts(text: str) -> tuple[str, ...]:
    """The parts of "location,xmp". Raises typer.BadParameter."""
    from hpcmref.picture.privacy import PARTS

    parts = tuple(part.strip() for part in text.split(","))
    if wrong := sorted(set(parts) - set(PARTS)):
        raise typer.BadParameter(f"it takes {', '.join(PARTS)}, not {', '.join(wrong)}.", param_hint="--strip-only")
    return parts


def parse_size(text: str) -> int:
    """Bytes of "40000", "40kB" or "1.5MB" (decimal units). Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size: 40000, 40kB or 1.5MB, say.", param_hint="--size")
    return int(float(match[1]) * 1000 ** " kmg".index(match[2].lower() or " "))


def _summary(job: Job, data: bytes) -> str:
    """What the file costs: bpp is bits per pixel of all its bytes, raw is one byte a pixel and channel."""
    from hpcmref.format.container import parse

    container = parse(data)
    pixels = container.width * container.height
    raw = pixels * (1 if container.grey else 3)
    size = len(data)
    line = f"{job.name} -> {job.target_name}: {size} bytes, {8 * size / pixels:.3f} bpp, {raw / size:.1f}:1 to raw"
    if container.learned is not None:
        line += f", quality {container.learned.quality}"
    else:
        line += ", lossless"
    if job.source is not None:
        line += f", {job.source.stat().st_size / size:.1f}:1 to the input file"
    return line
