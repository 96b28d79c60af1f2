"""The command `encode`: encode images to files."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcmref.cli.batch import Done, Made, Outcome, Style, dry_run, run_spread
from hpcmref.cli.effort import Effort, EffortOption, MaxSecondsOption, MetricOption, OnInterrupt, OnInterruptOption
from hpcmref.cli.frames import each_frame, frame_of
from hpcmref.cli.jobs import ENCODED_SUFFIX, Job, Outputs, plan
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
from hpcmref.cli.resume import Wanted
from hpcmref.errors import ImageError, near
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
            "By default a single image is written next to the input with the suffix .hpcm.",
        ),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(
            "-q", "--quality", min=0, max=63, help="0 is the smallest file, 63 the best image.", show_default="32"
        ),
    ] = None,
    bpp: Annotated[
        float | None, typer.Option("--bpp", help="Instead of -q: the best image of at most this many bits per pixel.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="BYTES", help="Instead of -q: the best image of at most this size (40kB)."),
    ] = None,
    psnr: Annotated[
        float | None, typer.Option("--psnr", help="Instead of -q: the smallest file with at least this PSNR in dB.")
    ] = None,
    frame: Annotated[
        int | None, typer.Option("--frame", metavar="N", min=1, help="Encode this frame or page, counted from 1.")
    ] = None,
    all_frames: Annotated[
        bool, typer.Option("--all-frames", help="Encode every frame or page to a file of its own: name-0001.hpcm.")
    ] = False,
    effort: EffortOption = 0,
    metric: MetricOption = "mse",
    max_seconds: MaxSecondsOption = None,
    on_interrupt: OnInterruptOption = OnInterrupt.drop,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Instead of -q: keep every pixel exactly, also transparent ones.")
    ] = False,
    keep_invisible: Annotated[
        bool,
        typer.Option(
            "--keep-invisible", help="Keep the colours of fully transparent pixels, which are replaced otherwise."
        ),
    ] = False,
    strip: Annotated[
        bool, typer.Option("--strip", help="Leave out all metadata: ICC profile, EXIF, text and others.")
    ] = False,
    strip_only: Annotated[
        str | None,
        typer.Option("--strip-only", metavar="PARTS", help="Leave out some of: location,exif,xmp,icc,iptc,text."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Decode each file with a second decoder before it is written, and compare.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Decode each file, and show its PSNR and, if installed, SSIMULACRA2.")
    ] = False,
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    force: ForceOption = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Skip images whose output exists, is complete, and has this model and quality."),
    ] = False,
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
    """Encode images to small files."""
    if force and resume:
        raise typer.BadParameter("--force replaces existing outputs, and --resume keeps them: use one of them.")
    parts = parse_parts(strip_only) if strip_only is not None else ()
    target: dict[str, Any] = {"bpp": bpp, "size": None if size is None else parse_size(size), "psnr": psnr}
    target = {name: value for name, value in target.items() if value is not None}
    for name, value in target.items():
        if not 0 < value < math.inf:
            raise typer.BadParameter("it must be a number above 0.", param_hint=f"--{name}")
    if len(target) + (quality is not None) + lossless > 1:
        raise typer.BadParameter("only one of -q, --bpp, --size, --psnr and --lossless can decide the quality.")
    planned = plan(images, output, IMAGE_SUFFIXES, ENCODED_SUFFIX, recursive)
    if as_json and planned.to_stdout:
        raise typer.BadParameter("the file goes to standard output already; name another with -o.", param_hint="--json")

    if all_frames:
        if frame is not None:
            raise typer.BadParameter("--all-frames and --frame cannot be combined.")
        planned.jobs = each_frame(planned.jobs)
    wanted = Wanted(model, quality, target, lossless)
    is_there = (lambda job: job.target is not None and wanted.is_there(job.target)) if resume else None
    outputs = Outputs(force, preserve, is_there)
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

    use_threads(threads)
    if lossless and effort:
        raise typer.BadParameter("a lossless file cannot be improved: leave out --effort.", param_hint="--effort")
    searching = Effort.of(
        effort, metric, max_seconds, on_interrupt, spread=jobs > 1 or ray is not None,
        alone=len(planned.jobs) == 1, quiet=quiet or as_json,
    )  # fmt: skip
    encoder = _Encoder(
        model=model, device=device.value, quality=quality, target=target, strip=strip, lossless=lossless,
        keep_invisible=keep_invisible, frame=frame, strip_only=parts, verify=verify, measure=measure, effort=searching,
    )  # fmt: skip
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
        options: dict[str, Any] = {"keep_invisible": self.keep_invisible, "choose": True}
        if self.verify:
            options["verify"] = True
        with self.effort.options() as searching:
            if self.target:
                return self._codec.encode_to(image, **self.target, **options, **searching)
            return self._codec.encode(image, self.quality, **options, **searching)

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


@contextlib.contextmanager
def _timed(stages: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    stages[name] = time.perf_counter() - started


def parse_parts(text: str) -> tuple[str, ...]:
    """Return the parts of metadata in a list such as "location,xmp". Raises typer.BadParameter."""
    from hpcmref.picture.privacy import PARTS

    parts = tuple(part.strip() for part in text.split(","))
    if wrong := sorted(set(parts) - set(PARTS)):
        hint = near(wrong[0], PARTS)
        raise typer.BadParameter(
            f"it takes {', '.join(PARTS)}, not {', '.join(map(repr, wrong))}{hint}.", param_hint="--strip-only"
        )
    return parts


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "40000", "40kB" or "1.5MB" (decimal units). Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kMG]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write it as in 40000, 40kB or 1.5MB.", param_hint="--size")
    return int(float(match[1]) * 1000 ** " kmg".index(match[2].lower() or " "))


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
