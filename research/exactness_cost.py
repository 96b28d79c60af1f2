"""What does exact arithmetic cost, in rate and in time? `python -m research.exactness_cost FOLDER` measures it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from hpcmref.errors import HpcmrefError
from hpcmref.runtime.heap import keep_memory
from research.exactness_matrix import images_of, machine

if TYPE_CHECKING:
    from hpcmref.codec import Codec
    from hpcmref.model.hpcm import EntropyPath
    from hpcmref.model.schedule import Step


def main(
    folder: Annotated[Path, typer.Argument(help="Images to encode.")],
    model: Annotated[str | None, typer.Option(help="A registry name or a .safetensors file.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first images.")] = None,
    crop: Annotated[int | None, typer.Option(help="Use only the middle of each image, so many pixels a side.")] = None,
    timed: Annotated[int, typer.Option(help="How many of the images to measure times with.")] = 3,
    repeat: Annotated[int, typer.Option(help="How often each of these is coded; the best time counts.")] = 5,
) -> None:
    """Compare the exact entropy path with the float32 entropy path that it is made from."""
    from hpcmref import checkpoints
    from hpcmref.codec import Codec

    keep_memory()
    images = images_of(folder, limit, crop)
    path = checkpoints.find(model)
    checkpoint = checkpoints.load(path)
    plain = checkpoint.model.entropy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    codec = Codec(checkpoint, path.stem, torch.device("cpu"))
    qualities = (0, 16, 32, 48, 63) if codec.model.config.qualities > 1 else (None,)
    paths = (plain, codec.latents.entropy)
    found = np.array(
        [
            [[bpp_and_psnr(codec, path, image, quality or 0) for path in paths] for image in images]
            for quality in qualities
        ]
    )
    ratios = [
        np.median([time_ratios(codec, plain, image, quality, repeat) for image in images[:timed]] or [(0, 0)], axis=0)
        for quality in qualities
    ]
    table = Table(
        "quality", "float bpp", "exact bpp", "difference", "at equal PSNR", "float dB", "exact dB", "encode time",
        "decode time", title=f"{codec.name}, mean of {len(images)} images, {machine()}",
    )  # fmt: skip
    (float_bpp, float_psnr), (exact_bpp, exact_psnr) = found.mean(1).transpose(1, 2, 0)
    difference = exact_bpp / float_bpp - 1
    equal = difference + (float_psnr - exact_psnr) * _slope(float_bpp, float_psnr)
    for index, quality in enumerate(qualities):
        rates = (f"{each[index]:.4f}" for each in (float_bpp, exact_bpp))
        percents = (f"{100 * each[index]:+.3f} %" for each in (difference, equal))
        decibels = (f"{each[index]:.4f}" for each in (float_psnr, exact_psnr))
        table.add_row(str(quality), *rates, *percents, *decibels, *(f"x {ratio:.2f}" for ratio in ratios[index]))
    Console().print(table)


def _slope(bpp: NDArray[Any], psnr: NDArray[Any]) -> NDArray[Any]:
    """Return by what part the rate rises for one decibel, at every quality (n,). For one quality alone, return 0."""
    return np.gradient(np.log(bpp), psnr) if len(bpp) > 1 else np.zeros(1)


class _Rate:
    """A coder that adds up the bits of the given latents in float64; see `model.coders.Estimator`."""

    def __init__(self, y: torch.Tensor, z: torch.Tensor) -> None:
        from hpcmref.model.schedule import lattices

        self._planes, self._z = lattices(y), z
        self.bits = 0.0

    def code(self, step: Step | None, scales: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        from hpcmref.model.entropy import bits, likelihood, quantise

        target = self._z if step is None else step.select(self._planes[step.scale])
        symbols = quantise(target - means)
        self.bits += float(bits(likelihood(symbols.double(), scales.double())).sum())
        return symbols + means


def bpp_and_psnr(codec: Codec, entropy: EntropyPath, image: Image.Image, quality: int) -> tuple[float, float]:
    """Return the estimated bits per pixel and the PSNR in dB of an image, with the entropy path `entropy`."""
    from hpcmref.exact import exactly

    pixels = np.asarray(image.convert("RGB"))
    height, width = (side // 64 * 64 for side in pixels.shape[:2])
    x = torch.from_numpy(pixels[:height, :width].copy()).permute(2, 0, 1)[None].to(codec.device).float() / 255
    with torch.inference_mode(), exactly(codec.device):
        qualities = torch.tensor([float(quality)], device=codec.device)
        y, z = codec.model.analyse(x, qualities)
        coder = _Rate(y, z)
        y_hat = entropy(qualities, (z.shape[2], z.shape[3]), coder)
        error = (codec.model.synthesise(y_hat, qualities).clamp(0, 1) - x).square().mean()
    return coder.bits / (height * width), float(-10 * error.log10())


def time_ratios(
    codec: Codec, plain: EntropyPath, image: Image.Image, quality: int | None, repeats: int = 5
) -> tuple[float, float]:
    """Return the seconds of encoding and of decoding, divided by those with the entropy path `plain`.

    Both are measured in turns, and the best time of each is used.
    """
    exact = codec.latents.entropy
    best: dict[tuple[bool, str], float] = {}
    try:
        for _ in range(repeats):
            for is_exact in (True, False):
                codec.latents.entropy = exact if is_exact else plain
                begun = time.perf_counter()
                data = codec.encode(image, quality)
                encoded = time.perf_counter()
                codec.decode(data)
                for name, seconds in (("encode", encoded - begun), ("decode", time.perf_counter() - encoded)):
                    best[is_exact, name] = min(seconds, best.get((is_exact, name), seconds))
    finally:
        codec.latents.entropy = exact
    return best[True, "encode"] / best[False, "encode"], best[True, "decode"] / best[False, "decode"]


if __name__ == "__main__":
    try:
        typer.run(main)
    except HpcmrefError as error:
        sys.exit(f"exactness_cost: {error}")
