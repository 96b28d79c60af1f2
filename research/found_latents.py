"""Does a model get better if g_s and the context model are trained on latents that `--effort` has found?

    python -m research.found_latents train-000.tar train-001.tar ... --crops 400 --steps 600

The latents of random crops of training tiles are found by the encoder with `--effort`. Then g_s and the entropy path
are trained on them, while g_a, h_a and the gains stay as they are. As a control, the same is done with the latents that
g_a computes. Both models are compared with the original one on held-out tiles, by real files at each effort.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from hpcmref import checkpoints
from hpcmref.errors import HpcmrefError
from hpcmref.format import container
from hpcmref.runtime.heap import keep_memory
from hpcmref.training.config import SCHEDULES
from hpcmref.training.data import Tiles
from hpcmref.training.objective import Objective
from research.effort_curve import middle_of_tiles, rate, trial

if TYPE_CHECKING:
    from hpcmref.codec import Codec
    from hpcmref.model import HPCM


@dataclass(frozen=True)
class Samples:
    """Crops x (n, 3, side, side) in 0..1 with qualities (n,), and latents of each: found by search, and of g_a."""

    x: Tensor
    quality: Tensor
    found: Tensor
    plain: Tensor


def main(
    archives: Annotated[
        list[Path], typer.Argument(help="Tar files of tiles; their held-out tiles are for comparison.")
    ],
    model: Annotated[str | None, typer.Option(help="A registry name or a .safetensors file.")] = None,
    crops: Annotated[int, typer.Option(help="The number of crops whose latents are searched.")] = 400,
    side: Annotated[int, typer.Option(help="Their side in pixels.")] = 128,
    effort: Annotated[int, typer.Option(help="The effort of that search.")] = 3,
    steps: Annotated[int, typer.Option(help="The number of training steps, of 8 crops.")] = 600,
    learning_rate: Annotated[float, typer.Option(help="The largest learning rate.")] = 1e-4,
    limit: Annotated[int, typer.Option(help="The number of held-out tiles.")] = 12,
    held_side: Annotated[int, typer.Option(help="Use only the middle of these, so many pixels a side.")] = 256,
    efforts: Annotated[str, typer.Option(help="Compare at these efforts, with commas between.")] = "0,3",
    qualities: Annotated[str, typer.Option(help="Which qualities, at least four, with commas between.")] = "8,24,40,56",
) -> None:
    """Print the BD-rate of both trained models against the original one: the mean of the images' own BD-rates."""
    from hpcmref.codec import load

    keep_memory()
    original = load(model, "cpu")
    points = [int(quality) for quality in qualities.split(",")]
    samples = search(original, Tiles(archives, side), crops, side, effort, points)
    images = middle_of_tiles(archives, limit, held_side)
    with tempfile.TemporaryDirectory() as folder:
        codecs = {"original": original}
        for name, latents in (("found latents", samples.found), ("latents of g_a", samples.plain)):
            tuned = trained(checkpoints.load(checkpoints.find(model)).model, samples, latents, steps, learning_rate)
            path = Path(folder) / f"{name}.safetensors"
            checkpoints.save(tuned, path, name, {})
            codecs[name] = load(path, "cpu")
        for each in map(int, efforts.split(",")):
            trials = {
                name: [[trial(codec, image, point, each) for point in points] for image in images]
                for name, codec in codecs.items()
            }
            for name in list(codecs)[1:]:
                rates = [rate(*pair) for pair in zip(trials["original"], trials[name], strict=True)]
                spread = f"{min(rates):+.2f} to {max(rates):+.2f}"
                print(f"trained on {name}, effort {each}: {np.mean(rates):+.2f} % ({spread})")


def search(codec: Codec, tiles: Tiles, crops: int, side: int, effort: int, qualities: list[int]) -> Samples:
    """Search the latents of random crops, each at one of the qualities."""
    generator = torch.Generator().manual_seed(0)
    pixels = tiles.crops(crops, side, generator, rescale=0.5)
    quality = torch.tensor(qualities)[torch.randint(len(qualities), (crops,), generator=generator)]
    found = []
    for crop, each in zip(pixels, quality.tolist(), strict=True):
        image = Image.fromarray(crop.permute(1, 2, 0).numpy())
        found.append(codec.y_hat(container.parse(codec.encode(image, each, effort=effort))).clone())
    x = pixels.float().div_(255).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = torch.cat(
            [codec.model.analyse(x[[place]], quality[[place]].float())[0].float() for place in range(crops)]
        )
    return Samples(x, quality.float(), torch.cat(found), plain)


def trained(model: HPCM, samples: Samples, latents: Tensor, steps: int, learning_rate: float) -> HPCM:
    """Train g_s and the entropy path of a model on given latents instead of those of g_a, and return it."""
    model.train().requires_grad_(False)
    parameters = [*model.g_s.parameters(), *model.entropy.parameters()]
    for parameter in parameters:
        parameter.requires_grad_()
    objective = Objective(model, "mse")
    optimiser = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)  # for the noise in place of rounding
    for step in range(steps):
        chosen = torch.randint(len(latents), (8,), generator=generator)
        y = latents[chosen]

        def analyse(x: Tensor, quality: Tensor, y: Tensor = y) -> tuple[Tensor, Tensor]:
            return y, model.hyper_latents(y)

        model.analyse = analyse  # type: ignore[method-assign]
        loss, _ = objective(samples.x[chosen], samples.quality[chosen])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * SCHEDULES["cosine"](step / steps)
        optimiser.step()
        if step % 50 == 0:
            print(f"step {step}: {loss:.3f}", file=sys.stderr, flush=True)
    del model.analyse
    return model.requires_grad_(False).eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        typer.run(main)
    except HpcmrefError as error:
        sys.exit(f"found_latents: {error}")
