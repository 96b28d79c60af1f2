"""What does the choice between the learned and a lossless stream gain, and what does it cost for photographs?

    python -m research.lossless_choice --side 512 --photographs kodak

For every picture of `research.hard_pictures` and every photograph of a folder, the script prints bits per pixel and
PSNR of the learned stream and of the choice at some qualities, and compares the lossless stream with the better of WebP
and PNG at their strongest settings. Then it compares the processor time of encoding with and without the choice.
"""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from hpcmref import lossless
from hpcmref.codec import Codec, load
from hpcmref.format.container import Coding, parse
from hpcmref.picture.images import picture_of
from research.hard_pictures import pictures

QUALITIES = (0, 16, 32, 48, 62, 63)


def best_of_others(image: Image.Image) -> int:
    """Return the bytes as lossless WebP or PNG, whichever is smaller. WebP's strongest setting would take minutes."""
    sizes = []
    for form, options in (("PNG", {"optimize": True}), ("WEBP", {"lossless": True, "quality": 100, "method": 5})):
        file = io.BytesIO()
        image.save(file, form, **options)
        sizes.append(len(file.getvalue()))
    return min(sizes)


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Return the PSNR in dB over all samples, which is infinite for equal pictures."""
    error = np.square(np.asarray(image, np.float64) - np.asarray(reference, np.float64)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def row(codec: Codec, name: str, image: Image.Image) -> str:
    """Return one line of the table."""
    pixels = image.width * image.height
    ratio = len(lossless.pack(picture_of(image))[1]) / best_of_others(image)
    cells = [f"{name:16}", f"{ratio:6.3f}"]
    for quality in QUALITIES:
        data = codec.encode(image, quality, choose=True)
        mark = " " if parse(data).coding is Coding.LEARNED else "*"
        cells.append(f"{8 * len(data) / pixels:7.3f}{mark}{psnr(codec.decode(data), image):6.2f}")
    return " ".join(cells)


def overhead(codec: Codec, images: list[Image.Image], quality: int) -> float:
    """Return the processor time of encoding with the choice, divided by that without."""
    spent = [0.0, 0.0]
    for image in images:
        for choose in (False, True, True, False):
            started = time.process_time()
            codec.encode(image, quality, choose=choose)
            spent[choose] += time.process_time() - started
    return spent[1] / spent[0]


def main(
    side: Annotated[int, typer.Option(help="Pixels of the drawn pictures, about.")] = 512,
    photographs: Annotated[Path | None, typer.Option(help="A folder of PNG files.")] = None,
    limit: Annotated[int, typer.Option(help="Photographs at most.")] = 24,
) -> None:
    """Print the tables."""
    codec = load(device="cpu")
    print("* lossless; columns: stream / best of WebP and PNG, then bits per pixel and dB at", *QUALITIES)
    for name, image in pictures(side).items():
        print(row(codec, name, image), flush=True)
    found = sorted(photographs.glob("*.png"))[:limit] if photographs else []
    images = [Image.open(path).convert("RGB") for path in found]
    for path, image in zip(found, images, strict=True):
        print(row(codec, path.stem, image), flush=True)
    for quality in (32, 62, 63) if images else ():
        print(f"time at -q {quality}: {overhead(codec, images, quality):.3f} times that without the choice", flush=True)


if __name__ == "__main__":
    typer.run(main)
