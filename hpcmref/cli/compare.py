"""The command `compare`: measure how similar two images are."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcmref.cli.folders import STREAM
from hpcmref.cli.jobs import Job
from hpcmref.cli.options import ThreadsOption, use_threads
from hpcmref.errors import ImageError

if TYPE_CHECKING:
    from hpcmref.picture.images import Picture


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
    """Compare two images of one size: PSNR, MS-SSIM and, where it is installed, SSIMULACRA2."""
    for name in (first, second):
        if Path(name).is_dir():
            raise typer.BadParameter(f"{name} is a folder; name two images.")
    if first == second == STREAM:
        raise typer.BadParameter("only one of them can come from standard input.")
    use_threads(threads)
    from hpcmref.bench import metrics as quality

    chosen = quality.chosen(metrics)
    original, other = _pictures(first, second)
    found = quality.measured(original.pixels, other.pixels, chosen)
    found["ms_ssim_db"] = quality.decibels(found["ms_ssim"])
    if as_json:
        facts: dict[str, Any] = {"a": first, "b": second}
        facts |= {name: None if value is None or math.isinf(value) else value for name, value in found.items()}
        print(json.dumps({**facts, "equal": bool((original.pixels == other.pixels).all())}))
        return
    for metric in quality.METRICS:
        value = found[metric.field]
        if value is not None:
            shown = "infinite: the pixels are equal" if math.isinf(value) else f"{value:.2f} {metric.unit}".rstrip()
            print(f"{metric.title + ':':14} {shown}")


def _pictures(first: str, second: str) -> tuple[Picture, Picture]:
    """Read both images. Raises ImageError if their sizes are different."""
    pictures = _picture(first), _picture(second)
    if pictures[0].pixels.shape != pictures[1].pixels.shape:
        sizes = " and ".join("{1}x{0}".format(*each.pixels.shape) for each in pictures)
        raise ImageError(f"{first} and {second} have different sizes, {sizes}")
    return pictures


def _picture(name: str) -> Picture:
    """Read the pixels of an image, composed with white where it is transparent."""
    from PIL import Image

    from hpcmref.picture.images import open_image, picture_of

    image = open_image(Path(name) if name != STREAM else io.BytesIO(Job(None, None).read()))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return picture_of(image)
