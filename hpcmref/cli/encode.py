"""The command `encode`: encode images to files."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hpcmref.cli import encode_options, options
from hpcmref.cli.batch import Done, Made, Outcome, Style, dry_run, run_spread
from hpcmref.cli.effort import Effort, EffortOption, MaxSecondsOption, MetricOption, OnInterrupt, OnInterruptOption
from hpcmref.cli.frames import each_frame, frame_of
from hpcmref.cli.jobs import ENCODED_SUFFIX, Job, Outputs, plan
from hpcmref.cli.resume import Wanted
from hpcmref.errors import DecodeError, ImageError
from hpcmref.runtime.heap import no_search

if TYPE_CHECKING:
    from PIL import Image

    from hpcmref.codec import Codec

# The suffixes of images in folders. A file that is named on the command line may have any suffix.
IMAGE_SUFFIXES = frozenset(
    [
        *(".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf"),
        *(".jpg", ".jpx", ".jxl", ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif"),
        *(".tiff", ".webp"),
    ]
)


def encode(
    images: encode_options.ImagesArgument,
    output: encode_options.OutputOption = None,
    quality: encode_options.QualityOption = None,
    bpp: encode_options.BppOption = None,
    size: encode_options.SizeOption = None,
    psnr: encode_options.PsnrOption = None,
    frame: encode_options.FrameOption = None,
    all_frames: encode_options.AllFramesOption = False,
    effort: EffortOption = 0,
    metric: MetricOption = "mse",
    max_seconds: MaxSecondsOption = None,
    on_interrupt: OnInterruptOption = OnInterrupt.drop,
    lossless: encode_options.LosslessOption = False,
    keep_invisible: encode_options.KeepInvisibleOption = False,
    strip: encode_options.StripOption = False,
    strip_only: encode_options.StripOnlyOption = None,
    verify: encode_options.VerifyOption = False,
    measure: encode_options.MeasureOption = False,
    model: options.ModelOption = None,
    device: options.DeviceOption = options.Device.auto,
    force: options.ForceOption = False,
    resume: encode_options.ResumeOption = False,
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
    """Encode images to small files."""
    options.check_existing(force, resume)
    parts = encode_options.parse_parts(strip_only) if strip_only is not None else ()
    target = encode_options.target_of(quality, bpp, size, psnr, lossless)
    planned = plan(images, output, IMAGE_SUFFIXES, ENCODED_SUFFIX, recursive)
    if as_json and planned.to_stdout:
        raise typer.BadParameter("the file goes to standard output already; name another with -o.", param_hint="--json")

    if all_frames:
        if frame is not None:
            raise typer.BadParameter("--all-frames and --frame cannot be combined.")
        planned.jobs = each_frame(planned.jobs)
    options.use_threads(threads)
    if lossless and effort:
        raise typer.BadParameter("a lossless file cannot be improved: leave out --effort.", param_hint="--effort")
    if not lossless:
        options.check_model(model)
    searching = Effort.of(
        effort, metric, max_seconds, on_interrupt, spread=jobs > 1 or ray is not None,
        alone=len(planned.jobs) == 1, quiet=quiet or as_json,
    )  # fmt: skip
    encoder = _Encoder(
        model=model, device=device.value, quality=quality, target=target, strip=strip, lossless=lossless,
        keep_invisible=keep_invisible, frame=frame, strip_only=parts, verify=verify, measure=measure, effort=searching,
    )  # fmt: skip
    wanted = Wanted(model, quality, target, lossless)

    def is_there(job: Job) -> bool:
        return job.target is not None and wanted.is_there(job.target) and encoder.is_near(job, job.target)

    outputs = Outputs(force, preserve, is_there if resume else None)
    style = Style(quiet, as_json, verbose)
    if dry:
        dry_run(planned, outputs, style)
        return

    def read_input(job: Job) -> bytes | None:
        try:
            return outputs.read_input(job)
        except OSError as error:
            raise ImageError(f"cannot read {job.name}: {error.strerror or error}") from error

    def write_output(job: Job, outcome: Outcome) -> Done:
        job.write(outcome.made.data, preserve)
        facts = _facts(job, outcome)
        return Done(_summary(job, outcome, facts, alone=len(planned.jobs) == 1), facts, len(outcome.made.data))

    run_spread(planned, read_input, encoder, write_output, style, jobs, ray, threads)


@dataclass(frozen=True)
class _Encoder:
    """The work on one image. It can be pickled for worker processes."""

    model: str | None
    device: str
    quality: int | None
    target: dict[str, Any]
    strip: bool
    lossless: bool
    keep_invisible: bool
    frame: int | None
    strip_only: tuple[str, ...]
    verify: bool
    measure: bool
    effort: Effort

    def __call__(self, job: Job, content: bytes) -> Made:
        stages: dict[str, float] = {}
        with _timed(stages, "open"):
            image = self._opened(job, content)
        if not self.lossless:
            with _timed(stages, "load the model"):
                self._codec  # noqa: B018
        with _timed(stages, "encode and verify" if self.verify else "encode"):
            data = self._encoded(image)
        facts = {}
        if self.measure:
            with _timed(stages, "measure"):
                facts = self._measured(image, data)
        if len(data) > len(content):
            warnings.warn(
                f"the encoded file is larger than the input, {len(data)} against {len(content)} bytes", stacklevel=2
            )
        return Made(data, facts, stages)

    def is_near(self, job: Job, existing: Path) -> bool:
        """Return whether an existing file is as near to the image as it has to be.

        That is, whether it reaches the PSNR, or has every pixel if it must be lossless. Without either, all are near
        enough. Standard input can be read only once, so a file of it is never near enough.
        """
        if "psnr" not in self.target and not self.lossless:
            return True
        if job.source is None:
            return False
        data = existing.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the encoder gives them
            image = self._opened(job, job.read())
            if self.lossless:
                return _is_exact(data, image)
            psnr = self._measured(image, data)["psnr"]
        return psnr is not None and psnr >= float(self.target["psnr"])

    def _opened(self, job: Job, content: bytes) -> Image.Image:
        from hpcmref.picture import images

        file = io.BytesIO(content)
        file.name = job.name
        image = images.open_image(file, frame_of(job, self.frame))
        if self.strip:
            return images.strip(image)
        return images.strip_only(image, self.strip_only) if self.strip_only else image

    def _encoded(self, image: Image.Image) -> bytes:
        if self.lossless:
            from hpcmref import lossless

            data = lossless.encode(image)
            if self.verify:
                lossless.verify(data, image)
            return data
        choices: dict[str, Any] = {"keep_invisible": self.keep_invisible, "choose": True}
        if self.verify:
            choices["verify"] = True
        with self.effort.options() as searching:
            if self.target:
                return self._codec.encode_to(image, **self.target, **choices, **searching)
            return self._codec.encode(image, self.quality, **choices, **searching)

    def _measured(self, image: Image.Image, data: bytes) -> dict[str, float | None]:
        """Decode the file and compare it with the image.

        Returns "psnr" in dB, over the pixels whose alpha is above 0, and "ssimulacra2" if that is installed.
        """
        import numpy as np

        from hpcmref import lossless
        from hpcmref.bench import metrics
        from hpcmref.choice import visible_pixels
        from hpcmref.format.container import parse
        from hpcmref.picture.images import picture_of

        file = parse(data)
        decoded = lossless.decode(file) if self.lossless else self._codec.decode(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the encoder has given them already
            picture = picture_of(image, self.keep_invisible or self.lossless)  # the pixels that were coded
            original = picture.pixels
            shown = picture_of(decoded, keep_invisible=True).pixels
            alpha = picture.extras.alpha
            seen = visible_pixels(picture) / (original.shape[0] * original.shape[1])
        if alpha is not None and seen < 1:
            shown = np.where(alpha[..., None] > 0, shown, original)  # invisible pixels do not count
        found = metrics.measured(original, shown, metrics.chosen(None) & {"ssimulacra2"})
        if found["psnr"] is not None:
            found["psnr"] += 10 * math.log10(seen)
        return {name: found[name] for name in ("psnr", "ssimulacra2") if found[name] is not None}

    @functools.cached_property
    def _codec(self) -> Codec:
        with no_search():
            from hpcmref.codec import load  # imports torch, which takes a second

            return load(self.model, self.device)


def _is_exact(data: bytes, image: Image.Image) -> bool:
    """Return whether a file has every pixel of an image, also the invisible ones."""
    from hpcmref import lossless

    try:
        lossless.verify(data, image)
    except DecodeError:
        return False
    return True


@contextlib.contextmanager
def _timed(stages: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    stages[name] = time.perf_counter() - started


def _facts(job: Job, outcome: Outcome) -> dict[str, Any]:
    """Return the facts of an encoded file for JSON. Sizes are in bytes; seconds do not include reading and writing."""
    from hpcmref.format.container import parse

    data = outcome.made.data
    file = parse(data)
    pixels = file.width * file.height
    return {
        "output": job.target_name,
        "width": file.width,
        "height": file.height,
        "channels": "grey" if file.grey else "colour",
        "input_size": outcome.size,
        "size": len(data),
        "bits_per_pixel": 8 * len(data) / pixels,
        "quality": None if file.learned is None else file.learned.quality,
        "seconds": sum(seconds for name, seconds in outcome.made.stages.items() if name.startswith("encode")),
        **{name: value if math.isfinite(value) else None for name, value in outcome.made.facts.items()},
    }


def _summary(job: Job, outcome: Outcome, facts: dict[str, Any], alone: bool) -> str:
    """Return the line that is printed for an encoded file.

    bpp is the size of the whole file in bits per pixel, and raw is one byte for each pixel and channel. alone: append
    the time and the speed of encoding.
    """
    pixels, size, seconds = facts["width"] * facts["height"], facts["size"], facts["seconds"]
    raw = pixels * (1 if facts["channels"] == "grey" else 3)
    line = (
        f"{job.name} -> {job.target_name}: {size} bytes, {facts['bits_per_pixel']:.3f} bpp, {raw / size:.1f}:1 to raw"
    )
    line += ", lossless" if facts["quality"] is None else f", quality {facts['quality']}"
    if job.source is not None:
        line += f", {outcome.size / size:.1f}:1 to the input file"
    if "psnr" in facts:
        line += f", PSNR {facts['psnr']:.2f} dB" if facts["psnr"] is not None else ", PSNR infinite"
    if "ssimulacra2" in facts:
        line += f", SSIMULACRA2 {facts['ssimulacra2']:.1f}"
    if alone:
        line += f", {seconds:.2f} s, {pixels / 1e6 / max(seconds, 1e-9):.2f} MP/s"
    return line
