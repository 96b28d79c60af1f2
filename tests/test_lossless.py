"""Do lossless files give back every pixel, and do hostile ones end in an error of ours?"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import hpcmref
from hpcmref import lossless
from hpcmref.cli import app
from hpcmref.errors import ConfigError, DecodeError, HpcmrefError, ImageError
from hpcmref.format.container import Coding, parse, write

PIXELS = np.random.default_rng(0).integers(0, 256, (21, 34, 4), np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("grey", [False, True])
def test_every_pixel_comes_back(mode: str, grey: bool) -> None:
    pixels = PIXELS.copy()
    if grey:
        pixels[..., :3] = pixels[..., :1]
    pixels[:10, :, 3] = 0
    image = Image.fromarray(pixels).convert(mode)
    again = hpcmref.decode(hpcmref.encode(image, lossless=True))
    assert (again.mode, again.tobytes()) == (image.mode, image.tobytes())


@pytest.mark.parametrize("size", [(16383, 2), (16384, 2), (1, 32768), (1, 1)])
def test_the_limits_of_webp_are_not_those_of_the_format(size: tuple[int, int]) -> None:
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.putpixel((0, 0), (1, 2, 3))
    file = parse(lossless.encode(image))
    assert max(size) <= 16383 or file.coding is Coding.PNG
    assert lossless.decode(file).tobytes() == image.tobytes()


def test_the_smaller_of_webp_and_png_is_taken() -> None:
    for image in (Image.fromarray(PIXELS[..., :3]), Image.new("L", (500, 300), 7), Image.linear_gradient("L")):
        sizes = []
        for form, options in (("PNG", {"optimize": True}), ("WEBP", {"lossless": True})):
            file = io.BytesIO()
            image.save(file, form, **options)
            sizes.append(len(file.getvalue()))
        assert len(parse(lossless.encode(image)).payload) <= 1.05 * min(sizes)


def test_what_cannot_be_exact_is_refused() -> None:
    for image in (Image.new("I;16", (2, 2)), Image.new("CMYK", (2, 2)), PIXELS[..., 0].astype(np.uint16)):
        with pytest.raises(ImageError):
            lossless.encode(image)
    with pytest.raises(ConfigError):
        hpcmref.encode(Image.new("L", (2, 2)), 5, lossless=True)


@pytest.mark.parametrize(
    "change",
    [
        {"payload": b""},
        {"payload": b"\x89PNG\r\n\x1a\n" + bytes(40)},
        {"payload": b"%!PS-Adobe-3.0 EPSF-3.0\n"},
        {"width": 35},
        {"coding": Coding.PNG},
        {"coding": Coding.WEBP},
    ],
)
def test_hostile_payloads(change: dict[str, object]) -> None:
    file = parse(lossless.encode(Image.fromarray(PIXELS[..., :3])))
    if change.get("coding") == file.coding:
        return
    with pytest.raises(DecodeError):
        lossless.decode(parse(write(replace(file, **change))))
    with pytest.raises(HpcmrefError, match="max_pixels"):
        lossless.decode(file, 100)


def test_the_command_line_and_pillow(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    image.save(tmp_path / "in.tif")
    for arguments in (
        ["encode", "in.tif", "-o", "a.bin", "--lossless"],
        ["decode", "a.bin", "-o", "out.png"],
        ["info", "a.bin"],
    ):
        paths = [str(tmp_path / each) if "." in each else each for each in arguments]
        result = CliRunner().invoke(app, paths)
        assert (result.exit_code, result.stderr) == (0, "")
    assert "coding" in result.stdout
    with Image.open(tmp_path / "out.png") as again:
        assert again.tobytes() == image.tobytes()
    image.save(tmp_path / "b.hpcm", lossless=True)
    with Image.open(tmp_path / "b.hpcm") as again:
        assert again.tobytes() == image.tobytes()
