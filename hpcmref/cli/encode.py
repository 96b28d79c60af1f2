"""How does an image on disk become a small file?"""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Annotated

import typer

from hpcmref import DEFAULT_QUALITY
from hpcmref.cli.batch import ENCODED_SUFFIX, Job, plan, run
from hpcmref.cli.options import Device, DeviceOption, ForceOption, ModelOption, QuietOption

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
        int, typer.Option("-q", "--quality", min=0, max=63, help="0 is the smallest file, 63 the best image.")
    ] = DEFAULT_QUALITY,
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Encode images to small files."""

    @functools.cache
    def codec() -> Codec:
        from hpcmref.codec import load  # torch takes a second: not before there is something to encode

        return load(model, device.value)

    def work(job: Job) -> str:
        from hpcmref.imageio import open_image

        job.make_room(force)
        image = open_image(job.source or io.BytesIO(job.read()))
        data = codec().encode(image, quality)
        job.write(data)
        return _summary(job, data)

    run(plan(images, output, IMAGE_SUFFIXES, ENCODED_SUFFIX), work, quiet)


def _summary(job: Job, data: bytes) -> str:
    """What the file costs: bpp is bits per pixel of all its bytes, raw is one byte a pixel and channel."""
    from hpcmref.container import parse

    container = parse(data)
    pixels = container.width * container.height
    raw = pixels * (1 if container.grey else 3)
    size = len(data)
    line = f"{job.name} -> {job.target_name}: {size} bytes, {8 * size / pixels:.3f} bpp, {raw / size:.1f}:1 to raw"
    if job.source is not None:
        line += f", {job.source.stat().st_size / size:.1f}:1 to the input file"
    return line
