"""Does a model gain more over another one on the tiles that both were trained on than on held-out tiles?

    python -m research.by_heart train-*.tar --models nano-2,light-1

For each model but the first, the table has the BD-rate against the first one: on training tiles, and on the held-out
tiles, which are those of `hpcmref train` with the same files. A model that has learned its tiles by heart gains more on
the former. Bits are estimated, and each tile counts with its middle 256x256 pixels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from hpcmref import checkpoints
from hpcmref.bench.bdrate import bd_rate
from hpcmref.bench.curves import Curve, Point
from hpcmref.model import HPCM
from hpcmref.training.data import Tiles
from hpcmref.training.objective import bits_per_pixel, mean_squared_error, psnr
from research.effort_curve import middle

SIDE = 256
QUALITIES = (4, 18, 32, 46, 60)


def curve(model: HPCM, tiles: list[Tensor]) -> Curve:
    """Rate (geometric mean of bits per pixel) and mean PSNR in dB at each quality. tiles: (3, H, W) uint8."""
    points = []
    for quality in QUALITIES:
        rate = decibels = 0.0
        for tile in tiles:
            x = middle(tile, SIDE)[None].float() / 255
            out = model(x, x.new_full((1,), quality))
            rate += bits_per_pixel(out).log().item() / len(tiles)
            decibels += psnr(mean_squared_error(out["x_hat"].clamp(0, 1), x)).item() / len(tiles)
        points.append(Point(math.exp(rate), decibels))
    return Curve("", tuple(points))


@torch.no_grad()
def main(
    data: Annotated[list[Path], typer.Argument(help="The folders or tar files that the models were trained on.")],
    models: Annotated[str, typer.Option(help="Names or files, with commas between.")],
    count: Annotated[int, typer.Option(min=1, help="Training tiles to measure on.")] = 72,
    limit: Annotated[int | None, typer.Option(help="Read only the first images, this many.")] = None,
) -> None:
    """Print BD-rates against the first model on training tiles and on held-out tiles."""
    tiles = Tiles(data, SIDE, limit)
    seen = tiles.train
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(1)).tolist()
    groups = [[seen[index] for index in order[:count]], tiles.held_out]
    first: list[Curve] = []
    print(f"| model | {len(groups[0])} training tiles | {len(groups[1])} held-out tiles |\n| --- | --- | --- |")
    for name in models.split(","):
        model = checkpoints.load(checkpoints.find(name)).model.eval()
        curves = [curve(model, group) for group in groups]
        first = first or curves
        deltas = [bd_rate(anchor, each).value for anchor, each in zip(first, curves, strict=True)]
        print(f"| {name} | " + " | ".join("none" if each is None else f"{each:+.2f} %" for each in deltas) + " |")


if __name__ == "__main__":
    typer.run(main)
