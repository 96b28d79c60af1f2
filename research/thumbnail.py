"""What part of the time of decoding does a thumbnail take, and how accurate is it?

    python -m research.thumbnail kodak --megapixels 12

One large picture is assembled from the photographs of a folder. For every size of thumbnail, the script prints its
processor time as a part of that of decoding the whole picture (both in turn, median of the ratios, with the codec
loaded), and its PSNR against the decoded picture and the original, both scaled down.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageOps

from hpcmref.codec import load


def mosaic(folder: Path, megapixels: float) -> Image.Image:
    """Assemble a picture of 4:3 with this many pixels, from the photographs of a folder at their own size."""
    photographs = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
    picture = Image.new("RGB", (width, width * 3 // 4))
    x = y = number = 0
    while y < picture.height:
        photograph = photographs[number % len(photographs)]
        if photograph.width < photograph.height:
            photograph = photograph.rotate(90, expand=True)
        photograph = ImageOps.mirror(photograph) if number // len(photographs) % 2 else photograph
        picture.paste(photograph, (x, y))
        number, x = number + 1, x + photograph.width
        if x >= picture.width:
            x, y = 0, y + photograph.height
    return picture


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Return the PSNR in dB over all samples."""
    error = np.square(np.asarray(image, np.float64) - np.asarray(reference, np.float64)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def main(
    folder: Annotated[Path, typer.Argument(help="A folder of PNG files.")],
    megapixels: Annotated[float, typer.Option(help="Of the picture.")] = 12,
    quality: Annotated[int, typer.Option("-q", help="Of the file.")] = 32,
    sides: Annotated[str, typer.Option(help="Of the thumbnails, with commas between.")] = "512,256,128,64",
    repeat: Annotated[int, typer.Option(help="How often each is timed.")] = 3,
) -> None:
    """Print the table."""
    codec = load(device="cpu")
    picture = mosaic(folder, megapixels)
    data = codec.encode(picture, quality)
    whole = codec.decode(data)
    codec.thumbnail(data, 16)  # fills the caches of the codec
    print(f"{'side':>6}{'time':>8}{'dB to decoded':>16}{'dB to original':>16}  {picture.width} x {picture.height}")
    for side in map(int, sides.split(",")):
        ratios = []
        for _ in range(repeat):
            started = time.process_time()
            small = codec.thumbnail(data, side)
            between = time.process_time()
            codec.decode(data)
            ratios.append((between - started) / (time.process_time() - between))
        close = [psnr(small, each.resize(small.size, Image.Resampling.LANCZOS)) for each in (whole, picture)]
        print(f"{side:6}{statistics.median(ratios):8.2f}{close[0]:16.2f}{close[1]:16.2f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
