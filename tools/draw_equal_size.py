"""Draw docs/images/equal-size.png: a part of the sample photograph in JPEG, AVIF and hpcmref files of equal size.

    python tools/draw_equal_size.py

The size is that of hpcmref at quality 16. JPEG (optimised, progressive, 4:2:0) and AVIF (libaom, speed 4, 4:4:4) get
the highest quality whose file is not larger.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import hpcmref

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "tests" / "data" / "sample.png"
TARGET = ROOT / "docs" / "images" / "equal-size.png"
QUALITY = 16
PART = (130, 90, 310, 270)
"""Left, top, right and bottom of the part that is shown at twice its size."""

WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG": ("JPEG", {"optimize": True, "progressive": True, "subsampling": "4:2:0"}),
    "AVIF": ("AVIF", {"speed": 4, "subsampling": "4:4:4"}),
}


def of_size(image: Image.Image, limit: int, kind: str, options: dict[str, Any]) -> tuple[Image.Image, int]:
    """Return the decoded image of the best quality whose file has at most `limit` bytes, and the size of that file."""
    for quality in range(100, -1, -1):
        stream = io.BytesIO()
        image.save(stream, kind, quality=quality, **options)
        if (size := stream.tell()) <= limit:
            return Image.open(stream).convert("RGB"), size
    raise ValueError(f"{kind} has no quality with at most {limit} bytes")


def psnr(image: Image.Image, original: Image.Image) -> float:
    """Return the RGB PSNR in dB."""
    error = np.asarray(image, np.float64) - np.asarray(original, np.float64)
    return float(10 * np.log10(255**2 / np.square(error).mean()))


def main() -> None:
    original = Image.open(SAMPLE).convert("RGB")
    data = hpcmref.encode(original, quality=QUALITY)
    shown = [(name, *of_size(original, len(data), kind, options)) for name, (kind, options) in WRITERS.items()]
    shown += [("hpcmref", hpcmref.decode(data).convert("RGB"), len(data)), ("original", original, 0)]
    side, label = 2 * (PART[2] - PART[0]), 28
    sheet = Image.new("RGB", (len(shown) * (side + 8) - 8, side + label), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for column, (name, image, size) in enumerate(shown):
        left = column * (side + 8)
        part = image.crop(PART).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(part, (left, label))
        text = name if not size else f"{name}  {size} bytes  {psnr(image, original):.1f} dB"
        draw.text((left + 2, 3), text, "black", font)
        print(text)
    TARGET.parent.mkdir(exist_ok=True)
    sheet.save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
