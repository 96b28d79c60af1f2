"""How many bytes do ten alpha masks take, packed by hpcmref, as lossless WebP and as PNG?

    python -m research.alpha_packing

WebP and PNG store the mask as a grey picture.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from hpcmref.picture.metadata import pack_alpha


def masks(side: int = 384) -> dict[str, NDArray[Any]]:
    """Name -> (H, W) uint8."""
    rows, columns = np.mgrid[:side, :side]
    rng = np.random.default_rng(0)
    disc = Image.fromarray((np.hypot(rows - side / 2, columns - side / 2) < side / 3) * np.uint8(255))
    text = Image.new("L", (side, side))
    for line in range(10):
        ImageDraw.Draw(text).text((8, 38 * line), "Transparent text", 255, ImageFont.load_default(30))
    hair = Image.new("L", (side, side))
    for x, y, bend in rng.integers(0, side, (200, 3)).tolist():
        ImageDraw.Draw(hair).arc((x - bend, y - bend, x + bend + 1, y + bend + 1), 200, 320, 255)
    return {
        "hard edge": np.asarray(disc),
        "soft edge": np.asarray(disc.filter(ImageFilter.GaussianBlur(6))),
        "antialiased edge": np.asarray(disc.filter(ImageFilter.GaussianBlur(0.7))),
        "linear gradient": (columns * 255 // (side - 1)).astype(np.uint8),
        "radial gradient": np.hypot(rows - side / 2, columns - side / 2).clip(0, 255).astype(np.uint8),
        "hair": np.asarray(hair.filter(ImageFilter.GaussianBlur(0.6))),
        "hard hair": np.asarray(hair),
        "text": np.asarray(text),
        "noise": rng.integers(0, 256, (side, side), np.uint8),
        "soft edge with noise": (np.asarray(disc.filter(ImageFilter.GaussianBlur(20))) // 8 * 8
                                 + rng.integers(0, 8, (side, side), np.uint8)),
    }  # fmt: skip


def size_as(image: Image.Image, form: str, **options: object) -> int:
    """Return the bytes of the image in a format of Pillow."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return len(file.getvalue())


if __name__ == "__main__":
    print(f"{'mask':24}{'hpcmref':>9}{'WebP':>9}{'PNG':>9}{'ratio':>8}")
    for name, mask in masks().items():
        image = Image.fromarray(mask)
        ours = len(pack_alpha(mask))
        webp = size_as(image, "WEBP", lossless=True, quality=100, method=6)
        png = size_as(image, "PNG", optimize=True)
        print(f"{name:24}{ours:9}{webp:9}{png:9}{ours / min(webp, png):8.2f}")
