"""The command `decode`: decode files to images."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from hpcmref import DEFAULT_MAX_PIXELS
from hpcmref.cli.batch import Done, Made, Outcome, Style, dry_run, run_spread
from hpcmref.cli.codecs import Codecs
from hpcmref.cli.jobs import ENCODED_SUFFIXES, Job, Outputs, plan
from hpcmref.cli.options import (
    Device,
    DeviceOption,
    DryRunOption,
    ForceOption,
    JobsOption,
    JsonOption,
    ModelOption,
    PreserveOption,
    QuietOption,
    RayOption,
    RecursiveOption,
    ThreadsOption,
    VerboseOption,
    use_threads,
)
from hpcmref.cli.resume import is_decoded

if TYPE_CHECKING:
    from PIL import Image

    from hpcmref.codec import Codec
    from hpcmref.format.container import Container

Colour = tuple[int, int, int]


def decode(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Encoded files, folders of .hpcm and .bin files, or - for standard input."),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="IMAGE|DIR|-",
            help="An image for one file (the suffix says the format), a folder for several (made if needed), - for "
            "standard output. By default a single file is written next to the input as PNG.",
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="The format of the image: png, jpeg, webp, avif, jxl, tiff, bmp, ppm or npy. By default that of the "
            "suffix of -o, or else PNG.",
        ),
    ] = None,
    output_quality: Annotated[
        int | None,
        typer.Option(
            "--output-quality",
            min=1,
            max=100,
            metavar="1..100",
            help="The quality of JPEG, WebP, AVIF and JPEG XL outputs.",
        ),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            "--background",
            metavar="COLOUR",
            help="The colour behind transparent pixels in formats without transparency: a name, or #rrggbb.",
        ),
    ] = None,
    upto: Annotated[
        int,
        typer.Option(
            "--upto", metavar="1|2|3", min=1, max=3, help="Decode a preview: read only scales 1 to N, predict the rest."
        ),
    ] = 3,
    thumbnail: Annotated[
        int | None,
        typer.Option(
            "--thumbnail",
            metavar="N",
            min=1,
            help="Decode a small picture of N pixels on its longer side. It is faster, and not exact.",
        ),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Decode a truncated file as far as it goes.")
    ] = False,
    allow_damaged: Annotated[
        bool, typer.Option("--allow-damaged", help="Decode a damaged file as far as its checksums match.")
    ] = False,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", metavar="N", min=1, help="Refuse larger images.")
    ] = DEFAULT_MAX_PIXELS,
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    force: ForceOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Skip files whose image exists and is complete.")] = False,
    preserve: PreserveOption = False,
    recursive: RecursiveOption = True,
    jobs: JobsOption = 1,
    threads: ThreadsOption = None,
    ray: RayOption = None,
    dry: DryRunOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Decode files back to images."""
    if force and resume:
        raise typer.BadParameter("--force replaces existing outputs, and --resume keeps them: use one of them.")
    from hpcmref.picture.images import FORMATS, format_of
    from hpcmref.picture.render import check_writable

    asked = None if form is None else parse_format(form)
    colour = None if background is None else parse_colour(background)
    planned = plan(files, output, ENCODED_SUFFIXES, FORMATS[asked or "PNG"][0], recursive)
    if as_json and planned.to_stdout:
        raise typer.BadParameter("the image goes to standard output already; name a file with -o.", param_hint="--json")

    def format_for(job: Job) -> str:
        if asked is not None:
            return asked
        return "PNG" if job.target is None or job.is_stream else format_of(job.target)

    def is_there(job: Job) -> bool:
        return job.target is not None and is_decoded(job.target, format_for(job), job.source)

    if thumbnail is not None and upto != 3:
        raise typer.BadParameter("--thumbnail and --upto cannot be combined.")
    outputs = Outputs(force, preserve, is_there if resume else None)
    style = Style(quiet, as_json, verbose)
    if dry:
        dry_run(planned, outputs, style)
        return

    def read_input(job: Job) -> bytes | None:
        check_writable(format_for(job), output_quality)  # fail before decoding rather than after it
        return outputs.read_input(job)

    def write_output(job: Job, outcome: Outcome) -> Done:
        job.write(outcome.made.data, preserve)
        facts = {"output": job.target_name, **outcome.made.facts, "size": len(outcome.made.data)}
        line = f"{job.name} -> {job.target_name}: {facts['width']}x{facts['height']} {facts['mode']}"
        return Done(line, facts, len(outcome.made.data))

    use_threads(threads)
    decoder = _Decoder(
        Codecs(model, device.value),
        upto,
        allow_partial,
        allow_damaged,
        max_pixels,
        asked,
        output_quality,
        colour,
        thumbnail,
    )
    run_spread(planned, read_input, decoder, write_output, style, jobs, ray, threads)


@dataclass(frozen=True)
class _Decoder:
    """The work on one file. It can be pickled for worker processes."""

    codecs: Codecs
    upto: int
    allow_partial: bool
    allow_damaged: bool
    max_pixels: int
    form: str | None
    quality: int | None
    background: Colour | None
    thumbnail: int | None

    def __call__(self, job: Job, content: bytes) -> Made:
        from hpcmref.format.container import parse

        file = parse(content, self.allow_partial, self.allow_damaged)
        if file.damaged:
            warnings.warn("the file is damaged, and is decoded as far as its checksums match", stacklevel=2)
        started = time.perf_counter()
        codec = self.codecs.of(file)
        loaded = time.perf_counter()
        image = self._decoded(file, codec)
        decoded = time.perf_counter()
        data = self._rendered(image, job)
        stages = {
            "load the model": loaded - started,
            "decode": decoded - loaded,
            "write the image": time.perf_counter() - decoded,
        }
        facts = {"width": image.width, "height": image.height, "mode": image.mode, "seconds": stages["decode"]}
        return Made(data, facts, stages)

    def _decoded(self, file: Container, codec: Codec | None) -> Image.Image:
        if codec is None:
            from hpcmref import lossless
            from hpcmref.picture.images import fitted

            image = lossless.decode(file, self.max_pixels)
            return image if self.thumbnail is None else fitted(image, self.thumbnail)
        if self.thumbnail is not None:
            return codec.thumbnail(file, self.thumbnail, max_pixels=self.max_pixels)
        return codec.decode(file, self.upto, max_pixels=self.max_pixels)

    def _rendered(self, image: Image.Image, job: Job) -> bytes:
        from hpcmref.picture.images import rendered
        from hpcmref.picture.render import render

        if job.target is None or job.is_stream:
            return render(image, self.form or "PNG", self.quality, self.background)
        return rendered(image, job.target, self.form, self.quality, self.background)


def parse_format(text: str) -> str:
    """Return the format of a name or a suffix, such as "jpeg", "jpg" or "TIFF". Raises typer.BadParameter."""
    from hpcmref.errors import near
    from hpcmref.picture.images import FORMATS

    names = {suffix[1:]: form for form, suffixes in FORMATS.items() for suffix in suffixes}
    names |= {form.lower(): form for form in FORMATS}
    if (form := names.get(text.strip().lower().lstrip("."))) is None:
        hint = near(text, names)
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(FORMATS).lower()}{hint}.", param_hint="--format")
    return form


def parse_colour(text: str) -> Colour:
    """Return red, green and blue of a colour's name or of #rrggbb. Raises typer.BadParameter."""
    from PIL import ImageColor

    from hpcmref.errors import near

    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        hint = near(text, ImageColor.colormap)
        raise typer.BadParameter(
            f"{text!r} is not a colour; write it as in #ffffff{hint}.", param_hint="--background"
        ) from None
    return red, green, blue
