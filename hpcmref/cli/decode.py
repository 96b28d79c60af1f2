"""How does a file of ours become an image again?"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated

import typer

from hpcmref import DEFAULT_MAX_PIXELS
from hpcmref.cli.batch import ENCODED_SUFFIXES, Job, plan, run
from hpcmref.cli.options import Device, DeviceOption, ForceOption, ModelOption, QuietOption

if TYPE_CHECKING:
    from hpcmref.codec import Codec


def decode(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Encoded files, folders of .bin and .hpcm files, or - for standard input."),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="IMAGE|DIR|-",
            help="An image for one file (the suffix says the format), a folder of PNGs for several (made if needed), "
            "- for a PNG on standard output. By default a single file is written next to the input as PNG.",
        ),
    ] = None,
    upto: Annotated[
        int,
        typer.Option(
            "--upto", metavar="1|2|3", min=1, max=3, help="A preview: read scales 1 to N alone, and predict the rest."
        ),
    ] = 3,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Decode a truncated file as far as it goes.")
    ] = False,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", metavar="N", min=1, help="Refuse larger images.")
    ] = DEFAULT_MAX_PIXELS,
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Decode files back to images."""

    @functools.cache
    def codec(fingerprint: bytes) -> Codec:
        from hpcmref.codec import codec_for  # torch takes a second: not for a file that turns out to be damaged

        return codec_for(fingerprint, device.value, model)

    def work(job: Job) -> str:
        from hpcmref.container import parse
        from hpcmref.imageio import format_of, save_image
        from hpcmref.render import render

        job.make_room(force)
        if job.target is not None and not job.is_stream:
            format_of(job.target)  # refuses an unknown suffix now, and not after the decoding
        data = job.read()
        image = codec(parse(data, allow_partial).fingerprint).decode(data, upto, allow_partial, max_pixels)
        if job.target is None or job.is_stream:
            job.write(render(image, "PNG"))
        else:
            save_image(image, job.target)
        return f"{job.name} -> {job.target_name}: {image.width}x{image.height} {image.mode}"

    run(plan(files, output, ENCODED_SUFFIXES, ".png"), work, quiet)
