"""Is a batch of images of one size faster than one image after the other? `python -m research.batches` prints both.

Processor time of the transforms, analysis and synthesis, with one thread: what is coded between them has to be done for
every image by itself, so this is the most that batches can gain.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer

from hpcmref.codec import load


def milliseconds(size: tuple[int, int], images: int, repeat: int) -> float:
    """Processor time an image of both transforms, the least of `repeat` runs of a batch. size: height and width."""
    model = load(device="cpu").model
    x = torch.rand(1, 3, *size).expand(images, -1, -1, -1).contiguous()
    quality = torch.full((images,), 32.0)
    seconds = []
    with torch.inference_mode():
        for _ in range(repeat + 1):  # the first one is to warm up
            started = time.process_time()
            y, _ = model.analyse(x, quality)
            model.synthesise(y, quality)
            seconds.append(time.process_time() - started)
    return 1000 * min(seconds[1:]) / images


def main(
    height: Annotated[int, typer.Option(min=64, help="A multiple of 64.")] = 256,
    width: Annotated[int, typer.Option(min=64, help="A multiple of 64.")] = 384,
    repeat: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Print the time of an image alone and in batches of 2, 4 and 8."""
    torch.set_num_threads(1)
    alone = milliseconds((height, width), 1, repeat)
    print(f"alone {alone:.1f} ms")
    for images in (2, 4, 8):
        found = milliseconds((height, width), images, repeat)
        print(f"of {images} {found:.1f} ms an image, {100 * (found / alone - 1):+.0f} %")


if __name__ == "__main__":
    typer.run(main)
