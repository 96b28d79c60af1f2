"""The command `compare`: measure how similar two images are."""

from __future__ import annotations

import io
import json
import math
import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcmref.cli.failures import tell
from hpcmref.cli.folders import STREAM
from hpcmref.cli.jobs import Job
from hpcmref.cli.options import ThreadsOption, use_threads
from hpcmref.errors import ImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="The original: an image, an encoded file, or -.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The image that is compared with A.")],
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="LIST",
            help="The metrics besides PSNR: ms-ssim, ssimulacra2, cvvdp. By default all that are installed.",
        ),
    ] = None,
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Compare two images of one size: PSNR, MS-SSIM and, where it is installed, SSIMULACRA2.

    Transparent images are measured on a white background. Images are equal if their alpha is equal, too.
    """
    for name in (first, second):
        if Path(name).is_dir():
            raise typer.BadParameter(f"{name} is a folder; name two images.")
    if first == second == STREAM:
        raise typer.BadParameter("only one of them can come from standard input.")
    use_threads(threads)
    from hpcmref.bench import metrics as quality

    chosen = quality.chosen(metrics)
    original, other = _views(first, second)
    found = quality.measured(original.pixels, other.pixels, chosen)
    found["ms_ssim_db"] = quality.decibels(found["ms_ssim"])
    if metrics is not None:
        _explain_missing(found, chosen)
    look_equal = bool((original.pixels == other.pixels).all())
    equal = look_equal and bool((original.alpha == other.alpha).all())
    if as_json:
        facts: dict[str, Any] = {"a": first, "b": second}
        facts |= {name: None if value is None or math.isinf(value) else value for name, value in found.items()}
        print(json.dumps({**facts, "equal": equal}))
        return
    why = ": the pixels are equal" if equal else " on white; alpha differs" if look_equal else ""
    for metric in quality.METRICS:
        value = found[metric.field]
        if value is not None:
            shown = f"infinite{why}" if math.isinf(value) else f"{value:.2f} {metric.unit}".rstrip()
            print(f"{metric.title + ':':14} {shown}")


@dataclass(frozen=True, eq=False)
class _View:
    """An upright image. pixels: (H, W, 3) uint8, on white. alpha: (H, W) uint8, which is 255 if the image is opaque."""

    pixels: NDArray[Any]
    alpha: NDArray[Any]


def _views(first: str, second: str) -> tuple[_View, _View]:
    """Read both images. Raises ImageError if their sizes are different."""
    views = _view(first), _view(second)
    if views[0].alpha.shape != views[1].alpha.shape:
        sizes = " and ".join("{1}x{0}".format(*each.alpha.shape) for each in views)
        raise ImageError(f"{first} and {second} have different sizes, {sizes}")
    return views


def _view(name: str) -> _View:
    """Read an image, and print what its conversion to 8 bits loses."""
    import numpy as np
    from PIL import Image

    from hpcmref.picture.images import open_image, picture_of

    job = Job(None if name == STREAM else Path(name), None)
    with warnings.catch_warnings(record=True) as caught:
        picture = picture_of(open_image(job.source or _standard_input(job)), keep_invisible=True)
    for warning in caught:
        tell(f"hpcmref: {job.name}: {' '.join(str(warning.message).split())}", sys.stderr)
    alpha = picture.extras.alpha
    if alpha is None:
        return _View(picture.pixels, np.full(picture.pixels.shape[:2], 255, np.uint8))
    image = Image.fromarray(np.dstack([picture.pixels, alpha]))
    return _View(np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")), alpha)


def _standard_input(job: Job) -> io.BytesIO:
    """Read standard input into a file whose name is used in messages."""
    file = io.BytesIO(job.read())
    file.name = job.name
    return file


def _explain_missing(found: Mapping[str, Any], asked: Collection[str]) -> None:
    """Print why metrics that were asked for are missing. found: the values by the names of `Metric.field`."""
    from hpcmref.bench.metrics import METRICS, SSIMULACRA2_LEAST_SIDE
    from hpcmref.similarity import MS_SSIM_LEAST_SIDE

    least = {"ms-ssim": MS_SSIM_LEAST_SIDE, "ssimulacra2": SSIMULACRA2_LEAST_SIDE}
    for metric in METRICS:
        if metric.option in asked and found[metric.field] is None:
            tell(f"hpcmref: {metric.title} needs sides of at least {least[metric.option]} pixels", sys.stderr)
