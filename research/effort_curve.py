"""What does each effort gain, and how long does it take? `python -m research.effort_curve IMAGES...` measures it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from hpcmref.bench.bdrate import bd_rate
from hpcmref.bench.curves import Curve, Point
from hpcmref.errors import HpcmrefError
from hpcmref.runtime.heap import keep_memory
from research.exactness_matrix import images_of, machine

if TYPE_CHECKING:
    from hpcmref.codec import Codec

REFERENCE = 768 * 512
"""The number of pixels for which seconds are reported."""


class Trial(NamedTuple):
    """The measurement of one file: bits per pixel, PSNR in dB, and processor seconds of encoding."""

    bpp: float
    psnr: float
    seconds: float


def main(
    sources: Annotated[list[Path], typer.Argument(help="A folder of images, or tar files: their held-out tiles.")],
    model: Annotated[str | None, typer.Option(help="A registry name or a .safetensors file.")] = None,
    limit: Annotated[int, typer.Option(help="Use only the first images.")] = 4,
    crop: Annotated[int, typer.Option(help="Use only the middle of each image, so many pixels a side.")] = 256,
    efforts: Annotated[str, typer.Option(help="Which efforts, with commas between.")] = "1,2,3,4,5,6,7,8,9",
    qualities: Annotated[str, typer.Option(help="Which qualities, at least four, with commas between.")] = "8,24,40,56",
) -> None:
    """Print the BD-rate of each effort against effort 0: the mean of the images' own BD-rates."""
    from hpcmref.codec import load

    keep_memory()
    codec = load(model, "cpu")
    images = (
        middle_of_tiles(sources, limit, crop) if sources[0].suffix == ".tar" else images_of(sources[0], limit, crop)
    )
    points = [int(quality) for quality in qualities.split(",")]
    table = Table(
        "effort", "BD-rate", "worst image", "best image", *(f"PSNR at {point}" for point in points),
        "processor seconds for 768x512", title=f"{codec.name}, {len(images)} images, {machine()}",
    )  # fmt: skip
    plain = [[trial(codec, image, point, 0) for point in points] for image in images]
    for effort in map(int, efforts.split(",")):
        found = [[trial(codec, image, point, effort) for point in points] for image in images]
        rates = [rate(*pair) for pair in zip(plain, found, strict=True)]
        gains = np.array([[each.psnr for each in image] for image in found]).mean(0)
        gains -= np.array([[each.psnr for each in image] for image in plain]).mean(0)
        seconds = np.mean(
            [
                each.seconds * REFERENCE / (image.width * image.height)
                for image, trials in zip(images, found, strict=True)
                for each in trials
            ]
        )
        table.add_row(
            str(effort), f"{np.mean(rates):+.2f} %", f"{max(rates):+.2f} %", f"{min(rates):+.2f} %",
            *(f"{gain:+.2f} dB" for gain in gains), f"{seconds:.1f}",
        )  # fmt: skip
        print(f"effort {effort}: {np.mean(rates):+.2f} %, {seconds:.1f} s", file=sys.stderr)
    Console(width=140).print(table)


def trial(codec: Codec, image: Image.Image, quality: int, effort: int) -> Trial:
    """Encode and decode once."""
    started = time.process_time()
    data = codec.encode(image, quality, effort=effort)
    seconds = time.process_time() - started
    error = np.asarray(codec.decode(data), float) - np.asarray(image, float)
    psnr = 10 * np.log10(255**2 / max(np.square(error).mean(), 1e-9))
    return Trial(8 * len(data) / (image.width * image.height), float(psnr), seconds)


def rate(plain: list[Trial], found: list[Trial]) -> float:
    """Return the BD-rate in percent, or NaN if the curves cannot be compared."""
    before, after = (
        Curve(name, tuple(Point(each.bpp, each.psnr) for each in trials))
        for name, trials in (("plain", plain), ("found", found))
    )
    value = bd_rate(before, after).value
    return float("nan") if value is None else value


def middle_of_tiles(archives: list[Path], limit: int, crop: int) -> list[Image.Image]:
    """Return the middle of the first held-out tiles of training archives. One photograph in 64 is held out."""
    from hpcmref.training.data import Tiles

    images = []
    for tile in Tiles(archives, crop).held_out[:limit]:
        images.append(Image.fromarray(middle(tile, crop).permute(1, 2, 0).numpy()))
    return images


def middle(tile: torch.Tensor, side: int) -> torch.Tensor:
    """The middle (3, side, side) of a tile (3, H, W), as a view."""
    top, left = ((each - side) // 2 for each in tile.shape[1:])
    return tile[:, top : top + side, left : left + side]


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        typer.run(main)
    except HpcmrefError as error:
        sys.exit(f"effort_curve: {error}")
