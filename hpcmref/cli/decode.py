"""How does a file of ours become an image again?"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from hpcmref import DEFAULT_MAX_PIXELS
from hpcmref.cli.batch import ENCODED_SUFFIXES, Job, Made, plan, run_spread
from hpcmref.cli.options import Device, DeviceOption, ForceOption, JobsOption, ModelOption, QuietOption

if TYPE_CHECKING:
    from hpcmref.codec import Codec
    from hpcmref.format.container import Container


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
    thumbnail: Annotated[
        int | None,
        typer.Option(
            "--thumbnail",
            metavar="N",
            min=1,
            help="A small picture, N pixels on its longer side; faster, and not exact.",
        ),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Decode a truncated file as far as it goes.")
    ] = False,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", metavar="N", min=1, help="Refuse larger images.")
    ] = DEFAULT_MAX_PIXELS,
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    force: ForceOption = False,
    jobs: JobsOption = 1,
    quiet: QuietOption = False,
) -> None:
    """Decode files back to images."""

    def prepare(job: Job) -> bytes:
        from hpcmref.picture.images import format_of

        job.make_room(force)
        if job.target is not None and not job.is_stream:
            format_of(job.target)  # refuses an unknown suffix now, and not after the decoding
        return job.read()

    def finish(job: Job, made: Made) -> str:
        job.write(made.data)
        return f"{job.name} -> {job.target_name}: {made.about}"

    if thumbnail is not None and upto != 3:
        raise typer.BadParameter("--thumbnail reads what it needs, and --upto what you say.")
    work = _Decoder(model, device.value, upto, allow_partial, max_pixels, thumbnail)
    run_spread(plan(files, output, ENCODED_SUFFIXES, ".png"), prepare, work, finish, quiet, jobs)


@dataclass(frozen=True)
class _Decoder:
    """What is done to every file; it can be sent to another process."""

    model: str | None
    device: str
    upto: int
    allow_partial: bool
    max_pixels: int
    thumbnail: int | None = None

    def __call__(self, job: Job, content: bytes) -> Made:
        from hpcmref.format.container import parse
        from hpcmref.lossless import decode as decode_lossless
        from hpcmref.picture.images import fitted, rendered
        from hpcmref.picture.render import render

        file = parse(content, self.allow_partial)
        if file.learned is None:
            image = decode_lossless(file, self.max_pixels)
            image = fitted(image, self.thumbnail) if self.thumbnail else image
        elif self.thumbnail:
            image = self._codec(file).thumbnail(file, self.thumbnail, max_pixels=self.max_pixels)
        else:
            image = self._codec(file).decode(file, self.upto, max_pixels=self.max_pixels)
        target = None if job.is_stream else job.target
        data = render(image, "PNG") if target is None else rendered(image, target)
        return Made(data, f"{image.width}x{image.height} {image.mode}")

    def _codec(self, file: Container) -> Codec:
        from hpcmref.codec import codec_for  # torch takes a second: not for a file that turns out to be damaged

        assert file.learned is not None
        fingerprint = file.learned.fingerprint
        if fingerprint not in self._codecs:
            self._codecs[fingerprint] = codec_for(file, self.device, self.model)
        return self._codecs[fingerprint]

    @functools.cached_property
    def _codecs(self) -> dict[bytes, Codec]:
        return {}
