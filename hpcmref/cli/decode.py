"""The command `decode`: decode files to images."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from hpcmref import DEFAULT_MAX_PIXELS
from hpcmref.cli import decode_options, options
from hpcmref.cli.batch import Done, Made, Outcome, Style, dry_run, run_spread
from hpcmref.cli.codecs import Codecs
from hpcmref.cli.jobs import ENCODED_SUFFIXES, Job, Outputs, plan
from hpcmref.cli.resume import is_decoded

if TYPE_CHECKING:
    from PIL import Image

    from hpcmref.codec import Codec
    from hpcmref.format.container import Container


def decode(
    files: decode_options.FilesArgument,
    output: decode_options.OutputOption = None,
    form: decode_options.FormatOption = None,
    output_quality: decode_options.OutputQualityOption = None,
    background: decode_options.BackgroundOption = None,
    upto: decode_options.UptoOption = 3,
    thumbnail: decode_options.ThumbnailOption = None,
    allow_partial: decode_options.AllowPartialOption = False,
    allow_damaged: decode_options.AllowDamagedOption = False,
    max_pixels: decode_options.MaxPixelsOption = DEFAULT_MAX_PIXELS,
    model: options.ModelOption = None,
    device: options.DeviceOption = options.Device.auto,
    force: options.ForceOption = False,
    resume: decode_options.ResumeOption = False,
    preserve: options.PreserveOption = False,
    recursive: options.RecursiveOption = True,
    jobs: options.JobsOption = 1,
    threads: options.ThreadsOption = None,
    ray: options.RayOption = None,
    dry: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    verbose: options.VerboseOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Decode files back to images."""
    options.check_existing(force, resume)
    from hpcmref.picture.images import FORMATS, format_of
    from hpcmref.picture.render import check_writable

    asked = None if form is None else decode_options.parse_format(form)
    colour = None if background is None else decode_options.parse_colour(background)
    planned = plan(files, output, ENCODED_SUFFIXES, FORMATS[asked or "PNG"][0], recursive)
    if as_json and planned.to_stdout:
        raise typer.BadParameter("the image goes to standard output already; name a file with -o.", param_hint="--json")

    def format_for(job: Job) -> str:
        if asked is not None:
            return asked
        return "PNG" if job.target is None or job.is_stream else format_of(job.target)

    def is_there(job: Job) -> bool:
        return job.target is not None and is_decoded(job.target, format_for(job), job.source, thumbnail)

    def check(job: Job) -> None:
        check_writable(format_for(job), output_quality)  # fail before decoding rather than after it

    if thumbnail is not None and upto != 3:
        raise typer.BadParameter("--thumbnail and --upto cannot be combined.")
    if resume and upto != 3:
        raise typer.BadParameter("--resume and --upto cannot be combined: an image does not show how it was decoded.")
    options.check_model(model)
    outputs = Outputs(force, preserve, is_there if resume else None, check)
    style = Style(quiet, as_json, verbose)
    if dry:
        dry_run(planned, outputs, style)
        return

    def write_output(job: Job, outcome: Outcome) -> Done:
        job.write(outcome.made.data, preserve)
        facts = {"output": job.target_name, **outcome.made.facts, "size": len(outcome.made.data)}
        line = f"{job.name} -> {job.target_name}: {facts['width']}x{facts['height']} {facts['mode']}"
        return Done(line, facts, len(outcome.made.data))

    options.use_threads(threads)
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
    run_spread(planned, outputs.read_input, decoder, write_output, style, jobs, ray, threads)


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
    background: tuple[int, int, int] | None
    thumbnail: int | None

    def __call__(self, job: Job, content: bytes) -> Made:
        from hpcmref.format.container import parse

        file = parse(content, self.allow_partial, self.allow_damaged)
        if file.damaged:
            warnings.warn("the file is damaged, and is decoded as far as its checksums match", stacklevel=2)
        if file.truncated:
            warnings.warn("the file is truncated, and is decoded as far as it goes", stacklevel=2)
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
