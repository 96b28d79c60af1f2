"""Pictures that are unlike photographs, generated from a seed: text, screenshots, pixel art, dither, checkers, noise.

`pictures(side)` returns all of them by name. `python -m research.lossless_choice` measures them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TEXT = """
a codec turns a picture into bytes and the bytes back into a picture that looks like it The smaller the file and the
closer the picture the better it is Text is hard for it since every letter has edges
"""
WORDS = TEXT.split()
SYNTHETIC = ("flat", "checker", "columns", "dither", "pixel art", "noise", "gradient", "drawing")


def text(side: int, seed: int = 0) -> Image.Image:
    """Draw a page of text, black or coloured, on white or nearly white, in sizes of 9 to 20 pixels."""
    random = np.random.default_rng(seed)
    paper = tuple(int(each) for each in random.integers(235, 256, 3)) if seed % 3 == 2 else (255, 255, 255)
    page = Image.new("RGB", (side, side * 5 // 4), paper)
    draw = ImageDraw.Draw(page)
    y = side // 20
    while y < page.height - side // 20:
        size = int(random.choice([9, 11, 12, 14, 20]))
        ink = (0, 0, 0) if seed % 2 == 0 else tuple(int(each) for each in random.integers(0, 120, 3))
        line = " ".join(random.choice(WORDS, max(1, side // (size * 3))))
        draw.text((side // 20, y), line, ink, ImageFont.load_default(size))
        y += int(size * 1.4)
    return page


def screenshot(side: int, seed: int = 0) -> Image.Image:
    """Draw windows with titles, buttons, lines of text and flat or shaded backgrounds."""
    random = np.random.default_rng(seed)
    shade = np.linspace(0, 40 * (seed % 2), side)[:, None, None] + random.integers(40, 180, 3)
    screen = Image.fromarray(np.broadcast_to(shade, (side, side * 4 // 3, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(screen)
    for _ in range(3):
        left, top = int(random.integers(0, screen.width // 2)), int(random.integers(0, side // 2))
        right, bottom = left + screen.width // 2, top + side // 2
        draw.rectangle((left, top, right, bottom), (250, 250, 250), (90, 90, 90))
        draw.rectangle((left, top, right, top + 18), tuple(int(each) for each in random.integers(30, 200, 3)))
        draw.text((left + 4, top + 2), " ".join(random.choice(WORDS, 3)), "white", ImageFont.load_default(12))
        for y in range(top + 24, bottom - 14, 16):
            draw.text((left + 6, y), " ".join(random.choice(WORDS, 7)), (30, 30, 30), ImageFont.load_default(11))
        draw.rounded_rectangle((right - 60, bottom - 22, right - 6, bottom - 4), 4, (0, 110, 220))
    return screen


def synthetic(name: str, side: int, seed: int = 0) -> Image.Image:
    """Draw the picture of a name in SYNTHETIC, `side` pixels a side."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    colours = random.integers(0, 256, (8, 3))
    if name == "flat":
        pixels = np.broadcast_to(colours[0], (side, side, 3))
    elif name == "checker":
        pixels = ((rows + columns) % 2 * 255)[..., None].repeat(3, 2)
    elif name == "columns":
        pixels = colours[columns % 2]
    elif name == "dither":
        bayer = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])
        pixels = ((columns / side > (bayer[rows % 4, columns % 4] + 0.5) / 16) * 255)[..., None].repeat(3, 2)
    elif name == "pixel art":
        pixels = colours[random.integers(0, 8, (side // 4 + 1, side // 4 + 1))].repeat(4, 0).repeat(4, 1)[:side, :side]
    elif name == "noise":
        pixels = random.integers(0, 256, (side, side, 3))
    elif name == "gradient":
        pixels = np.stack([rows, columns, (rows + columns) / 2], 2) * (255 / side)
    else:
        return _drawing(side, random)
    return Image.fromarray(np.ascontiguousarray(pixels).astype(np.uint8))


def _drawing(side: int, random: np.random.Generator) -> Image.Image:
    """Draw smooth shapes of flat colour with antialiased edges, like vector graphics."""
    large = Image.new("RGB", (4 * side, 4 * side), "white")
    draw = ImageDraw.Draw(large)
    for _ in range(12):
        x, y, size = (int(each) for each in random.integers(0, 4 * side, 3))
        draw.ellipse((x, y, x + size // 2, y + size // 2), tuple(int(each) for each in random.integers(0, 256, 3)))
    return large.resize((side, side), Image.Resampling.LANCZOS)


def pictures(side: int) -> dict[str, Image.Image]:
    """Return ten pages of text, ten screenshots, and all other pictures, by name."""
    drawn: dict[str, Callable[[], Image.Image]] = {}
    for seed in range(10):
        drawn[f"text {seed}"] = lambda seed=seed: text(side, seed)  # type: ignore[misc]
        drawn[f"screenshot {seed}"] = lambda seed=seed: screenshot(side, seed)  # type: ignore[misc]
    for name in SYNTHETIC:
        drawn[name] = lambda name=name: synthetic(name, side)  # type: ignore[misc]
    return {name: draw() for name, draw in drawn.items()}
